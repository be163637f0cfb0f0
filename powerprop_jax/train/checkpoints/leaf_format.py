"""The leaves of a state in the form in which a checkpoint stores them.

Each leaf is stored under its name as an array that orbax takes: a typed PRNG
key as its data, and an array of booleans, such as a mask, as one bit an entry.
Leaves without entries are not stored. The template of the state tells how to
turn them back.
"""

import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp

from powerprop_jax.core import masks, trees
from powerprop_jax.core.trees import Static, Tree
from powerprop_jax.files.tables import Row


class MismatchError(Exception):
  """A checkpoint that is intact, but of another state than the template."""


def to_stored(state: Tree) -> Row:
  """The leaves of a state by name, as they are stored.

  Args:
    state: any tree of arrays.

  Returns:
    Arrays by name; booleans as uint8 vectors on the host, which are new.

  Example:
    >>> to_stored({'masks': np.array([True, False, True]), 'none': np.ones(0)})
    {"['masks']": array([160], dtype=uint8)}
  """

  def stored(leaf: Any) -> Any:
    if _is_key(leaf):
      return jax.random.key_data(leaf)
    return masks.pack_masks(_whole(leaf)).bits if _is_packable(leaf) else leaf

  return {name: stored(x) for name, x in _named(state).items() if x.size}


def _whole(leaf: Any) -> Any:
  """All of an array, on every host, whatever the devices it lies on."""
  if getattr(leaf, 'is_fully_addressable', True):
    return leaf
  return multihost_utils.process_allgather(leaf, tiled=True)


def from_stored(arrays: Row, template: Tree, is_packed: bool) -> Any:
  """Undoes to_stored.

  Args:
    arrays: what was stored, by name.
    template: the state, or its shapes; its shardings are followed.
    is_packed: whether booleans were stored as bits.

  Returns:
    The state, of JAX arrays in memory of their own, which may be donated.

  Example:
    >>> template = {'masks': np.array([True, False, True])}
    >>> from_stored(to_stored(template), template, is_packed=True)
    {'masks': Array([ True, False,  True], dtype=bool)}
  """

  def restored(name: str, leaf: Any) -> jax.Array:
    if not leaf.size:
      return jnp.zeros(leaf.shape, leaf.dtype)
    value = arrays[name]
    if is_packed and _is_packable(leaf):
      packed = masks.PackedMask(value, np.array(leaf.shape))
      value = masks.unpack_masks(packed)
    if isinstance(value, jax.Array):
      return value
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

  leaves = [restored(name, leaf) for name, leaf in _named(template).items()]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


def restore_args(template: Tree, is_packed: bool) -> dict[str, ocp.RestoreArgs]:
  """How orbax is to restore each stored leaf.

  Args:
    template: the state, or its shapes.
    is_packed: whether booleans were stored as bits.

  Returns:
    Arguments by name: to the host what is to be turned into something else.
  """

  def how(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    is_other = _is_key(leaf) or (is_packed and _is_packable(leaf))
    if sharding is None or is_other:
      return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)

  return {name: how(x) for name, x in _named(template).items() if x.size}


def describe(tree: Tree) -> dict[str, Row]:
  """What must agree between a checkpoint and a template, for each leaf.

  Args:
    tree: a state, or its shapes.

  Returns:
    Type and shape of each leaf by name, whatever the form it is stored in.

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

  Args:
    tree: a state, or its shapes.

  Returns:
    The values of its Static parts by name, made of what JSON holds; instead of
    a predicate, such as select, the names of the leaves that it chooses.

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


def check_same_static(saved: Row, template: Tree) -> None:
  """Refuses a checkpoint of a state that was made in another way.

  Args:
    saved: description of the static parts of the state that was saved.
    template: the state that is wanted, or its shapes.

  Raises:
    MismatchError: naming the part and both values.
  """
  wanted = describe_static(template)
  for name in saved | wanted:
    old, new = (found.get(name, 'not there') for found in (saved, wanted))
    if old == new:
      continue
    if isinstance(old, list) and isinstance(new, list):
      old, new = (
        ', '.join(sorted(set(a) - set(b))) or 'no leaf that is not'
        for a, b in ((old, new), (new, old))
      )
      raise MismatchError(f'its {name} chose {old}, here it chooses {new}')
    raise MismatchError(f'its {name} was {old}, here it is {new}')


def check_same(saved: Row, template: Tree) -> None:
  """Refuses a checkpoint of another state than the template.

  Args:
    saved: description of the state that was saved.
    template: the state that is wanted, or its shapes.

  Raises:
    MismatchError: naming the first leaf that differs.
  """
  show = lambda leaf: f'{leaf["type"]}{leaf["shape"]}'
  wanted = describe(template)
  for name, leaf in wanted.items():
    if name not in saved:
      raise MismatchError(f'it has no leaf {name}')
    if saved[name] != leaf and not _is_key_and_data(saved[name], leaf):
      raise MismatchError(
        f'its leaf {name} is {show(saved[name])}, needed is {show(leaf)}'
      )
  for name in saved:
    if name not in wanted:
      raise MismatchError(f'it has the leaf {name}, which is not needed')


def _is_key_and_data(saved: Row, leaf: Row) -> bool:
  """Whether a typed key was saved, as it once was, where its data are wanted.

  Both are stored as the same numbers.
  """
  return saved == {'type': 'key<fry>', 'shape': []} and leaf == {
    'type': 'uint32',
    'shape': [2],
  }


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


def _is_packable(leaf: Any) -> bool:
  return leaf.dtype == bool and leaf.ndim > 0


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """Where a restored leaf goes; None is the default device, uncommitted."""
  is_placed = getattr(leaf, 'committed', True)
  return getattr(leaf, 'sharding', None) if is_placed else None
