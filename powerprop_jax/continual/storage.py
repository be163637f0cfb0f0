"""A network with its tasks as a flat dictionary of NumPy arrays, and back.

    np.savez(path, **to_arrays(state))
    state = from_arrays(np.load(path), init_pack(tx, theta, net_state, config))

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
from powerprop_jax.continual.state import PackedTask, PackState, TaskReport
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.masks import PackedMask
from powerprop_jax.core.trees import Tree

Array = np.ndarray[Any, Any]
_FORMAT = 1


def to_arrays(state: PackState) -> dict[str, Array]:
  """Everything that a network with its tasks is, for np.savez or a checkpoint.

  Args:
    state: as from learn, after any task.

  Returns:
    NumPy arrays by name. 'meta' is UTF-8 text, JSON: the layout, α and the
    reports of the tasks.

  Example:
    >>> from powerprop_jax.continual import _example
    >>> arrays = to_arrays(_example.packed())
    >>> arrays['tasks/0/masks/linear/w']      # one bit a weight: 01
    array([64], dtype=uint8)
  """
  meta = {
    'format': _FORMAT,
    'layout': _as_json(dataclasses.asdict(state.layout)),
    'alphas': state_lib.alphas(state.power),
    'tasks': [task.report._asdict() for task in state.tasks],
  }
  arrays = {
    'meta': np.frombuffer(json.dumps(meta).encode(), np.uint8).copy(),
    **_named('phi', state.phi),
    **_named('net_state', state.net_state),
    **{
      f'protected/{path}': masks_lib.pack_masks(mask).bits
      for path, mask in state_lib.leaves_by_path(state.protected).items()
    },
    **{f'initial/{path}': np.asarray(x) for path, x in state.initial.items()},
    **{f'scale/{path}': np.asarray(x) for path, x in state.scale.items()},
  }
  for i, task in enumerate(state.tasks):
    arrays |= {f'tasks/{i}/masks/{p}': m.bits for p, m in task.masks.items()}
    arrays |= {f'tasks/{i}/private/{p}': x for p, x in task.private.items()}
    if task.net_state is not None:
      arrays |= _named(f'tasks/{i}/net_state', task.net_state)
  return arrays


def from_arrays(arrays: Mapping[str, Any], template: PackState) -> PackState:
  """Undoes to_arrays; learning goes on as if it had never stopped.

  Args:
    arrays: as from to_arrays, or the file that np.load opens.
    template: init_pack of the same network, optimiser and configuration; what
      values it holds does not matter.

  Returns:
    The state that was stored, with the optimiser of the template.

  Raises:
    ValueError: if arrays are missing or damaged, or belong to a network with
      other leaves, another α or another configuration.

  Example:
    >>> from powerprop_jax.continual import _example
    >>> state = _example.packed()
    >>> empty = dataclasses.replace(state, tasks=())
    >>> from_arrays(to_arrays(state), empty).task_ids
    ('first',)
  """
  meta = _checked_meta(arrays, template)
  tasks = tuple(
    _restored_task(arrays, i, report, template)
    for i, report in enumerate(meta['tasks'])
  )
  protected = {
    path: _unpacked(arrays, f'protected/{path}', mask.shape)
    for path, mask in state_lib.leaves_by_path(template.protected).items()
  }
  on_device = lambda tree: jax.tree.map(jnp.array, tree)
  return dataclasses.replace(
    template,
    phi=on_device(_restored(arrays, 'phi', template.phi)),
    net_state=on_device(_restored(arrays, 'net_state', template.net_state)),
    protected=on_device(state_lib.with_leaves(template.protected, protected)),
    initial=on_device(_restored_leaves(arrays, 'initial', template.initial)),
    scale=on_device(_restored_leaves(arrays, 'scale', template.scale)),
    tasks=tasks,
  )


def _restored_task(
  arrays: Mapping[str, Any],
  index: int,
  report: dict[str, Any],
  template: PackState,
) -> PackedTask:
  layout, phi = template.layout, state_lib.leaves_by_path(template.phi)
  folder = f'tasks/{index}'
  trials = tuple((density, score) for density, score in report['trials'])
  masks = {}
  for path in layout.shared:
    shape = phi[path].shape
    bits = _get(arrays, f'{folder}/masks/{path}')
    masks[path] = PackedMask(bits, np.array(shape, np.int64))
    _unpacked(arrays, f'{folder}/masks/{path}', shape)  # only to check
  private = {path: phi[path] for path in layout.stored}
  net_state = None
  if layout.private == 'per_task':
    net_state = _restored(arrays, f'{folder}/net_state', template.net_state)
  return PackedTask(
    TaskReport(**{**report, 'trials': trials}),
    masks,
    _restored_leaves(arrays, f'{folder}/private', private),
    net_state,
  )


def _checked_meta(
  arrays: Mapping[str, Any], template: PackState
) -> dict[str, Any]:
  """What was stored beside the arrays, if it fits the template."""
  text = np.asarray(_get(arrays, 'meta'), np.uint8).tobytes()
  meta: dict[str, Any] = json.loads(text)
  if meta['format'] != _FORMAT:
    raise ValueError(
      f'the arrays are in format {meta["format"]}, this version reads '
      f'{_FORMAT}. Load them with the version that wrote them.'
    )
  here = {
    'layout': _as_json(dataclasses.asdict(template.layout)),
    'alphas': state_lib.alphas(template.power),
  }
  for name, value in here.items():
    if meta[name] != value:
      raise ValueError(
        f'the arrays were stored with {name} {meta[name]}, but the template '
        f'has {value}. Build it with the same network, optimiser and '
        'configuration.'
      )
  return meta


def _as_json(value: Any) -> Any:
  """The value as it would be read back: lists for tuples."""
  return json.loads(json.dumps(value))


def _named(folder: str, tree: Tree) -> dict[str, Array]:
  leaves = state_lib.leaves_by_path(tree)
  return {f'{folder}/{path}': np.asarray(x) for path, x in leaves.items()}


def _restored(arrays: Mapping[str, Any], folder: str, template: Tree) -> Tree:
  leaves = state_lib.leaves_by_path(template)
  return state_lib.with_leaves(
    template, _restored_leaves(arrays, folder, leaves)
  )


def _restored_leaves(
  arrays: Mapping[str, Any], folder: str, leaves: Mapping[str, Any]
) -> dict[str, Array]:
  restored = {}
  for path, leaf in leaves.items():
    array = np.asarray(_get(arrays, f'{folder}/{path}'))
    # np.savez keeps the bytes of bfloat16, but not its name.
    if array.dtype.kind == 'V' and array.dtype.itemsize == leaf.dtype.itemsize:
      array = array.view(leaf.dtype)
    if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
      raise ValueError(
        f'{folder}/{path} was stored as {array.dtype} {array.shape}, but the '
        f'template has {leaf.dtype} {leaf.shape}. Build it with the same '
        'network.'
      )
    restored[path] = array
  return restored


def _unpacked(
  arrays: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> Array:
  packed = PackedMask(_get(arrays, name), np.array(shape, np.int64))
  try:
    mask: Array = masks_lib.unpack_masks(packed)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  return mask


def _get(arrays: Mapping[str, Any], name: str) -> Any:
  if name not in arrays:
    raise ValueError(
      f'{name!r} is missing from the arrays. Load all of what to_arrays '
      'returned, and build the template with the same configuration.'
    )
  return arrays[name]
