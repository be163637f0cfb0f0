"""Mask trees: which connections exist.

A mask tree has the structure and the shapes of the parameters; True means that
the connection exists. A leaf that is never pruned is all True, so that no
function needs a special case.
"""

from collections.abc import Callable, Iterable
import decimal
import math
import numbers
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Select, Tree

# Booleans of the structure and shapes of φ: True for a connection that exists.
Masks: TypeAlias = Tree

_INT32_END = 2**31


def num_kept(size: int, sparsity: float) -> int:
  """Number of weights left when floor(size * sparsity) of them are removed.

  The one place that turns a sparsity into a count. The sparsity is read as the
  decimal that it prints as: 0.29 of 100 weights are 29, although the product of
  the floats is below 29. 1/3 of 3 weights is one. At sparsity 0 all weights are
  left; at least one is left of any layer that has weights.

  Example:
    >>> num_kept(100, 0.29)
    71
    >>> num_kept(17, 0.9), num_kept(1, 0.9)
    (2, 1)
    >>> num_kept(100, 1 - 0.9)
    90
  """
  check_sparsity(sparsity)
  if size < 0:
    raise ValueError(f'size must be at least 0, got {size}.')
  # str of a NumPy scalar gives its shortest decimal: 0.1 for np.float32(0.1).
  # A 1e-12 more, which changes no count of fewer than 1e12 weights, reads
  # 1 - 0.9 as 0.1 and 0.3333333333333333 as a third.
  share = decimal.Decimal(str(sparsity)) + decimal.Decimal('1e-12')
  return max(size - math.floor(share * size), min(size, 1))


def density_to_sparsity(density: float, name: str = 'densities') -> float:
  """1 - density as people write it: 0.9, not 0.09999999999999998, for 0.1.

  The one door for shares of weights to keep, in (0, 1], which messages call by
  their name.

  Example:
    >>> density_to_sparsity(0.05)
    0.95
  """
  if not 0 <= round(1 - density, 12) < 1:
    raise ValueError(
      f'{name} are shares of weights to keep, in (0, 1], got {density:g}. A '
      'sparsity of 0.9 is a share of 0.1.'
    )
  return round(1 - density, 12)


def check_sparsity(sparsity: float, name: str = 'sparsity') -> None:
  """Refuses a share of zeros outside [0, 1), NaN included, by its name.

  Example:
    >>> check_sparsity(1.0)
    Traceback (most recent call last):
      ...
    ValueError: sparsity must be in [0, 1), got 1.0.
  """
  if not isinstance(sparsity, numbers.Real) and not hasattr(sparsity, 'dtype'):
    raise TypeError(f'{name} must be a number in [0, 1), got {sparsity!r}.')
  if not 0 <= sparsity < 1:
    raise ValueError(f'{name} must be in [0, 1), got {sparsity}.')


def check_boolean(masks: Masks) -> None:
  """Refuses masks of numbers.

  Example:
    >>> check_boolean({'w': jnp.ones(2)})
    Traceback (most recent call last):
      ...
    TypeError: masks must be boolean, leaf 'w' is float32. Write masks != 0 if
    they are numbers.
  """
  for path, leaf in trees.by_path(masks).items():
    if jnp.result_type(leaf) != jnp.bool_:
      raise TypeError(
        f'masks must be boolean, leaf {path!r} is '
        f'{jnp.result_type(leaf).name}. Write masks != 0 if they are numbers.'
      )


def full_masks(tree: Tree) -> Masks:
  """All True, with the shapes and shardings of parameters or their shapes.

  Example:
    >>> full_masks({'b': jnp.zeros(2)})
    {'b': Array([ True,  True], dtype=bool)}
  """
  return jax.tree.map(lambda x: jnp.ones_like(x, dtype=bool), tree)


def apply_masks(tree: Tree, masks: Masks) -> Tree:
  """Zeroes the entries of a tree whose mask is False.

  A selection, not a product: dtypes are kept, and so is a zero where the tree
  has a NaN or an infinity.

  Example:
    >>> apply_masks(jnp.array([1., jnp.nan]), jnp.array([True, False]))
    Array([1., 0.], dtype=float32)
  """
  check_same_shapes(tree, masks, 'tree', 'masks')
  return jax.tree.map(
    lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, masks
  )


def intersect(a: Masks, b: Masks) -> Masks:
  """Connections in both a and b.

  Example:
    >>> intersect(jnp.array([True, True]), jnp.array([False, True]))
    Array([False,  True], dtype=bool)
  """
  return _combine(jnp.logical_and, a, b)


def union(a: Masks, b: Masks) -> Masks:
  """Connections in a, in b or in both.

  Example:
    >>> union(jnp.array([True, False]), jnp.array([False, False]))
    Array([ True, False], dtype=bool)
  """
  return _combine(jnp.logical_or, a, b)


def difference(a: Masks, b: Masks) -> Masks:
  """Connections in a that are not in b.

  Example:
    >>> difference(jnp.array([True, True]), jnp.array([False, True]))
    Array([ True, False], dtype=bool)
  """
  return _combine(lambda x, y: x & ~y, a, b)


def _combine(fn: Callable[..., jax.Array], a: Masks, b: Masks) -> Masks:
  check_same_shapes(a, b, 'a', 'b')
  return jax.tree.map(fn, a, b)


def density(masks: Masks, *, select: Select | None = None) -> jax.Array:
  """Share of connections that exist, in all leaves or those of select.

  A float32 scalar in [0, 1]; 1 for masks without entries.

  Example:
    >>> density({'w': jnp.array([True, False]), 'b': jnp.array([True, True])})
    Array(0.75, dtype=float32)
  """
  leaves = selected(masks, select).values()
  size = sum(leaf.size for leaf in leaves)
  return _share(_total(map(_count, leaves), size), size)


def sparsity(masks: Masks, *, select: Select | None = None) -> jax.Array:
  """Share of connections that do not exist, 1 - density.

  Example:
    >>> sparsity({'w': jnp.array([True, False]), 'b': jnp.array([True, True])})
    Array(0.25, dtype=float32)
  """
  return 1 - density(masks, select=select)


class Overlap(NamedTuple):
  """How alike two masks are.

  Attributes:
    agreement: share of entries that are equal in both, True or False; two
      independent masks of density q agree in q² + (1 - q)² of them.
    intersection: share of the connections of the first that the second has as
      well, which is the intersection over k if both keep k; 1 if the first has
      none. q for independent masks of density q.
  """

  agreement: jax.Array
  intersection: jax.Array


class Overlaps(NamedTuple):
  """Overlap of two mask trees.

  Attributes:
    total: of all leaves together, each entry counting once.
    leaves: of each leaf, by its 'module/name'.
  """

  total: Overlap
  leaves: dict[str, Overlap]


def overlap(a: Masks, b: Masks, *, select: Select | None = None) -> Overlaps:
  """How much of a is in b, per leaf and in total, in float32 scalars.

  For instance of the largest weights before and after training; of all leaves,
  or those of select.

  Example:
    >>> a = {'w': jnp.array([True, True, False, False])}
    >>> b = {'w': jnp.array([True, False, False, False])}
    >>> total = overlap(a, b).total
    >>> print(total.agreement, total.intersection)
    0.75 0.5
  """
  check_same_shapes(a, b, 'a', 'b')
  others = selected(b, select)
  counts = {
    path: tuple(map(_count, (leaf == others[path], leaf & others[path], leaf)))
    for path, leaf in selected(a, select).items()
  }
  sizes = {path: leaf.size for path, leaf in others.items()}
  size = sum(sizes.values())
  equal, both, kept = (
    _total((c[i] for c in counts.values()), size) for i in range(3)
  )
  return Overlaps(
    Overlap(_share(equal, size), _share(both, kept)),
    {
      path: Overlap(_share(c[0], sizes[path]), _share(c[1], c[2]))
      for path, c in counts.items()
    },
  )


class PackedMask(NamedTuple):
  """One mask in an eighth of its memory, for storage.

  Attributes:
    bits: NumPy uint8 vector, eight entries of the mask each, in flat order
      from the highest bit down; the last is filled up with zeros.
    shape: shape of the mask, NumPy int64 vector.
  """

  bits: np.ndarray[Any, Any]
  shape: np.ndarray[Any, Any]


def pack_masks(masks: Masks) -> Tree:
  """Masks with one bit a weight, on the host, to be stored.

  A tree with a PackedMask in place of each mask: NumPy arrays only, so that
  NumPy and orbax can save it.

  Example:
    >>> pack_masks({'w': jnp.array([True, False, True])})['w'].bits
    array([160], dtype=uint8)
  """
  return jax.tree.map(
    lambda m: PackedMask(
      np.packbits(np.asarray(m, bool)), np.array(np.shape(m), np.int64)
    ),
    masks,
  )


def unpack_masks(packed: Tree) -> Masks:
  """Masks as NumPy arrays, equal to those that pack_masks packed.

  Example:
    >>> unpack_masks(pack_masks({'w': jnp.array([True, False, True])}))['w']
    array([ True, False,  True])
  """

  def unpack(leaf: PackedMask) -> np.ndarray[Any, Any]:
    bits = np.asarray(leaf.bits, np.uint8)
    shape = tuple(int(length) for length in leaf.shape)
    size = math.prod(shape)
    if bits.size != -(-size // 8):
      raise ValueError(
        f'a mask of shape {shape} packs into {-(-size // 8)} bytes, got '
        f'{bits.size}. Store bits and shape of a leaf together.'
      )
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)

  is_packed = lambda node: isinstance(node, PackedMask)
  return jax.tree.map(unpack, packed, is_leaf=is_packed)


def check_same_shapes(a: Tree, b: Tree, a_name: str, b_name: str) -> None:
  """Raises a ValueError unless two trees have one structure and its shapes."""
  a_shapes, b_shapes = (
    {path: jnp.shape(leaf) for path, leaf in trees.by_path(tree).items()}
    for tree in (a, b)
  )
  for path in a_shapes | b_shapes:
    shapes = [s.get(path, 'nothing') for s in (a_shapes, b_shapes)]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'{a_name} and {b_name} must have the same structure and shapes; leaf '
        f'{path!r} is {shapes[0]} in {a_name} and {shapes[1]} in {b_name}.'
      )


def selected(masks: Masks, select: Select | None) -> dict[str, Any]:
  """Selected masks by 'module/name', in order; all of them without a select.

  The predicate is shown what it would be shown of floating-point parameters.

  Example:
    >>> selected({'a': {'w': jnp.ones((1, 1), bool)}}, select_lib.is_weight)
    {'a/w': Array([[ True]], dtype=bool)}
  """
  leaves = trees.by_path(masks)
  if select is None:
    return leaves
  parameters = jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(jnp.shape(m), jnp.float32), masks
  )
  return {
    path: leaves[path] for path in select_lib.selected(select, parameters)
  }


def _count(mask: jax.Array) -> jax.Array:
  """How many entries are True: int32, or float32 where that could overflow."""
  if mask.size < _INT32_END:
    return jnp.sum(mask, dtype=jnp.int32)
  axis = mask.shape.index(max(mask.shape))
  parts = jnp.array_split(mask, -(-mask.size // 2**30), axis)
  return _total((jnp.sum(part, dtype=jnp.int32) for part in parts), mask.size)


def _total(counts: Iterable[jax.Array], size: int) -> jax.Array:
  """Their sum, when it is at most size; likewise exact as long as that fits."""
  dtype = jnp.int32 if size < _INT32_END else jnp.float32
  return sum((c.astype(dtype) for c in counts), jnp.zeros([], dtype))


def _share(part: jax.Array, whole: int | jax.Array) -> jax.Array:
  """part / whole, 1 where both are 0."""
  part, whole = (
    jnp.float32(x) if isinstance(x, int) else x.astype(jnp.float32)
    for x in (part, whole)
  )
  return jnp.where(
    whole == 0, jnp.ones_like(part), part / jnp.maximum(whole, 1)
  )
