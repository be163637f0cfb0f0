"""Shares a number of connections out between layers, in whole numbers.

Methods that move connections from one layer to another say in what proportion.
What they say is a fraction, and a layer can be full: this makes integers of it
whose total is exact, so that no connection is lost or gained, and grows them.
"""

import jax
import jax.numpy as jnp

# Remainders are compared to this resolution, so that those which are equal stay
# equal in spite of the rounding of float32.
_RESOLUTION = 1024
# A little less than 1: no share, rounded down, is more than the exact one.
_BELOW_ONE = 1 - 2.0**-21


def allocate(
  total: int | jax.Array, weights: jax.Array, room: jax.Array
) -> jax.Array:
  """Shares total out in proportion to weights, up to the room of each layer.

  Layers without enough room are filled, and the others share the rest in the
  same proportion. Shares are rounded down, and what is left goes one each to
  the largest remainders; equal ones in the order of the layers.

  Args:
    total: how many to share out, an int32 scalar that may be traced; below 0 it
      counts as 0.
    weights: proportions, numbers of shape [L], at least 0 and finite. Where
      all layers with room left have weight 0, they share alike.
    room: how many each can take, int32[L], at least 0.

  Returns:
    int32[L] between 0 and room, whose sum is exactly total, or that of room if
    it is less. The shares are exact up to the rounding of float32 above 2^20.

  Example:
    >>> allocate(10, jnp.array([3, 1, 1]), jnp.array([100, 100, 1]))
    Array([7, 2, 1], dtype=int32)
    >>> allocate(2, jnp.array([1, 1, 1]), jnp.array([9, 9, 9]))
    Array([1, 1, 0], dtype=int32)
  """
  room = jnp.asarray(room, jnp.int32)
  total = jnp.clip(jnp.asarray(total, jnp.int32), 0, jnp.sum(room))
  exact = _shares(total, jnp.asarray(weights, jnp.float32), room)
  whole = jnp.floor(exact * _BELOW_ONE).astype(jnp.int32)

  def is_left(given: jax.Array) -> jax.Array:
    return jnp.sum(given) < total

  def one_each(given: jax.Array) -> jax.Array:
    wanted = jnp.round((exact - given.astype(jnp.float32)) * _RESOLUTION)
    wanted = jnp.where(given < room, wanted, -jnp.inf)
    order = jnp.argsort(jnp.argsort(-wanted, stable=True))
    comes = (given < room) & (order < total - jnp.sum(given))
    return given + comes.astype(jnp.int32)

  given: jax.Array = jax.lax.while_loop(
    is_left, one_each, jnp.minimum(whole, room)
  )
  return given


def _shares(total: jax.Array, weights: jax.Array, room: jax.Array) -> jax.Array:
  """Fractions that sum to total: in proportion, and no more than room."""
  limit = room.astype(jnp.float32)

  def shares(full: jax.Array) -> jax.Array:
    rest = total - jnp.sum(jnp.where(full, room, 0))
    open_weights = jnp.where(full, 0, weights)
    alike = (~full).astype(jnp.float32)
    open_weights = jnp.where(jnp.any(open_weights > 0), open_weights, alike)
    sum_of_weights = jnp.sum(open_weights)
    sum_of_weights = jnp.where(sum_of_weights > 0, sum_of_weights, 1)
    share = rest.astype(jnp.float32) * open_weights / sum_of_weights
    return jnp.where(full, limit, share)

  def is_over(full: jax.Array) -> jax.Array:
    return jnp.any(shares(full) > limit)

  # Each turn fills at least one more layer.
  full = jax.lax.while_loop(
    is_over,
    lambda full: full | (shares(full) > limit),
    jnp.zeros(room.shape, bool),
  )
  return shares(full)


def whole_fan_ins(counts: jax.Array, neurons: jax.Array) -> jax.Array:
  """Whole inputs per neuron, near to given numbers of connections.

  Rounded down, but to 1 at least. If these are too many connections, layers
  give up an input each, first those that are furthest above what they should
  have. What is left over goes the other way, to those furthest below, one input
  at most to each and as long as it suffices for all neurons of the layer.

  All are int32[L]. The connections are at most the sum of counts, which is at
  least that of neurons, and fewer by less than the neurons of the widest layer.

  Example:
    >>> whole_fan_ins(jnp.array([25, 19]), jnp.array([10, 4]))
    Array([2, 5], dtype=int32)
  """
  total = jnp.sum(counts)
  exact = counts.astype(jnp.float32) / neurons.astype(jnp.float32)

  def rest(inputs: jax.Array) -> jax.Array:
    return total - jnp.sum(inputs * neurons)

  def one_less(inputs: jax.Array) -> jax.Array:
    above = jnp.where(inputs > 1, inputs.astype(jnp.float32) - exact, -jnp.inf)
    return inputs.at[jnp.argmax(above)].add(-1)

  def can_grow(inputs: jax.Array) -> jax.Array:
    return (inputs * neurons < counts) & (neurons <= rest(inputs))

  def one_more(inputs: jax.Array) -> jax.Array:
    below = exact - inputs.astype(jnp.float32)
    below = jnp.where(can_grow(inputs), below, -jnp.inf)
    return inputs.at[jnp.argmax(below)].add(1)

  inputs = jnp.maximum(counts // neurons, 1)
  inputs = jax.lax.while_loop(lambda x: rest(x) < 0, one_less, inputs)
  found: jax.Array = jax.lax.while_loop(
    lambda x: jnp.any(can_grow(x)), one_more, inputs
  )
  return found
