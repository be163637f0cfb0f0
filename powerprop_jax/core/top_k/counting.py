"""Order of floats as integers, and the k-th largest of integers by counting.

What the two kinds of top-k share: of whole arrays (topk) and of each column
(topk_columns).
"""

from collections.abc import Callable
import math
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree

# Number of the round, values found so far, how many reach them.
_State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
Count: TypeAlias = int | jax.Array

_DIGIT_BITS = 2  # found in a round; one more takes fewer passes, but more time
FIRST = 2**31 - 1  # ranks above every index
INELIGIBLE = -(2**31)  # ranks below every score
_NAN = INELIGIBLE + 2**16  # ranks below every number, bfloat16 resolution
_INFINITY = 0x7F800000  # bits of float32 infinity; NaNs have larger ones
# Low bits of the keys that are zero for every score of a type.
ZERO_BITS = {'float32': 0, 'float16': 13, 'bfloat16': 16}


def check_dtype(scores: Tree) -> None:
  """Refuses scores whose order keys does not know."""
  if jnp.result_type(scores).name not in ZERO_BITS:
    raise TypeError(
      'scores must be float32, bfloat16 or float16, got '
      f'{jnp.result_type(scores).name}. Cast them to float32.'
    )


def check_among(scores: Tree, among: Tree) -> None:
  """Refuses an among that is not boolean or of another shape than scores."""
  if jnp.shape(scores) != jnp.shape(among):
    raise ValueError(
      f'among must have the shapes of scores, got {jnp.shape(among)} for '
      f'scores of shape {jnp.shape(scores)}.'
    )
  if jnp.result_type(among) != jnp.bool_:
    raise TypeError(
      f'among must be boolean, got {jnp.result_type(among).name}.'
    )


def is_on_one_device(leaf: Any) -> bool:
  """Whether an array certainly has no shards."""
  if trees.is_traced(leaf):
    # An automatic mesh does not show in the type of a traced array.
    return jax.device_count() == 1
  return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def search(
  count_at_least: Callable[[list[jax.Array]], list[jax.Array]],
  k: jax.Array,
  lowest: int,
  reached: Count,
  num_bits: int,
  zero_bits: int,
) -> tuple[jax.Array, jax.Array]:
  """Finds the k-th largest of some integers, from the highest bits down.

  Stops as soon as it meets a value that exactly k of them reach. With arrays it
  searches several sets of integers side by side, until that is so for all.

  Args:
    count_at_least: how many of the integers are at or above each candidate; one
      candidate for each set, and as many counts.
    k: the rank, in [0, reached]; a scalar or [S] for S sets.
    lowest: where to start, a multiple of 2**num_bits.
    reached: how many are at or above lowest; of the shape of k.
    num_bits: the k-th largest is less than 2**num_bits above lowest.
    zero_bits: how many low bits of the k-th largest are certainly zero.

  Returns:
    The value, and how many of the integers are at or above it.
  """
  first_shift = max(num_bits - _DIGIT_BITS, zero_bits)
  num_rounds = 1 + -(-(first_shift - zero_bits) // _DIGIT_BITS)

  def cond(state: _State) -> jax.Array:
    turn, _, reached = state
    return (turn < num_rounds) & jnp.any(reached != k)

  def body(state: _State) -> _State:
    turn, value, reached = state
    # The last round may ask again for bits that are known; no harm is done.
    shift = jnp.maximum(first_shift - _DIGIT_BITS * turn, zero_bits)
    digits = [
      jnp.asarray(digit, jnp.int32) for digit in range(1, 2**_DIGIT_BITS)
    ]
    # From the lowest key, -2^31, the largest digits wrap around as they should.
    counts = count_at_least([value + (d << shift) for d in digits])
    searched = reached != k  # a set whose search is over waits for the others
    for count in counts:
      enough = searched & (count >= k)
      value = jnp.where(enough, value + (1 << shift), value)
      reached = jnp.where(enough, count, reached)
    return turn + 1, value, reached

  reached = jnp.asarray(reached, jnp.int32)
  start = (jnp.zeros([], jnp.int32), jnp.full_like(reached, lowest), reached)
  _, value, reached = lax.while_loop(cond, body, start)
  return value, reached


def keys(scores: jax.Array, among: jax.Array | None) -> jax.Array:
  """int32 of the order of the scores: sign and magnitude to two's complement.

  On bits and not on floats because devices flush subnormal floats to zero.
  """
  if scores.dtype == jnp.bfloat16:
    bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32) << 16
  else:
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  magnitude = bits & 0x7FFFFFFF
  sign = bits >> 31  # -1 for negative scores
  ordered = (magnitude ^ sign) - sign  # -0.0 and 0.0 both become 0
  ordered = jnp.where(magnitude > _INFINITY, _NAN, ordered)
  return ordered if among is None else jnp.where(among, ordered, INELIGIBLE)


def along_axis(values: jax.Array, axis: int, like: jax.Array) -> jax.Array:
  """Repeats a vector along one axis of the shape and sharding of an array."""
  sharding = jax.typeof(like).sharding
  return lax.broadcast_in_dim(
    values,
    like.shape,
    (axis,),
    out_sharding=None if sharding.mesh.empty else sharding,
  )


def countdown(
  last: jax.Array, like: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
  """last minus the flat index of each entry over some of the axes.

  Axis by axis, because flattening a sharded array would gather it. last is what
  index 0 gets; int32 of the shape and sharding of like.
  """
  ranks = jnp.broadcast_to(last, like.shape)
  stride = math.prod(like.shape[axis] for axis in axes)
  for axis in axes:
    length = like.shape[axis]
    stride //= max(length, 1)
    index = stride * jnp.arange(length, dtype=jnp.int32)
    ranks = ranks - along_axis(index, axis, like)
  return ranks


def sum_each(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
  """Sums of several arrays of one shape in a single reduction."""
  zero = jnp.zeros([], jnp.int32)
  add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
  integers = [array.astype(jnp.int32) for array in arrays]
  sums: list[jax.Array] = lax.reduce(integers, [zero] * len(arrays), add, axes)
  return sums
