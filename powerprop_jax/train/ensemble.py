"""Many runs as one program: a lane for each α and key.

The states of all lanes are stacked along a leading axis. One compiled program
trains them side by side with jax.vmap, or, where memory is short, one after the
other (or a few at a time) with jax.lax.map; α is an array in either case, so
both compute the same numbers up to the rounding of batched products. Lanes with
the same key start from the same function and see the same batches.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import reparam
from powerprop_jax.train import state as state_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.state import TrainState


class Lanes(NamedTuple):
  """What distinguishes the runs of a sweep.

  Attributes:
    alpha: float64[lanes], the power of each, as it was given.
    key: int[lanes], seed of each: its initial weights and order of the data.
  """

  alpha: np.ndarray
  key: np.ndarray


def product(alphas: Sequence[float], keys: Sequence[int]) -> Lanes:
  """All pairs of a power and a key.

  Args:
    alphas: powers, each at least 1.
    keys: seeds, each at least 0 and below 2^32.

  Returns:
    The lanes, key by key within each α.

  Raises:
    UserError: if a key is out of range.

  Example:
    >>> product([1., 2.], [0, 1]).alpha
    array([1., 1., 2., 2.])
  """
  for key in keys:
    state_lib.check_key(key)
  pairs = list(itertools.product(alphas, keys))
  return Lanes(
    np.array([alpha for alpha, _ in pairs], np.float64),
    np.array([key for _, key in pairs], np.int64),
  )


def map_lanes(
  fn: Callable[..., Any], at_once: int | None
) -> Callable[..., Any]:
  """Maps fn over the leading axis of all its arguments.

  Args:
    fn: a pure function of arrays of one lane.
    at_once: lanes computed side by side; None is all of them.

  Returns:
    The mapped function, to be jitted.

  Raises:
    UserError: if at_once is less than 1.
  """
  check_at_once(at_once)
  if at_once is None:
    return jax.vmap(fn)
  if at_once == 1:
    return lambda *args: jax.lax.map(lambda xs: fn(*xs), args)
  return lambda *args: jax.lax.map(lambda xs: fn(*xs), args, batch_size=at_once)


def check_at_once(at_once: int | None) -> None:
  """Refuses a number of lanes that is not positive; None is all of them."""
  if at_once is not None and at_once < 1:
    raise UserError(
      f'lanes_at_once must be at least 1, got {at_once}. Leave it away to '
      'compute all lanes side by side.'
    )


def create(
  net: hk.TransformedWithState,
  make_tx: Callable[[Any], optax.GradientTransformation],
  lanes: Lanes,
  images: jax.Array,
) -> TrainState:
  """The stacked states of all lanes before their first step.

  Args:
    net: a network from nets.make.
    make_tx: from α, an array, to a gradient transformation over φ.
    lanes: the runs.
    images: a batch of inputs, float, for its shape.

  Returns:
    A TrainState whose every leaf has a leading axis over lanes.

  Raises:
    ValueError: if powerprop refuses the weights or a power.
  """
  # Inside vmap nobody can look at the values: check the powers, and build the
  # hardest lane, outside.
  for alpha in lanes.alpha:
    reparam.check_alpha(float(alpha))
  hardest = int(np.argmax(lanes.alpha))
  state_lib.create(
    net,
    make_tx(float(lanes.alpha[hardest])),
    jax.random.key(int(lanes.key[hardest])),
    images,
  )

  def create_one(alpha: jax.Array, key: jax.Array) -> TrainState:
    return state_lib.create(net, make_tx(alpha), key, images)

  keys = jnp.stack([jax.random.key(int(key)) for key in lanes.key])
  return jax.jit(jax.vmap(create_one))(
    jnp.asarray(lanes.alpha, jnp.float32), keys
  )


def create_by_key(
  net: hk.TransformedWithState,
  make_tx: Callable[[jax.Array], optax.GradientTransformation],
  lanes: Lanes,
  images: jax.Array,
) -> TrainState:
  """The stacked states of lanes that share an α which is a Python number.

  Args:
    net: a network from nets.make.
    make_tx: from a PRNG key, which may be traced, to a gradient transformation
      over φ.
    lanes: the runs; their α is not looked at, make_tx knows it.
    images: a batch of inputs, float, for its shape.

  Returns:
    A TrainState whose every leaf has a leading axis over lanes.

  Raises:
    ValueError: if a topology refuses the shapes of the weights. Their values
      are traced, so that a leaf of zeros goes unnoticed; nets.make has none.
  """

  def create_one(key: jax.Array) -> TrainState:
    # Other streams than those of the weights and of the training steps.
    return state_lib.create(
      net, make_tx(jax.random.fold_in(key, 2)), key, images
    )

  keys = jnp.stack([jax.random.key(int(key)) for key in lanes.key])
  return jax.jit(jax.vmap(create_one))(keys)


def batch_indices(
  lanes: Lanes, start: int, num_steps: int, batch_size: int, num_examples: int
) -> np.ndarray:
  """Rows of the data that each lane trains on.

  Args:
    lanes: the runs; equal keys give equal rows.
    start: steps done before these.
    num_steps: how many steps to cover.
    batch_size: examples in a batch.
    num_examples: examples in the training split.

  Returns:
    int32[lanes, num_steps, batch_size].
  """
  by_key = {
    int(key): splits.batch_indices(
      int(key), start, num_steps, batch_size, num_examples
    )
    for key in lanes.key
  }
  return np.stack([by_key[int(key)] for key in lanes.key])
