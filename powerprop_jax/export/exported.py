"""A trained network as files hold it: parameters, masks, state, description."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row

Array = np.ndarray[Any, Any]


class Exported(NamedTuple):
  """A trained network; theta is {module: {name: array}}, as Haiku has it."""

  theta: Params
  masks: Tree
  net_state: Tree
  about: Row  # Settings, step, scores: what json_files.to_json takes.


def parts(exported: Exported) -> Mapping[str, Tree]:
  """The three trees by name: theta, masks, net_state."""
  return {
    'theta': exported.theta,
    'masks': exported.masks,
    'net_state': exported.net_state,
  }


def on_host(exported: Exported) -> Exported:
  """The network as NumPy arrays and JSON, with zeros where no connection is.

  What a mask removes becomes zero, whatever its value: the file is of θ ⊙ M.
  Dtypes are kept; what a file cannot hold is refused.

  Example:
    >>> theta, masks = {'a': {'w': jnp.ones(2)}}, {'a': {'w': np.eye(2)[0] > 0}}
    >>> on_host(Exported(theta, masks, {}, {})).theta
    {'a': {'w': array([1., 0.], dtype=float32)}}
  """
  for part, tree in parts(exported).items():
    _check_form(part, tree)
  theta, masks, net_state, about = exported
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  masks = _as_arrays(masks)
  for leaf in trees.named_leaves(masks):
    if leaf.value.dtype != bool:
      raise ValueError(
        f'masks must be boolean; that of {leaf.path!r} is {leaf.value.dtype}.'
      )
  theta = {
    module: {
      name: _masked(x, masks[module][name]) for name, x in leaves.items()
    }
    for module, leaves in _as_arrays(theta).items()
  }
  about = json_files.to_json(about, 'about')
  return Exported(theta, masks, _as_arrays(net_state), about)


def _check_form(part: str, tree: Tree) -> None:
  two_levels = isinstance(tree, Mapping) and all(
    isinstance(leaves, Mapping)
    and not any(isinstance(x, (Mapping, tuple, list)) for x in leaves.values())
    and not any('/' in name for name in leaves)
    for leaves in tree.values()
  )
  if not two_levels:
    raise ValueError(
      f'{part} must be {{module: {{name: array}}}}, as Haiku has it, and names '
      "without '/'."
    )


def _as_arrays(tree: Tree) -> dict[str, dict[str, Array]]:
  return {
    module: {name: np.asarray(x) for name, x in leaves.items()}
    for module, leaves in tree.items()
  }


def _masked(x: Array, mask: Array) -> Array:
  return x if mask.all() else np.where(mask, x, np.zeros((), x.dtype))


def put(tree: dict[str, dict[str, Array]], path: str, value: Array) -> None:
  """Adds the leaf 'module/name' to a tree."""
  module, _, name = path.rpartition('/')
  tree.setdefault(module, {})[name] = value


def dense_bytes(theta: Params) -> int:
  """Bytes of the parameters, stored whole as float32.

  Example:
    >>> dense_bytes({'linear': {'w': jnp.zeros((4, 2)), 'b': jnp.zeros(2)}})
    40
  """
  return 4 * sum(int(np.size(x.value)) for x in trees.named_leaves(theta))
