"""Where the arrays of a training run lie on many devices.

A mesh has two axes. Along 'data' the devices see different examples of a batch;
along 'model' they compute different outputs of a layer. The state is either
replicated, which is data parallelism, or sharded: every device keeps its part
of φ, the masks, the momenta and the norm statistics.

    mesh ─▶ state_shardings(shapes) ─▶ create_sharded ─▶ on_mesh(step) ─▶ …

Where a leaf is split follows from its shape alone, so that a leaf, its mask,
its slots in the optimiser and its scores are split alike, and what concerns
them entry by entry moves nothing between devices. Steps are those of step.py:
the compiler sees the whole batch, so that means over it, of the loss as of
batch norm, are those of one device.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, Literal, get_args

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from powerprop_jax.core.trees import Tree
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError

DATA, MODEL = 'data', 'model'
Mode = Literal['replicated', 'sharded']


def make_mesh(
  data: int | None = None,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
  *,
  explicit: bool = False,
) -> Mesh:
  """Devices in rows along 'data' and columns along 'model'.

  Args:
    data: devices that share out a batch; None is as many as model leaves.
    devices: which to use; all of them, on all hosts, by default.
    explicit: whether shardings are part of the types of arrays. By default the
      compiler finds them, which is what Haiku's layers need; with explicit
      axes, on_mesh hands them to the compiler for the length of a step.

  Example:
    >>> dict(make_mesh(1, devices=jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
  """
  devices = jax.devices() if devices is None else devices
  if model < 1 or (data is not None and data < 1):
    raise UserError(
      f'the axes of a mesh have at least one device, got data {data} and model '
      f'{model}.'
    )
  if data is None:
    data = max(1, len(devices) // model)
  if data * model != len(devices):
    raise UserError(
      f'a mesh of data {data} × model {model} needs {data * model} devices, '
      f'there are {len(devices)}. Choose numbers whose product is '
      f'{len(devices)}, or pass the devices to use.'
    )
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return jax.make_mesh(
    (data, model), (DATA, MODEL), axis_types=(kind, kind), devices=devices
  )


def state_shardings(
  shapes: Tree, mesh: Mesh, mode: Mode = 'sharded', *, min_size: int = 1024
) -> Tree:
  """Where each leaf of a state lies: a tree of NamedShardings.

  'replicated': all of it on every device. 'sharded': a leaf is split in two
  ways. Along 'model' goes its last axis, that of the outputs of a layer, if
  the length can be divided; along 'data' the longest axis, or part of an axis,
  whose length can be divided, the last of several. What cannot be divided is on
  every device, and so are leaves of fewer than min_size entries: to send them
  around takes longer than to keep them.

  The shapes may be those of jax.eval_shape, or the state itself.

  Example:
    >>> mesh = make_mesh(1, devices=jax.devices()[:1])
    >>> shapes = {'w': jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32)}
    >>> state_shardings(shapes, mesh)['w'].is_fully_replicated
    True
  """
  if mode not in get_args(Mode):
    raise UserError(
      f'mode must be one of {", ".join(get_args(Mode))}, got {mode!r}.'
    )
  errors.check_least(1, min_size=min_size)

  def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    shape = np.shape(leaf)
    if not shape or mode == 'replicated' or math.prod(shape) < min_size:
      return replicated(mesh)
    return NamedSharding(mesh, _split(shape, mesh))

  return jax.tree.map(place, shapes)


def _split(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The axes of the mesh along which each axis of a leaf is split."""
  lengths = list(shape)
  names: list[tuple[str, ...]] = [()] * len(shape)

  def split(axis: int, name: str) -> None:
    lengths[axis] //= mesh.shape[name]
    if mesh.shape[name] > 1:
      names[axis] += (name,)

  if lengths[-1] % mesh.shape[MODEL] == 0:
    split(len(shape) - 1, MODEL)
  fitting = [
    (length, axis)
    for axis, length in enumerate(lengths)
    if length % mesh.shape[DATA] == 0
  ]
  if fitting:
    split(max(fitting)[1], DATA)
  parts = [part[0] if len(part) == 1 else part or None for part in names]
  while parts and parts[-1] is None:
    parts.pop()
  return PartitionSpec(*parts)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Where a batch lies: its examples are shared out along 'data'.

  Their axis is 0 in images and labels, and 1 in the indices [num_steps, batch]
  of step.make_advance.

  Example:
    >>> tuple(batch_sharding(make_mesh(devices=jax.devices()[:1]), axis=1).spec)
    (None, 'data')
  """
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def replicated(mesh: Mesh) -> NamedSharding:
  """All of an array on every device: metrics, or data that steps index."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Refuses a batch, of all hosts together, that 'data' cannot share out."""
  errors.check_shares(batch_size, mesh.shape[DATA], 'devices')


def create_sharded(
  create: Callable[[], Tree],
  mesh: Mesh,
  mode: Mode = 'sharded',
  *,
  min_size: int = 1024,
) -> Tree:
  """A state that is made where it lies: no device ever holds all of it.

  The numbers are the same on any mesh, up to the rounding of ψ⁻¹. A pure
  function makes the state, the same on every host, such as
  functools.partial(state.create, net, tx, key, images); for mode and min_size
  see state_shardings.
  """
  # Initialisers know nothing of explicit axes; the numbers do not depend on
  # them.
  kinds = (AxisType.Auto, AxisType.Auto)
  automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
  shapes = jax.eval_shape(create)
  placed = state_shardings(shapes, automatic, mode, min_size=min_size)
  state = jax.jit(create, out_shardings=placed)()
  if mesh == automatic:
    return state
  placed = state_shardings(shapes, mesh, mode, min_size=min_size)
  return jax.device_put(state, placed)


def template(shapes: Tree, shardings: Tree) -> Tree:
  """Shapes that say where they lie, for Checkpoints.restore_latest.

  A state, or its shapes, and where its leaves are to lie, from state_shardings;
  it is restored to them whatever mesh it was saved from.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def on_mesh(
  step: Callable[..., Any],
  shardings: Tree,
  mesh: Mesh,
  inputs: Sequence[Tree] | None = None,
) -> Any:
  """Compiles a step so that the state, which is donated, stays where it lies.

  Left alone, the compiler may return a sharded state replicated. Metrics are on
  every device, where every host can read them.

  Args:
    step: (state, *inputs) -> (state, metrics), from step.make_step or
      make_advance.
    shardings: of the state, from state_shardings.
    inputs: sharding of each argument after the state. By default two batches,
      of images and of labels; for make_advance (replicated(mesh),
      batch_sharding(mesh, axis=1)).
  """
  if inputs is None:
    inputs = (batch_sharding(mesh), batch_sharding(mesh))
  outputs = (shardings, replicated(mesh))
  if AxisType.Explicit in mesh.axis_types:
    step = jax.sharding.auto_axes(step, out_sharding=outputs)
  return jax.jit(
    step,
    in_shardings=(shardings, *inputs),
    out_shardings=outputs,
    donate_argnums=0,
  )
