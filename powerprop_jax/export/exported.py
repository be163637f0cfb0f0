"""A trained network as files hold it: parameters, masks, state, description."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row

Array = np.ndarray[Any, Any]


class Exported(NamedTuple):
  """A trained network: trees of named arrays, in any containers.

  A file holds them by name, as {module: {name: array}}; restored puts them into
  the containers that they came from.
  """

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
  theta, masks, net_state = (
    by_module(part, tree) for part, tree in parts(exported).items()
  )
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  for leaf in trees.named_leaves(masks):
    if leaf.value.dtype != bool:
      raise ValueError(
        f'masks must be boolean; that of {leaf.path!r} is {leaf.value.dtype}.'
      )
  theta = {
    module: {
      name: _masked(x, masks[module][name]) for name, x in leaves.items()
    }
    for module, leaves in theta.items()
  }
  about = json_files.to_json(exported.about, 'about')
  return Exported(theta, masks, net_state, about)


def by_module(part: str, tree: Tree) -> dict[str, dict[str, Array]]:
  """Any tree of arrays as {module: {name: array}}, by the names of its leaves.

  Example:
    >>> by_module('theta', {'enc': {'fc': {'w': jnp.ones(2)}}})
    {'enc/fc': {'w': array([1., 1.], dtype=float32)}}
  """
  trees.check_arrays(tree, part)
  found: dict[str, dict[str, Array]] = {}
  for leaf in trees.named_leaves(tree):
    if leaf.name in found.get(leaf.module_name, {}):
      raise ValueError(f'{part} has two leaves that are called {leaf.path!r}.')
    put(found, leaf.path, np.asarray(leaf.value))
  return found


def restored(tree: Tree, like: Tree) -> Tree:
  """Arrays of a file in the containers that they were exported from.

  The names and shapes of the leaves say which is which.

  Example:
    >>> like = {'enc': {'fc': {'w': jnp.zeros(2)}}}
    >>> restored({'enc/fc': {'w': np.ones(2)}}, like)
    {'enc': {'fc': {'w': Array([1., 1.], dtype=float32)}}}
  """
  held = trees.by_path(tree)
  missing = {leaf.path for leaf in trees.named_leaves(like)} ^ held.keys()
  if missing:
    raise ValueError(
      'the file and the tree differ in their leaves; in one of them alone: '
      f'{", ".join(sorted(missing))}.'
    )
  found = trees.map_leaves(lambda leaf: jnp.asarray(held[leaf.path]), like)
  masks_lib.check_same_shapes(like, found, 'the tree', 'the file')
  return found


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
