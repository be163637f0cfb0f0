"""A network as a function in a file, by jax.export.

    program.write('net_jax.npz', fn, exported, images)
    logits = program.read('net_jax.npz').run(images)

The network is fn(theta, *args), in any library. The file is an .npz with its
weights as npz.py has them, masks where they are not theta != 0, and

    program            fn of ({'MODULE/NAME': leaf}, *args), bytes
    program/condensed  fn without its zeros, of (connections, *args), bytes; if
                       it is faster
    program/condense   {'MODULE/NAME': leaf} -> connections, bytes
    program/about      a string of JSON: the inputs, and why there is no
                       program/condensed

Any JAX runs it without this library, on a CPU, a GPU or a TPU:

    with numpy.load('net_jax.npz') as file:
      theta = {n[6:]: file[n] for n in file if n.startswith('theta/')}
      program = jax.export.deserialize(bytearray(file['program']))
    logits = program.call(theta, images)

The condensed program computes connection by connection in plain JAX, as kernels
that were compiled for one machine are of no use to another. Of an MLP
784-2048-2048-10 at 95 % sparsity it takes 0.43 of the time of the dense one for
128 images, on one CPU core, and as long for a single one.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any, NamedTuple, TypeAlias
import zipfile

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.export import export, inference, npz
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import inputs as inputs_lib
from powerprop_jax.export.exported import Array, Exported
from powerprop_jax.export.inference import Form, Function
from powerprop_jax.export.inputs import Input
from powerprop_jax.files import json_files
from powerprop_jax.sparse import kernel_choice, network
from powerprop_jax.sparse.network import Execution

SUFFIX = '_jax.npz'
PLATFORMS = ('cpu', 'cuda', 'tpu')

_FORMAT = 'powerprop_jax program, version 2'
# Which axis of an argument may have any length; None if none.
BatchAxis: TypeAlias = int | None


class Program(NamedTuple):
  """A function read from a file.

  Attributes:
    forms: by name, 'dense', 'masked' and, if the file has it, 'condensed', with
      parameters by 'module/name'.
    inputs: the arrays that it takes, in the order of jax.tree.leaves(args).
    exported: the network, as {module: {name: array}}.
    missing: why there is no condensed form; '' if there is.
    structure: of args.
  """

  forms: dict[str, Form]
  inputs: tuple[Input, ...]
  exported: Exported
  missing: str
  structure: Any

  def run(self, *args: Any) -> Any:
    """What the network computes, by the condensed form if there is one."""
    form = self.forms.get('condensed', self.forms['dense'])
    return form.run(form.parameters, *args)

  def arguments(self, rows: int = 1) -> tuple[Any, ...]:
    """Random arguments, with so many rows where any number of them can be.

    Raises:
      ValueError: for integers, if the program was written for shapes, and not
        for arrays that say in which range these are.
    """
    random = np.random.default_rng(0)
    drawn = [found.draw(rows, random) for found in self.inputs]
    args: tuple[Any, ...] = jax.tree.unflatten(self.structure, drawn)
    return args


def write(
  path: str | os.PathLike[str],
  fn: Function,
  exported: Exported,
  *args: Any,
  batch_axes: BatchAxis | Sequence[BatchAxis] = 0,
  execution: Execution = 'auto',
  platforms: Sequence[str] = PLATFORMS,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a network, and fn(theta, *args) for arguments like these.

  Args:
    fn: the network, with theta in the containers of exported. What else it
      needs, such as the statistics of norms, it may close over.
    *args: examples, or jax.ShapeDtypeStruct. Their shapes decide what is
      faster, and their lowest and highest numbers are written down for
      `powerprop bench`, which draws others like them.
    batch_axes: the axis of the arguments that may have any length, as in_axes
      of jax.vmap: one for all, or one for each, None for an argument whose
      shape is that of the example.
    execution: which leaves the condensed form multiplies without their zeros,
      as in without_zeros; gradients do not count.

  Raises:
    ImportError: without flatbuffers, which jax.export serialises with.
    ValueError: if fn cannot be called so, does not use the weights that it is
      given, or computes in a way that depends on the length of the batch.
  """
  export.check_free(path, overwrite=overwrite)
  host = exported_lib.on_host(exported)
  arrays, dtypes = npz.arrays(host)
  shapes = jax.eval_shape(lambda *args: args, *args)
  theta = jax.eval_shape(lambda theta: theta, exported.theta)
  held = jax.eval_shape(lambda held: held, _part(arrays, 'theta'))
  open_shapes = _open(shapes, batch_axes)
  _check_call(fn, theta, shapes)
  by_name = _by_name(fn, theta)
  fixed = _to_program(by_name, None, held, *shapes)
  _check_uses(fixed, _part(arrays, 'masks'))
  programs, missing = {}, ''
  programs['program'] = _to_program(by_name, platforms, held, *open_shapes)
  try:
    # Kernels that any machine has.
    with kernel_choice.use('loops'):
      plan = inference.plan(
        fn, exported.masks, theta, *shapes, execution=execution
      )
      _check_condensed(plan.run.leaves)
      condense = lambda t: trees.by_path(network.condense(t, plan.masks))
      values = jax.eval_shape(condense, theta)
      programs |= {
        'program/condense': _to_program(
          _by_name(condense, theta), platforms, held
        ),
        'program/condensed': _to_program(
          _by_name(plan.run, theta), platforms, values, *open_shapes
        ),
      }
  except ValueError as error:
    missing = str(error)
  for name, program in programs.items():
    arrays[name] = np.frombuffer(_serialised(program), np.uint8)
  inputs = [
    inputs_lib.of(shape, example)
    for shape, example in zip(
      jax.tree.leaves(open_shapes), jax.tree.leaves(args), strict=True
    )
  ]
  about = {
    'format': _FORMAT,
    'inputs': [found._asdict() for found in inputs],
    'missing': missing,
  }
  arrays['program/about'] = np.array(json.dumps(json_files.to_json(about)))
  for name, mask in _part(arrays, 'masks').items():
    if np.array_equal(mask, arrays[f'theta/{name}'] != 0):
      del arrays[f'masks/{name}']
  data = npz.pack(arrays, host.about, dtypes)
  return export.write_bytes(path, data, overwrite=overwrite)


def _part(arrays: Mapping[str, Array], part: str) -> dict[str, Array]:
  """The leaves of a part, by 'module/name'."""
  return {
    name.removeprefix(f'{part}/'): value
    for name, value in arrays.items()
    if name.startswith(f'{part}/')
  }


def _by_name(fn: Function, theta: Params) -> Function:
  """fn of leaves by 'module/name', in the dtypes that files hold them in."""

  def run(held: Params, *args: Any) -> Any:
    named = trees.map_leaves(
      lambda leaf: held[leaf.path].astype(leaf.value.dtype), theta
    )
    return fn(named, *args)

  return run


def _open(
  shapes: tuple[Tree, ...], batch_axes: BatchAxis | Sequence[BatchAxis]
) -> tuple[Tree, ...]:
  """The shapes, with one symbol for the lengths of the batch axes."""
  axes = (
    [batch_axes] * len(shapes)
    if batch_axes is None or isinstance(batch_axes, int)
    else list(batch_axes)
  )
  if len(axes) != len(shapes):
    raise ValueError(
      f'batch_axes has {len(axes)} entries for {len(shapes)} arguments. Give '
      'one for each, or one for all.'
    )
  lengths: dict[int, str] = {}
  (batch,) = jax_export.symbolic_shape('batch')

  def opened(
    shape: jax.ShapeDtypeStruct, number: int, axis: BatchAxis
  ) -> jax.ShapeDtypeStruct:
    if axis is None:
      return shape
    if not -len(shape.shape) <= axis < len(shape.shape):
      raise ValueError(
        f'argument {number} has shape {shape.shape}, and so no axis {axis} of '
        'the batch. Say which axis of each argument that is, None for none: '
        'batch_axes=(0, None).'
      )
    lengths[shape.shape[axis]] = f'{shape.shape[axis]} in argument {number}'
    if len(lengths) > 1:
      raise ValueError(
        f'the axes of the batch have different lengths: '
        f'{", ".join(lengths.values())}. Say which axis of each argument is '
        'that of the batch, None for none: batch_axes=(0, None).'
      )
    sizes = list(shape.shape)
    sizes[axis] = batch
    return jax.ShapeDtypeStruct(sizes, shape.dtype)

  return tuple(
    jax.tree.map(lambda shape: opened(shape, number, axis), arg)  # noqa: B023
    for number, (arg, axis) in enumerate(zip(shapes, axes, strict=True))
  )


def _check_call(fn: Function, theta: Params, shapes: tuple[Tree, ...]) -> None:
  try:
    jax.eval_shape(fn, theta, *shapes)
  except Exception as error:  # Whatever fn may raise.
    given = ', '.join(str(inputs_lib.of(x)) for x in jax.tree.leaves(shapes))
    raise ValueError(
      f'fn(theta, *args) fails with the weights and args of {given}: '
      f'{_first_line(error)}.'
    ) from error


def _check_uses(
  program: jax_export.Exported, masks: Mapping[str, Array]
) -> None:
  """Refuses a function that closes over its weights.

  Its shapes are fixed: of open ones JAX does not say which it uses.
  """
  names = sorted(masks)
  used = {names[i] for i in program.module_kept_var_idx if i < len(names)}
  unused = [n for n in names if n not in used]
  wrong = unused if not used else [n for n in unused if not masks[n].all()]
  if wrong:
    raise ValueError(
      f'the function does not use {wrong[0]!r}: the weights must be its first '
      'argument, fn(theta, *args), not something that it closes over.'
    )


def _check_condensed(leaves: Mapping[str, network.Leaf]) -> None:
  """Refuses to write a condensed form that would be the dense one."""
  if any(leaf.held == 'condensed' for leaf in leaves.values()):
    return
  by_reason: dict[str, list[str]] = {}
  for name, leaf in leaves.items():
    by_reason.setdefault(leaf.why, []).append(name)
  reasons = [
    f'{names[0]}{f" and {len(names) - 1} more" if names[1:] else ""} ({why})'
    for why, names in by_reason.items()
  ]
  if not reasons:
    raise ValueError('no leaf has more zeros than connections')
  raise ValueError(f'all leaves are held dense, {"; ".join(reasons)}')


def _to_program(
  fn: Function, platforms: Sequence[str] | None, *shapes: Tree
) -> jax_export.Exported:
  try:
    return jax_export.export(jax.jit(fn), platforms=platforms)(*shapes)
  except Exception as error:  # JAX has several for what it cannot do.
    is_open = any(
      not isinstance(size, int)
      for shape in jax.tree.leaves(shapes)
      for size in shape.shape
    )
    what = 'for a batch of any length' if is_open else 'for other machines'
    hint = ' Fix its length with batch_axes=None.' if is_open else ''
    raise ValueError(
      f'the function cannot be exported {what}: {_first_line(error)}.{hint}'
    ) from error


def _first_line(error: Exception) -> str:
  text = str(error) or type(error).__name__
  return text.splitlines()[0].rstrip('.')


def _serialised(program: jax_export.Exported) -> bytearray:
  try:
    return program.serialize()
  except ValueError as error:  # JAX says which container it does not know.
    raise ValueError(
      'the arguments and results of an exported function must be arrays, in '
      f'dictionaries, lists and tuples: {_first_line(error)}.'
    ) from error


def is_program(path: str | os.PathLike[str]) -> bool:
  """Whether a file holds a function besides its weights."""
  try:
    with zipfile.ZipFile(path) as opened:
      return 'program.npy' in opened.namelist()
  except (OSError, zipfile.BadZipFile):
    return False


def read(path: str | os.PathLike[str]) -> Program:
  """Reads a file that write wrote.

  Raises:
    ImportError: without flatbuffers.
    ValueError: if there is no such file, it is damaged or none that write of
      this version wrote, or this JAX does not know its version.
  """
  data = export.read_bytes(path)
  try:
    arrays, about, dtypes = npz.unpack(data)
    return _read(arrays, npz.network(arrays, about, dtypes))
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'cannot read {os.fspath(path)} as a program: '
      f'{str(error).rstrip(".")}. Give a file that powerprop export --format '
      'jax or program.write wrote.'
    ) from error


def _read(arrays: dict[str, Array], exported: Exported) -> Program:
  if 'program' not in arrays:
    raise ValueError('it holds weights, and no function')
  about = json.loads(str(arrays.get('program/about', '{}')))
  if about.get('format') != _FORMAT:
    raise ValueError(
      f'it is in format {about.get("format")!r}, and this version of '
      f'powerprop_jax reads {_FORMAT!r}: export the network again'
    )
  inputs = tuple(
    Input(tuple(i['shape']), i['dtype'], i['range'] and tuple(i['range']))
    for i in about['inputs']
  )
  programs = {
    name: jax_export.deserialize(bytearray(arrays[name].tobytes()))
    for name in ('program', 'program/condense', 'program/condensed')
    if name in arrays
  }
  dense = programs['program']
  structure = jax.tree_util.treedef_tuple(
    dense.in_tree.children()[0].children()[1:]  # type: ignore[attr-defined]
  )
  theta = jax.tree.map(jnp.asarray, _part(arrays, 'theta'))
  masks = jax.tree.map(jnp.asarray, trees.by_path(exported.masks))
  run = jax.jit(_checked(dense.call, inputs, structure))

  def masked(parameters: Params, *args: Any) -> Any:
    return run(masks_lib.apply_masks(*parameters), *args)

  forms = {
    'dense': Form(run, theta),
    'masked': Form(jax.jit(masked), (theta, masks)),
  }
  if 'program/condensed' in programs:
    call = _checked(programs['program/condensed'].call, inputs, structure)
    values = programs['program/condense'].call(theta)
    forms['condensed'] = Form(jax.jit(call), values)
  return Program(forms, inputs, exported, about['missing'], structure)


def _checked(
  call: Function, inputs: tuple[Input, ...], structure: Any
) -> Function:
  """The call, which refuses other arguments, when it is traced."""

  def checked(parameters: Params, *args: Any) -> Any:
    leaves, given = jax.tree.flatten(args)
    if given != structure:
      raise ValueError(
        f'the program takes arguments of structure {structure}, got {given}.'
      )
    for number, (leaf, known) in enumerate(zip(leaves, inputs, strict=True)):
      found = inputs_lib.of(jax.typeof(leaf))
      if not known.takes(found):
        raise ValueError(f'input {number} must be {known}, got {found}.')
    return call(parameters, *args)

  return checked
