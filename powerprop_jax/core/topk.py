"""Exact top-k masks by counting: no sort, no concatenation, no gather.

Floats are compared through integers of the same order. The k-th largest of them
is found two bits at a time: each round asks, in one pass over the scores, how
many lie at or above each of three candidates, and keeps the largest candidate
that still has k. Ties at the k-th largest are cut by the same search over flat
indices. Only counts travel between shards, a tree needs as many rounds as a
single array, and k can be traced.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, TypeAlias

import chex
import jax
from jax import lax
import jax.numpy as jnp

Count: TypeAlias = int | jax.Array
# Number of the round, value found so far, how many reach it.
_State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

_DIGIT_BITS = 2  # found in a round; one more takes fewer passes, but more time
_MAX_SIZE = 2**31 - 4  # flat indices and the candidates above them fit int32
_NUM_ROWS = 64  # of a leaf when counted; enough to divide among CPU threads
_FIRST = 2**31 - 1  # ranks above every flat index
_INELIGIBLE = -(2**31)  # ranks below every score
_NAN = _INELIGIBLE + 2**16  # ranks below every number, bfloat16 resolution
_INFINITY = 0x7F800000  # bits of float32 infinity; NaNs have larger ones
# Low bits of the keys that are zero for every score of a type.
_ZERO_BITS = {'float32': 0, 'float16': 13, 'bfloat16': 16}


def top_k_mask(
  scores: chex.Array, k: Count, among: chex.Array | None = None
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
    than k; a k below 0 counts as 0 under the same conditions.

  Raises:
    TypeError: if the scores have another dtype, or among is not boolean.
    ValueError: if k is an int outside [0, scores.size] and among is not given,
      if the shapes differ, or if there are too many scores.

  Example:
    >>> top_k_mask(jnp.array([3., 1., 3., 2., 3.]), 2)
    Array([ True, False,  True, False, False], dtype=bool)
    >>> top_k_mask(jnp.array([3., 1., 3., 2.]), 2,
    ...            among=jnp.array([False, True, False, True]))
    Array([False,  True, False,  True], dtype=bool)
  """
  mask: jax.Array = top_k_masks(scores, k, among)
  return mask


def top_k_masks(
  scores: chex.ArrayTree, k: Count, among: chex.ArrayTree | None = None
) -> chex.ArrayTree:
  """Keeps exactly k entries of a whole tree, the largest of all leaves.

  As top_k_mask, with one ranking over the tree: ties go to the earlier leaf in
  the order of jax.tree.leaves, then to the lower flat index.

  Args:
    scores: tree of float32, bfloat16 or float16 arrays (which may be mixed),
      at most 2^31 - 4 entries in all.
    k: how many to keep; an int, or an integer scalar that may be traced.
    among: booleans of the same structure and shapes; only entries where it is
      True are kept.

  Returns:
    Tree of booleans with the structure, shapes and shardings of scores. True
    at exactly k entries, or at all eligible ones where a traced k or among
    leaves fewer than k; a k below 0 counts as 0 under the same conditions.

  Raises:
    TypeError: if a leaf has another dtype, or among is not boolean.
    ValueError: if k is an int outside [0, size] and among is not given, if
      structures or shapes differ, or if there are too many scores.

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
  fused = all(map(_is_on_one_device, leaves))
  masks = _masks(leaves, jnp.asarray(k, jnp.int32), eligible, fused=fused)
  return jax.tree.unflatten(jax.tree.structure(scores), masks)


def _check(
  scores: Any, leaves: list[Any], k: Count, among: Any, size: int
) -> None:
  for leaf in leaves:
    if jnp.result_type(leaf).name not in _ZERO_BITS:
      raise TypeError(
        'scores must be float32, bfloat16 or float16, got '
        f'{jnp.result_type(leaf).name}. Cast them to float32.'
      )
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
    if jnp.shape(leaf) != jnp.shape(eligible):
      raise ValueError(
        f'among must have the shapes of scores, got {jnp.shape(eligible)} for '
        f'scores of shape {jnp.shape(leaf)}.'
      )
    if jnp.result_type(eligible) != jnp.bool_:
      raise TypeError(
        f'among must be boolean, got {jnp.result_type(eligible).name}.'
      )


def _is_on_one_device(leaf: Any) -> bool:
  """Whether an array certainly has no shards."""
  if isinstance(leaf, jax.core.Tracer):
    # An automatic mesh does not show in the type of a traced array.
    return jax.device_count() == 1
  return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


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
  size = sum(leaf.size for leaf in scores)
  k = jnp.clip(k, 0, size)
  zero_bits = min(_ZERO_BITS[leaf.dtype.name] for leaf in scores)
  count = _count_rows if fused else _count

  # The barriers keep XLA from moving keys and indices out of the loops: storing
  # them takes longer than computing them again in every pass, and more memory.
  def count_keys(candidates: list[jax.Array]) -> list[jax.Array]:
    leaves, eligible, candidates = lax.optimization_barrier(
      (scores, among, candidates)
    )
    return count(_all_keys(leaves, eligible), candidates)

  value, reached = _search(count_keys, k, _INELIGIBLE, size, 32, zero_bits)

  # Scores above the value are kept. Of those at the value, as many as there is
  # room for: if not all of them, a second search finds where to stop.
  def count_ranks(candidates: list[jax.Array]) -> list[jax.Array]:
    leaves, eligible, last, candidates = lax.optimization_barrier(
      (scores, among, jnp.asarray(size - 1, jnp.int32), candidates)
    )
    return count(_ranks(leaves, eligible, value, last), candidates)

  # With fewer than k eligible scores, all of them are kept.
  k = jnp.where(value == _INELIGIBLE, reached, k)
  cut, _ = _search(count_ranks, k, 0, reached, size.bit_length(), 0)
  ranks = _ranks(scores, among, value, jnp.asarray(size - 1, jnp.int32))
  return [
    leaf >= cut if eligible is None else (leaf >= cut) & eligible
    for leaf, eligible in zip(ranks, among, strict=True)
  ]


def _search(
  count_at_least: Callable[[list[jax.Array]], list[jax.Array]],
  k: jax.Array,
  lowest: int,
  reached: Count,
  num_bits: int,
  zero_bits: int,
) -> tuple[jax.Array, jax.Array]:
  """Finds the k-th largest of some integers, from the highest bits down.

  Stops as soon as it meets a value that exactly k of them reach.

  Args:
    count_at_least: how many of the integers are at or above each candidate.
    k: the rank, in [0, reached].
    lowest: where to start, a multiple of 2**num_bits.
    reached: how many are at or above lowest.
    num_bits: the k-th largest is less than 2**num_bits above lowest.
    zero_bits: how many low bits of the k-th largest are certainly zero.

  Returns:
    The value, and how many of the integers are at or above it.
  """
  first_shift = max(num_bits - _DIGIT_BITS, zero_bits)
  num_rounds = 1 + -(-(first_shift - zero_bits) // _DIGIT_BITS)

  def cond(state: _State) -> jax.Array:
    turn, _, reached = state
    return (turn < num_rounds) & (reached != k)

  def body(state: _State) -> _State:
    turn, value, reached = state
    # The last round may ask again for bits that are known; no harm is done.
    shift = jnp.maximum(first_shift - _DIGIT_BITS * turn, zero_bits)
    digits = [
      jnp.asarray(digit, jnp.int32) for digit in range(1, 2**_DIGIT_BITS)
    ]
    # From the lowest key, -2^31, the largest digits wrap around as they should.
    counts = jnp.stack(count_at_least([value + (d << shift) for d in digits]))
    enough = counts >= k
    value = value + (jnp.sum(enough, dtype=jnp.int32) << shift)
    return turn + 1, value, jnp.min(jnp.where(enough, counts, reached))

  start = (
    jnp.zeros([], jnp.int32),
    jnp.asarray(lowest, jnp.int32),
    jnp.asarray(reached, jnp.int32),
  )
  _, value, reached = lax.while_loop(cond, body, start)
  return value, reached


def _keys(scores: jax.Array, among: jax.Array | None) -> jax.Array:
  """int32 of the order of the scores: sign and magnitude to two's complement.

  On bits and not on floats because devices flush subnormal floats to zero.
  """
  if scores.dtype == jnp.bfloat16:
    bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32) << 16
  else:
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  magnitude = bits & 0x7FFFFFFF
  sign = bits >> 31  # -1 for negative scores
  keys = (magnitude ^ sign) - sign  # -0.0 and 0.0 both become 0
  keys = jnp.where(magnitude > _INFINITY, _NAN, keys)
  return keys if among is None else jnp.where(among, keys, _INELIGIBLE)


def _all_keys(
  scores: list[jax.Array], among: list[jax.Array | None]
) -> list[jax.Array]:
  return [_keys(*args) for args in zip(scores, among, strict=True)]


def _ranks(
  scores: list[jax.Array],
  among: list[jax.Array | None],
  value: jax.Array,
  last: jax.Array,
) -> list[jax.Array]:
  """Order of the entries around a key: earlier ties at the value rank higher.

  Args:
    scores: the scores.
    among: which of them are eligible.
    value: a key; entries above it rank first, entries below it -1.
    last: flat index of the last entry of the last leaf, which ranks 0.

  Returns:
    int32 ranks of the shapes of scores.
  """
  ranks = []
  for leaf, keys in zip(scores, _all_keys(scores, among), strict=True):
    # Per axis, because flattening a sharded array would gather it.
    ranks_of_ties = jnp.broadcast_to(last, leaf.shape)
    stride = leaf.size
    for axis, length in enumerate(leaf.shape):
      stride //= max(length, 1)
      index = stride * jnp.arange(length, dtype=jnp.int32)
      ranks_of_ties = ranks_of_ties - _along_axis(index, axis, leaf)
    ranks_of_ties = jnp.where(keys == value, ranks_of_ties, -1)
    ranks.append(jnp.where(keys > value, _FIRST, ranks_of_ties))
    last = last - leaf.size
  return ranks


def _along_axis(values: jax.Array, axis: int, like: jax.Array) -> jax.Array:
  """Repeats a vector along one axis of the shape and sharding of an array."""
  sharding = jax.typeof(like).sharding
  return lax.broadcast_in_dim(
    values,
    like.shape,
    (axis,),
    out_sharding=None if sharding.mesh.empty else sharding,
  )


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
      rows = _sum_each([leaf >= c for c in candidates], axis=1)
      others = rows_of_all.get(num_rows)
      if others is not None:
        rows = [row + other for row, other in zip(rows, others, strict=True)]
      rows_of_all[num_rows] = rows
  totals = [_sum_each(rows, axis=0) for rows in rows_of_all.values()]
  zero = jnp.zeros([], jnp.int32)
  return [sum(counts, zero) for counts in zip(*totals, strict=True)]


def _sum_each(arrays: list[jax.Array], axis: int) -> list[jax.Array]:
  """Sums of several arrays of one shape in a single reduction."""
  zero = jnp.zeros([], jnp.int32)
  add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
  integers = [array.astype(jnp.int32) for array in arrays]
  sums: list[jax.Array] = lax.reduce(
    integers, [zero] * len(arrays), add, (axis,)
  )
  return sums
