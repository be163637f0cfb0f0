"""Optimisers from settings do what their formulas say."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax.optim import views
from powerprop_jax.train import optimizers
from powerprop_jax.train.optimizers import OptimizerConfig

NUM_STEPS = 9
GRADS = np.random.default_rng(0).normal(size=(NUM_STEPS, 2, 3))


def weights_after(config, alpha=1.0):
  """The weights before each step with GRADS, and after the last."""
  theta = {'linear': {'w': jnp.full((2, 3), 0.5)}}
  tx = optimizers.make_tx(config, alpha, NUM_STEPS)
  phi, opt_state = views.init(tx, theta)
  found = [phi['linear']['w']]
  for grads in GRADS:
    grads = {'linear': {'w': jnp.asarray(grads, jnp.float32)}}
    updates, opt_state = tx.update(grads, opt_state, phi)
    phi = optax.apply_updates(phi, updates)
    found.append(phi['linear']['w'])
  return np.stack(found)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('decay', [0.0, 0.01])
@pytest.mark.parametrize('stair', [4, NUM_STEPS])
def test_momentum_staircase_and_decay_are_the_sums_written_out(
  nesterov, decay, stair
):
  config = OptimizerConfig(
    learning_rate=0.1,
    schedule='staircase',
    stair_steps=stair,
    stair_factor=0.2,
    momentum=0.9,
    nesterov=nesterov,
    decay_theta=decay,
  )
  theta, trace = np.full((2, 3), 0.5), np.zeros((2, 3))
  expected = [theta]
  for step, grads in enumerate(GRADS):
    rate = 0.1 * 0.2 ** (step // stair)
    grads = grads + decay * theta
    trace = 0.9 * trace + grads
    ahead = grads + 0.9 * trace if nesterov else trace
    theta = theta - rate * ahead
    expected.append(theta)
  np.testing.assert_allclose(weights_after(config), expected, rtol=1e-5)
