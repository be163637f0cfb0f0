"""Exact top-k masks by counting: no sort, no concatenation, no gather.

Floats are compared through integers of the same order. The k-th largest of them
is found two bits at a time: each round asks, in one pass over the scores, how
many lie at or above each of three candidates, and keeps the largest candidate
that still has k. Ties at the k-th largest are cut by the same search over flat
indices. Only counts travel between shards, a tree needs as many rounds as a
single array, and k can be traced.
"""

import functools
import math
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.core.top_k import counting
from powerprop_jax.core.trees import Tree

Count: TypeAlias = counting.Count

_MAX_SIZE = 2**31 - 4  # flat indices and the candidates above them fit int32
_NUM_ROWS = 64  # of a leaf when counted; enough to divide among CPU threads


def top_k_mask(
  scores: jax.typing.ArrayLike,
  k: Count,
  among: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Keeps exactly k entries of one array, the largest.

  Ties, of which -0.0 and 0.0 are one, go to the lowest flat index. NaN ranks
  below every number but can be kept when k asks for more than the numbers.

  Args:
    scores: float32, bfloat16 or float16, any shape, at most 2^31 - 4
      entries.
    k: how many to keep; an int, or an integer scalar that may be traced.
    among: booleans of the same shape; only entries where it is True are kept.

  Returns:
    Booleans of the same shape and sharding as scores. True at exactly k
    entries, or at all eligible ones where a traced k or among leaves fewer
    than k; a k below 0 counts as 0 under the same conditions, and is refused
    under others.

  Example:
    >>> top_k_mask(jnp.array([3., 1., 3., 2., 3.]), 2)
    Array([ True, False,  True, False, False], dtype=bool)
    >>> top_k_mask(jnp.array([3., 1., 3., 2.]), 2,
    ...            among=jnp.array([False, True, False, True]))
    Array([False,  True, False,  True], dtype=bool)
  """
  mask: jax.Array = top_k_masks(scores, k, among)
  return mask


def top_k_masks(scores: Tree, k: Count, among: Tree | None = None) -> Tree:
  """Keeps exactly k entries of a whole tree, the largest of all leaves.

  As top_k_mask, with one ranking over the tree: ties go to the earlier leaf in
  the order of jax.tree.leaves, then to the lower flat index.

  The leaves have at most 2^31 - 4 entries in all; their types may be mixed.

  Example:
    >>> masks = top_k_masks({'a': jnp.array([1., 4.]), 'b': jnp.array([4.])}, 1)
    >>> print(masks['a'], masks['b'])
    [False  True] [False]
  """
  leaves = jax.tree.leaves(scores)
  size = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
  _check(scores, leaves, k, among, size)
  if size == 0:
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), bool), scores)
  eligible = [None] * len(leaves) if among is None else jax.tree.leaves(among)
  if not isinstance(k, jax.Array):
    k = max(0, min(int(k), size))
  fused = all(map(counting.is_on_one_device, leaves))
  masks = _masks(leaves, jnp.asarray(k, jnp.int32), eligible, fused=fused)
  return jax.tree.unflatten(jax.tree.structure(scores), masks)


def _check(
  scores: Tree, leaves: list[Any], k: Count, among: Tree, size: int
) -> None:
  for leaf in leaves:
    counting.check_dtype(leaf)
  if size > _MAX_SIZE:
    raise ValueError(
      f'Top-k ranks at most {_MAX_SIZE:,} entries, got {size:,}. '
      'Rank the leaves in groups.'
    )
  if jnp.ndim(k) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
    raise TypeError(f'k must be an integer scalar, got {k!r}.')
  if among is None:
    if not isinstance(k, jax.Array) and not 0 <= k <= size:
      raise ValueError(f'k must be in [0, size = {size:,}], got {k}.')
    return
  structures: list[Any] = [jax.tree.structure(x) for x in (scores, among)]
  if structures[0] != structures[1]:
    raise ValueError('among must have the tree structure of scores.')
  for leaf, eligible in zip(leaves, jax.tree.leaves(among), strict=True):
    counting.check_among(leaf, eligible)


@functools.partial(jax.jit, static_argnames='fused')
def _masks(
  scores: list[jax.Array],
  k: jax.Array,
  among: list[jax.Array | None],
  *,
  fused: bool,
) -> list[jax.Array]:
  """Top-k masks of leaves; fused counting is only for leaves without shards."""
  scores = [lax.stop_gradient(leaf) for leaf in scores]
  shapes = [leaf.shape for leaf in scores]
  if fused:  # one axis has an index that takes less to compile
    scores, among = jax.tree.map(jnp.ravel, (scores, among))
  size = sum(leaf.size for leaf in scores)
  k = jnp.clip(k, 0, size)
  zero_bits = min(counting.ZERO_BITS[leaf.dtype.name] for leaf in scores)
  count = _count_rows if fused else _count

  # The barriers keep XLA from moving keys and indices out of the loops: storing
  # them takes longer than computing them again in every pass, and more memory.
  def count_keys(candidates: list[jax.Array]) -> list[jax.Array]:
    leaves, eligible, candidates = lax.optimization_barrier(
      (scores, among, candidates)
    )
    return count(_all_keys(leaves, eligible), candidates)

  value, reached = counting.search(
    count_keys, k, counting.INELIGIBLE, size, 32, zero_bits
  )

  # Scores above the value are kept. Of those at the value, as many as there is
  # room for: if not all of them, a second search finds where to stop.
  def count_ranks(candidates: list[jax.Array]) -> list[jax.Array]:
    leaves, eligible, last, candidates = lax.optimization_barrier(
      (scores, among, jnp.asarray(size - 1, jnp.int32), candidates)
    )
    return count(_ranks(leaves, eligible, value, last), candidates)

  # With fewer than k eligible scores, all of them are kept.
  k = jnp.where(value == counting.INELIGIBLE, reached, k)
  cut, _ = counting.search(count_ranks, k, 0, reached, size.bit_length(), 0)
  ranks = _ranks(scores, among, value, jnp.asarray(size - 1, jnp.int32))
  masks = [
    leaf >= cut if eligible is None else (leaf >= cut) & eligible
    for leaf, eligible in zip(ranks, among, strict=True)
  ]
  return [x.reshape(shape) for x, shape in zip(masks, shapes, strict=True)]


def _all_keys(
  scores: list[jax.Array], among: list[jax.Array | None]
) -> list[jax.Array]:
  return [counting.keys(*args) for args in zip(scores, among, strict=True)]


def _ranks(
  scores: list[jax.Array],
  among: list[jax.Array | None],
  value: jax.Array,
  last: jax.Array,
) -> list[jax.Array]:
  """Order of the entries around a key: earlier ties at the value rank higher.

  Entries with keys above the value rank first, those below it -1, and last is
  the flat index of the last entry of the last leaf, which ranks 0.
  """
  ranks = []
  for leaf, keys in zip(scores, _all_keys(scores, among), strict=True):
    ranks_of_ties = counting.countdown(last, leaf, tuple(range(leaf.ndim)))
    ranks_of_ties = jnp.where(keys == value, ranks_of_ties, -1)
    ranks.append(jnp.where(keys > value, counting.FIRST, ranks_of_ties))
    last = last - leaf.size
  return ranks


def _count(
  keys: list[jax.Array], candidates: list[jax.Array]
) -> list[jax.Array]:
  """How many keys are at or above each candidate, whatever the sharding."""
  zero = jnp.zeros([], jnp.int32)
  return [
    sum((jnp.sum(leaf >= c, dtype=jnp.int32) for leaf in keys), zero)
    for c in candidates
  ]


def _count_rows(
  keys: list[jax.Array], candidates: list[jax.Array]
) -> list[jax.Array]:
  """As _count, in one pass over the keys; would gather the counts of shards.

  On a CPU, only a reduction of several operands at once is vectorised.
  """
  rows_of_all: dict[int, list[jax.Array]] = {}
  for leaf in keys:
    if leaf.size:
      num_rows = _NUM_ROWS if leaf.size % _NUM_ROWS == 0 else 1
      leaf = leaf.reshape(num_rows, -1)
      rows = counting.sum_each([leaf >= c for c in candidates], axes=(1,))
      others = rows_of_all.get(num_rows)
      if others is not None:
        rows = [row + other for row, other in zip(rows, others, strict=True)]
      rows_of_all[num_rows] = rows
  totals = [counting.sum_each(rows, axes=(0,)) for rows in rows_of_all.values()]
  zero = jnp.zeros([], jnp.int32)
  return [sum(counts, zero) for counts in zip(*totals, strict=True)]
