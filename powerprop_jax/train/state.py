"""The state of a training run: everything that a checkpoint must hold."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core.trees import OptState
from powerprop_jax.optim import views
from powerprop_jax.train.runs.errors import UserError


class TrainState(NamedTuple):
  """What one training step turns into the next.

  Attributes:
    step: training steps done, int32 scalar.
    phi: latent parameters.
    net_state: the network's own state, such as batch-norm averages.
    opt_state: state of the gradient transformation; holds α and the masks.
    key: typed PRNG key of the run, which never changes; each step derives its
      own from it, for augmentation and dropout.
  """

  step: jax.Array
  phi: hk.Params
  net_state: hk.State
  opt_state: OptState
  key: jax.Array

  @property
  def theta(self) -> hk.Params:
    """Effective parameters, what the network computes with."""
    return views.effective_params(self.phi, self.opt_state)


def check_key(key: int) -> None:
  """Refuses a seed that jax.random.key and the order of the data cannot take.

  Args:
    key: the seed, an int that the user types.

  Raises:
    UserError: if it is negative or does not fit in 32 bits.
  """
  if not 0 <= key < 2**32:
    raise UserError(f'a key must be at least 0 and below 2^32, got {key}.')


def create(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  key: jax.Array,
  images: jax.Array,
) -> TrainState:
  """Initialises a network and the state that trains it.

  Args:
    net: a network from nets.make: net.apply(theta, net_state, key, images,
      is_training) gives (logits, net_state).
    tx: gradient transformation over the latent parameters.
    key: PRNG key of the initial weights and of all that is random later; the
      same key gives the same function at step 0 for every α.
    images: a batch of inputs, float, for its shape.

  Returns:
    The state before the first step.
  """
  theta, net_state = net.init(key, images, is_training=True)
  phi, opt_state = views.init(tx, theta)
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    phi=phi,
    net_state=net_state,
    opt_state=opt_state,
    # Another stream than that of the weights, and an array of its own.
    key=jax.random.fold_in(key, 1),
  )
