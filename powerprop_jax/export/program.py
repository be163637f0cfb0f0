"""A pruned network as a compiled function in a file, by jax.export.

    program.write('net_jax.npz', fn, exported, image_shape)
    logits = program.read('net_jax.npz').run(images)

The file is an .npz with `program`, bytes, and `about`, a string of JSON. Any
JAX runs it without this library, on a CPU, a GPU or a TPU:

    program = numpy.load('net_jax.npz')['program']
    logits = jax.export.deserialize(bytearray(program)).call(images)

Parameters are constants of the program, held as their connections (value and
position) and compressed with the file. As arguments they would make a program
of 7 kB that needs a second file, and dense weights would be made from them in
every call; from constants the compiler makes them once. An MLP
784-2048-2048-10 at 95 % sparsity, on one CPU core: 6.1 % of its dense
parameters, and 0.93 ms for one image, where the dense network takes 0.96 ms and
a program with its connections as arguments 2.2 ms. With a fixed batch of 128,
784-4096-4096-10 took a third of the time of the dense network.
"""

from collections.abc import Callable, Sequence
import os
import pathlib
from typing import NamedTuple

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import trees
from powerprop_jax.export import export, inference, npz
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export.exported import Array, Exported
from powerprop_jax.export.inference import Function
from powerprop_jax.files.tables import Row
from powerprop_jax.sparse import kernel_choice

SUFFIX = '_jax.npz'
PLATFORMS = ('cpu', 'cuda', 'tpu')


class Program(NamedTuple):
  """A function read from a file, and what was written about it.

  run, jitted, takes images [N, H, W, C], float32 in [0, 1], to logits
  [N, classes]; batch is the N that it is for, None for any.
  """

  run: Callable[[jax.Array], jax.Array]
  image_shape: tuple[int, ...]
  batch: int | None
  about: Row


def write(
  path: str | os.PathLike[str],
  fn: Function,
  exported: Exported,
  image_shape: tuple[int, ...],
  *,
  batch: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes fn(theta, images) as a function of images of this shape.

  Args:
    batch: how many images a call gets. None leaves it open: the program then
      multiplies by dense weights, which the compiler makes once. With a number
      the condensed layers choose how to multiply, and compute connection by
      connection where that is faster.

  Raises:
    ImportError: without flatbuffers, which jax.export serialises with.
    ValueError: if batch is None and the network is one with cosine transforms,
      which are done in different ways for few images and for many.
  """
  if batch is not None and batch < 1:
    raise ValueError(f'batch must be at least 1, got {batch}.')
  export.check_free(path, overwrite=overwrite)
  exported = exported_lib.on_host(exported)
  # No kernels that were compiled for this machine.
  with kernel_choice.use('loops', 'dense'):
    if batch is None:
      run = _expanded(fn, exported)
    else:
      shape = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
      form = inference.condensed(fn, exported, shape)
      run = lambda images: form.run(form.parameters, images)
    (size,) = jax_export.symbolic_shape('batch') if batch is None else (batch,)
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    try:
      program = jax_export.export(jax.jit(run), platforms=platforms)(images)
    except jax.core.InconclusiveDimensionOperation as error:
      raise ValueError(
        'this network computes in a way that depends on the number of images '
        'in a call. Say how many there are, with batch.'
      ) from error
  serialised = np.frombuffer(program.serialize(), np.uint8)
  data = npz.pack({'program': serialised}, exported.about)
  return export.write_bytes(path, data, overwrite=overwrite)


def _expanded(
  fn: Function, exported: Exported
) -> Callable[[jax.Array], jax.Array]:
  """images -> logits, by dense weights that are made from their connections."""
  held = trees.map_leaves(
    lambda leaf, mask: _held(leaf.value, mask),
    exported.theta,
    inference.worth_condensing(exported.masks),
  )

  def run(images: jax.Array) -> jax.Array:
    make: Callable[[Callable[[], jax.Array]], jax.Array] = lambda make: make()
    logits: jax.Array = fn(jax.tree.map(make, held), images)
    return logits

  return run


def _held(value: Array, mask: Array) -> Callable[[], jax.Array]:
  """Makes a leaf, from its connections if it lacks some."""
  if mask.all():
    return lambda: jnp.asarray(value)
  places, values = np.flatnonzero(mask), value[mask]
  flat = lambda: jnp.zeros(value.size, value.dtype)
  return lambda: flat().at[places].set(values).reshape(value.shape)


def read(path: str | os.PathLike[str]) -> Program:
  """Reads a file that write wrote.

  Raises:
    ImportError: without flatbuffers.
    ValueError: if there is no such file, it is damaged or none that write
      wrote, or this JAX does not know its version.
  """
  data = export.read_bytes(path)
  try:
    arrays, about, _ = npz.unpack(data)
    program = jax_export.deserialize(bytearray(arrays['program'].tobytes()))
  except (ValueError, KeyError) as error:
    raise ValueError(
      f'cannot read {os.fspath(path)} as a program: '
      f'{str(error).rstrip(".")}. Give a file that powerprop export --format '
      'jax wrote.'
    ) from error
  size, *image_shape = program.in_avals[0].shape
  batch = size if isinstance(size, int) else None
  return Program(jax.jit(program.call), tuple(image_shape), batch, about)
