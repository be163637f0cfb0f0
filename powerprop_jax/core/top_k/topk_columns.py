"""Exact top-k of each column, by the counting that topk ranks arrays with.

A column is everything that has one index of the last axis in common: the inputs
of one neuron, be its weight [in, out] or [height, width, in, out]. All columns
are searched side by side, each with a k of its own.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core.top_k import counting


def top_k_columns(
  scores: jax.typing.ArrayLike,
  k: counting.Count,
  among: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Keeps exactly k entries of each column, the largest.

  Ranks like topk.top_k_mask: ties, of which -0.0 and 0.0 are one, go to the
  lowest index, and NaN is below every number but can be kept.

  Args:
    scores: as there, [..., columns], of rank 1 or more.
    k: how many to keep; an int, or integers of shape [] or [columns] that may
      be traced.
    among: as there.

  Returns:
    Booleans of the same shape and sharding as scores. True at exactly k entries
    of each column, or at all eligible ones where there are fewer than k; a k
    below 0 counts as 0.

  Example:
    >>> scores = jnp.array([[3., 1.], [3., 2.], [4., 0.]])
    >>> top_k_columns(scores, 2).astype(int)
    Array([[1, 1],
           [0, 1],
           [1, 0]], dtype=int32)
    >>> top_k_columns(scores, jnp.array([1, 0])).astype(int)
    Array([[0, 0],
           [0, 0],
           [1, 0]], dtype=int32)
  """
  _check(scores, k, among)
  size = math.prod(jnp.shape(scores))
  if size == 0:
    return jnp.zeros(jnp.shape(scores), bool)
  if not isinstance(k, jax.Array):
    k = np.clip(k, 0, size)  # an int may exceed int32
  mask: jax.Array = _mask(
    jnp.asarray(scores),
    jnp.asarray(k, jnp.int32),
    among,
    fused=counting.is_on_one_device(scores),
  )
  return mask


def _check(
  scores: jax.typing.ArrayLike,
  k: counting.Count,
  among: jax.typing.ArrayLike | None,
) -> None:
  counting.check_dtype(scores)
  if jnp.ndim(scores) == 0:
    raise ValueError('scores must have columns, got a scalar.')
  if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
    raise TypeError(f'k must be integers, got {k!r}.')
  if jnp.shape(k) not in ((), jnp.shape(scores)[-1:]):
    raise ValueError(
      f'k must be a scalar or one count for each of the '
      f'{jnp.shape(scores)[-1]} columns, got shape {jnp.shape(k)}.'
    )
  if among is not None:
    counting.check_among(scores, among)


@functools.partial(jax.jit, static_argnames='fused')
def _mask(
  scores: jax.Array, k: jax.Array, among: jax.Array | None, *, fused: bool
) -> jax.Array:
  """Top-k mask of columns; fused counting is only for arrays without shards."""
  scores = lax.stop_gradient(scores)
  axes = tuple(range(scores.ndim - 1))
  keys = counting.keys(scores, among)
  eligible = jnp.sum(keys > counting.INELIGIBLE, axes, dtype=jnp.int32)
  k = jnp.clip(k, 0, eligible)
  zero_bits = counting.ZERO_BITS[scores.dtype.name]

  def search() -> tuple[jax.Array, jax.Array]:
    """The key where each column is cut, and the rank among those at the key."""
    # Columns become rows: sums over the last axes are many times faster on a
    # CPU. The barrier keeps XLA from undoing that.
    rows = lax.optimization_barrier(jnp.moveaxis(keys, -1, 0))
    axes = tuple(range(1, rows.ndim))

    def count(ranks: jax.Array, candidates: list[jax.Array]) -> list[jax.Array]:
      enough = [ranks >= jnp.expand_dims(c, axes) for c in candidates]
      if fused:
        return counting.sum_each(enough, axes)
      return [jnp.sum(x, axes, dtype=jnp.int32) for x in enough]

    value, reached = counting.search(
      functools.partial(count, rows),
      k,
      counting.INELIGIBLE,
      eligible,
      32,
      zero_bits,
    )
    # Stored, unlike in topk: here to compute them again takes longer.
    ranks = lax.optimization_barrier(
      _ranks(rows, jnp.expand_dims(value, axes), axes)
    )
    num_bits = math.prod(rows.shape[1:]).bit_length()
    cut, _ = counting.search(
      functools.partial(count, ranks), k, 0, reached, num_bits, 0
    )
    return value, cut

  # Where all that is eligible is kept, there is nothing to search.
  value, cut = lax.cond(
    jnp.any(k < eligible),
    search,
    lambda: (jnp.full_like(k, counting.INELIGIBLE), jnp.zeros_like(k)),
  )
  value, cut = (jnp.expand_dims(x, axes) for x in (value, cut))
  mask = _ranks(keys, value, axes) >= cut
  return mask if among is None else mask & among


def _ranks(
  keys: jax.Array, value: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
  """Order around a key, with earlier ties at it ranking higher; see topk."""
  last = jnp.asarray(math.prod(keys.shape[a] for a in axes) - 1, jnp.int32)
  ties = jnp.where(keys == value, counting.countdown(last, keys, axes), -1)
  return jnp.where(keys > value, counting.FIRST, ties)
