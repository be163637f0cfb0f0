"""The leaves of a state in the form in which a checkpoint stores them.

Each leaf is stored under its name as an array that orbax takes: a typed PRNG
key as its data, and an array of booleans, such as a mask, as one bit an entry.
Leaves without entries are not stored. A description, which is JSON, says what
they are and how to turn them back; a template of the state says where to.
"""

import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks, trees
from powerprop_jax.core.trees import Static, Tree
from powerprop_jax.files.tables import Row


class MismatchError(Exception):
  """A checkpoint that is intact, but of another state than the template."""


def to_stored(state: Tree) -> Row:
  """The leaves of a state by name, as they are stored; bits lie on the host.

  Example:
    >>> to_stored({'masks': np.array([True, False, True]), 'none': np.ones(0)})
    {"['masks']": array([160], dtype=uint8)}
  """

  def stored(leaf: Any) -> Any:
    if _is_key(leaf):
      return jax.random.key_data(leaf)
    if leaf.dtype == bool and leaf.ndim:
      return masks.pack_masks(_whole(leaf)).bits
    return leaf

  return {name: stored(x) for name, x in _named(state).items() if x.size}


def _whole(leaf: Any) -> Any:
  """All of an array, on every host, whatever the devices it lies on."""
  if getattr(leaf, 'is_fully_addressable', True):
    return leaf
  return multihost_utils.process_allgather(leaf, tiled=True)


def unpacked(arrays: Row, described: Row) -> Row:
  """Undoes to_stored, on the host, by what describe says; of keys their data.

  Example:
    >>> state = {'masks': np.array([True, False, True])}
    >>> unpacked(to_stored(state), describe(state))
    {"['masks']": array([ True, False,  True])}
  """

  def entries(name: str, kind: str, shape: list[int]) -> Any:
    if 0 in shape:
      return np.zeros(shape, jnp.dtype(kind))
    if kind == 'bool' and shape:
      packed = masks.PackedMask(arrays[name], np.array(shape))
      return np.asarray(masks.unpack_masks(packed))
    return arrays[name]

  return {
    name: entries(name, leaf['type'], leaf['shape'])
    for name, leaf in described.items()
  }


def placed(leaves: Row, template: Tree) -> Any:
  """A state of JAX arrays in memory of their own, which may be donated.

  The leaves are as from unpacked; the shardings of the template are followed.
  """

  def place(value: Any, leaf: Any) -> jax.Array:
    sharding = _sharding(leaf)
    # A copy: NumPy's memory must not become a buffer that is donated later.
    array: jax.Array
    if sharding is not None and not sharding.is_fully_addressable:
      # device_put cannot, from memory of this host to devices of others.
      array = jax.make_array_from_callback(
        np.shape(value), sharding, lambda index: jnp.array(value[index])
      )
      sharding = None
    else:
      array = jnp.array(value)
    if _is_key(leaf):
      # key_impl, the public name for this, does not take a shape.
      array = jax.random.wrap_key_data(array, impl=leaf.dtype._impl.name)
    return array if sharding is None else jax.device_put(array, sharding)

  found = [place(leaves[name], x) for name, x in _named(template).items()]
  return jax.tree.unflatten(jax.tree.structure(template), found)


def describe(tree: Tree) -> dict[str, Row]:
  """Type and shape of each leaf of a state, or of its shapes, by name.

  Example:
    >>> describe({'masks': np.array([True, False, True])})
    {"['masks']": {'type': 'bool', 'shape': [3]}}
  """
  return {
    name: {'type': str(leaf.dtype), 'shape': list(leaf.shape)}
    for name, leaf in _named(tree).items()
  }


def describe_static(tree: Tree) -> Row:
  """What must agree although it is no leaf: α, and how it was made.

  The values of its Static parts by name, made of what JSON holds; instead of a
  predicate, such as select, the names of the leaves that it chooses.

  Example:
    >>> describe_static({'alpha': Static(2.0), 'w': np.ones(3)})
    {"['alpha']": 2.0}
  """
  is_static = lambda node: isinstance(node, Static)
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_static)
  return {
    jax.tree_util.keystr(path): (
      _chosen(node.value, tree) if callable(node.value) else node.value
    )
    for path, node in nodes
    if is_static(node)
  }


def _chosen(select: Any, tree: Tree) -> list[str]:
  """Names of the leaves that a predicate chooses, wherever in a state they lie.

  Predicates know the names within the parameters: any end of a path may be one.
  """
  chosen = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    ends = (trees.leaf_name(path[i:]) for i in range(len(path)))
    # Other leaves than parameters may be nothing that it can look at.
    with contextlib.suppress(Exception):
      if any(select(*name, leaf) for name in ends):
        chosen.append(jax.tree_util.keystr(path))
  return chosen


def check_same(leaves: Row, static: Row, template: Tree) -> None:
  """Raises a MismatchError if a checkpoint is not of the template's state.

  It names the first part or leaf that differs. The static parts come first, as
  the leaves may follow from them.
  """
  needed = describe_static(template)
  for name in static | needed:
    old, new = (found.get(name, 'not there') for found in (static, needed))
    if old == new:
      continue
    if isinstance(old, list) and isinstance(new, list):
      old, new = (
        ', '.join(sorted(set(a) - set(b))) or 'no leaf that is not'
        for a, b in ((old, new), (new, old))
      )
      raise MismatchError(f'its {name} chose {old}, here it chooses {new}')
    raise MismatchError(f'its {name} was {old}, here it is {new}')
  show = lambda leaf: f'{leaf["type"]}{leaf["shape"]}'
  here = describe(template)
  for name, leaf in here.items():
    if name not in leaves:
      raise MismatchError(f'it has no leaf {name}')
    if leaves[name] != leaf:
      raise MismatchError(
        f'its leaf {name} is {show(leaves[name])}, needed is {show(leaf)}'
      )
  for name in leaves:
    if name not in here:
      raise MismatchError(f'it has the leaf {name}, which is not needed')


def _named(tree: Tree) -> Row:
  """The leaves as arrays, by name, in the order of jax.tree.leaves."""
  return {
    jax.tree_util.keystr(path) or 'value': (
      leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """Where a restored leaf goes; None is the default device, uncommitted."""
  is_placed = getattr(leaf, 'committed', True)
  return getattr(leaf, 'sharding', None) if is_placed else None
