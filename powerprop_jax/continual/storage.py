"""A network with its tasks as a flat dictionary of NumPy arrays, and back.

    np.savez(path, **to_arrays(state))
    state = from_arrays(np.load(path), init_pack(tx, theta, net_state, method))

Masks are stored as one bit a weight. What is code, the optimiser and ψ, is not
stored: it comes from the freshly built state.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual.search import Trial
from powerprop_jax.continual.state import PackedTask, PackState, TaskReport
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.masks import PackedMask
from powerprop_jax.core.trees import NamedLeaf, Tree

# By name, as in a dictionary or in what np.load opens.
Arrays = Mapping[str, np.ndarray]
_FORMAT = 1


def to_arrays(state: PackState) -> dict[str, np.ndarray]:
  """Everything that a network with its tasks is, for np.savez or a checkpoint.

  'meta' is UTF-8 text, JSON: the layout, α and the reports of the tasks.

  Example:
    >>> arrays = to_arrays(packed)
    >>> arrays['tasks/0/masks/linear/w']      # one bit a weight: 01
    array([64], dtype=uint8)
  """
  meta = {
    'format': _FORMAT,
    **_described(state),
    'tasks': [task.report._asdict() for task in state.tasks],
  }
  text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
  return {'meta': text, **by_name(_stored(state))}


def from_arrays(arrays: Arrays, template: PackState) -> PackState:
  """Undoes to_arrays; learning goes on as if it had never stopped.

  Args:
    arrays: as from to_arrays, or the file that np.load opens.
    template: init_pack of the same network, optimiser and layout; what values
      it holds does not matter.

  Raises:
    ValueError: if arrays are missing or damaged, or belong to a network with
      other leaves, another α or another layout.

  Example:
    >>> empty = dataclasses.replace(packed, tasks=())
    >>> from_arrays(to_arrays(packed), empty).task_ids
    ('first',)
  """
  meta = json.loads(np.asarray(_get(arrays, 'meta'), np.uint8).tobytes())
  if meta['format'] != _FORMAT:
    raise ValueError(
      f'the arrays are in format {meta["format"]}, this version reads '
      f'{_FORMAT}. Load them with the version that wrote them.'
    )
  for name, value in _described(template).items():
    # As it would be read back: lists for tuples.
    if meta[name] != json.loads(json.dumps(value)):
      raise ValueError(
        f'the arrays were stored with {name} {meta[name]}, but the template '
        f'has {value}. Build it with the same network, optimiser and layout.'
      )
  layout, phi = template.layout, trees.by_path(template.phi)
  shapes = {path: phi[path].shape for path in layout.shared}
  empty = {path: np.zeros(shape, bool) for path, shape in shapes.items()}
  task_like = {
    'masks': {p: masks_lib.pack_masks(mask).bits for p, mask in empty.items()},
    'private': {path: phi[path] for path in layout.stored},
    'net_state': template.net_state if layout.private == 'per_task' else None,
  }
  like = {**_stored(template), 'tasks': [task_like] * len(meta['tasks'])}
  found = restored(arrays, like)
  tasks = tuple(
    PackedTask(
      _report(report),
      {
        path: _mask(bits, shapes[path]) for path, bits in x.pop('masks').items()
      },
      **x,
    )
    for report, x in zip(meta['tasks'], found.pop('tasks'), strict=True)
  )
  protected = masks_lib.unpack_masks(
    jax.tree.map(
      lambda bits, p: _mask(bits, p.shape), found['protected'], template.phi
    )
  )
  on_device = jax.tree.map(jnp.array, {**found, 'protected': protected})
  return dataclasses.replace(template, **on_device, tasks=tasks)


def _report(fields: dict[str, Any]) -> TaskReport:
  trials = tuple(Trial(*trial) for trial in fields['trials'])
  return TaskReport(**{**fields, 'trials': trials})


def _mask(bits: np.ndarray, shape: tuple[int, ...]) -> PackedMask:
  return PackedMask(bits, np.array(shape, np.int64))


def _described(state: PackState) -> dict[str, Any]:
  """What must be the same where arrays are loaded."""
  return {
    'layout': dataclasses.asdict(state.layout),
    'alphas': state_lib.alphas(state.power),
  }


def _stored(state: PackState) -> dict[str, Tree]:
  """The arrays of a network with its tasks, as a tree."""
  return {
    'phi': state.phi,
    'net_state': state.net_state,
    'protected': jax.tree.map(
      lambda mask: masks_lib.pack_masks(mask).bits, state.protected
    ),
    'initial': state.initial,
    'scale': state.scale,
    'tasks': [
      {
        'masks': {path: mask.bits for path, mask in task.masks.items()},
        'private': task.private,
        'net_state': task.net_state,
      }
      for task in state.tasks
    ],
  }


def by_name(tree: Tree) -> dict[str, np.ndarray]:
  """The leaves of any tree as NumPy arrays, by their paths.

  Example:
    >>> by_name({'heads': [{'w': 2.0}]})
    {'heads/0/w': array(2.)}
  """
  return {path: np.asarray(leaf) for path, leaf in trees.by_path(tree).items()}


def restored(arrays: Arrays, like: Tree) -> Tree:
  """Undoes by_name, for a tree like another; other arrays are passed over.

  Example:
    >>> restored({'heads/0/w': np.array(2.0)}, {'heads': [{'w': np.ones(())}]})
    {'heads': [{'w': array(2.)}]}
  """

  def visit(leaf: NamedLeaf) -> np.ndarray:
    array, dtype = np.asarray(_get(arrays, leaf.path)), leaf.value.dtype
    # np.savez keeps the bytes of bfloat16, but not its name.
    if array.dtype.kind == 'V' and array.dtype.itemsize == dtype.itemsize:
      array = array.view(dtype)
    if (array.shape, array.dtype) != (leaf.value.shape, dtype):
      raise ValueError(
        f'{leaf.path} was stored as {array.dtype} {array.shape}, but the '
        f'template has {dtype} {leaf.value.shape}. Build it with the same '
        'network.'
      )
    return array

  return trees.map_leaves(visit, like)


def _get(arrays: Arrays, name: str) -> np.ndarray:
  if name not in arrays:
    raise ValueError(
      f'{name!r} is missing from the arrays. Load all of what to_arrays '
      'returned, and build the template with the same layout.'
    )
  return arrays[name]
