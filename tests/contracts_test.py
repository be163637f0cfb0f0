"""What every transformation promises, for every inner optimiser and wrapper.

A new transformation adds one row to TRANSFORMATIONS.
"""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from powerprop_jax.optim import decay, powerprop, views
from powerprop_jax.train import checkpoint

_WEIGHTS = lambda tree: {'m': {'w': True, 'b': False}, 'n': {'w': True}}

INNERS = {
  'sgd': lambda: optax.sgd(0.05),
  'momentum': lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
  'adam': lambda: optax.adam(0.01),
  'adamw': lambda: optax.adamw(0.01, weight_decay=0.1),
  'lion': lambda: optax.lion(0.01),
  'adafactor': lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
  'muon': lambda: optax.contrib.muon(0.01),
  'partition': lambda: optax.partition(
    {'weight': optax.adam(0.01), 'other': optax.sgd(0.05)},
    {'m': {'w': 'weight', 'b': 'other'}, 'n': {'w': 'weight'}},
  ),
  'masked_chain': lambda: optax.chain(
    optax.masked(optax.add_decayed_weights(1e-3), _WEIGHTS),
    optax.clip_by_global_norm(1.0),
    optax.sgd(optax.cosine_decay_schedule(0.05, 100), momentum=0.9),
  ),
}

TRANSFORMATIONS = {
  'powerprop': lambda inner: powerprop.powerprop(inner, 2.0),
  'powerprop_traced': lambda inner: powerprop.powerprop(
    inner, jnp.float32(1.7)
  ),
  'powerprop_tree': lambda inner: powerprop.powerprop(
    inner, {'m': {'w': jnp.float32(2)}, 'n': {'w': 1.5}}
  ),
  'powerprop_naive': lambda inner: powerprop.powerprop(
    inner, 2.0, form='naive'
  ),
  'powerprop_decay': lambda inner: optax.chain(
    powerprop.powerprop(inner, 2.0), decay.decay_phi(1e-3, 0.05)
  ),
}

WRAPPERS = {
  'bare': lambda tx: tx,
  'chain': lambda tx: optax.chain(optax.clip(1.0), tx),
  'multi_steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


def _theta():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    'm': {
      'w': jax.random.normal(keys[0], (6, 5)),
      'b': jax.random.normal(keys[1], (5,)),
    },
    'n': {'w': jax.random.normal(keys[2], (5, 4))},
  }


def _loss(theta):
  hidden = jnp.tanh(jnp.eye(6) @ theta['m']['w'] + theta['m']['b'][None])
  return jnp.mean((hidden @ theta['n']['w'] - 1.0) ** 2)


def _build(transformation, inner, wrapper='bare'):
  return WRAPPERS[wrapper](TRANSFORMATIONS[transformation](INNERS[inner]()))


class ContractTest(parameterized.TestCase):
  @parameterized.product(
    transformation=tuple(TRANSFORMATIONS),
    inner=tuple(INNERS),
    wrapper=tuple(WRAPPERS),
  )
  def test_compiles_once_donates_keeps_types_and_descends(
    self, transformation, inner, wrapper
  ):
    tx = optax.with_extra_args_support(_build(transformation, inner, wrapper))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(phi, opt_state):
      theta = views.effective_params(phi, opt_state)
      loss, grads = jax.value_and_grad(_loss)(theta)
      updates, opt_state = tx.update(
        grads, opt_state, phi, value=loss, not_a_known_argument=loss
      )
      return optax.apply_updates(phi, updates), opt_state, loss

    phi, opt_state = views.init(tx, _theta())
    before = jax.tree.map(lambda x: (x.shape, x.dtype), (phi, opt_state))
    losses = []
    for _ in range(12):
      phi, opt_state, loss = step(phi, opt_state)
      losses.append(float(loss))
    after = jax.tree.map(lambda x: (x.shape, x.dtype), (phi, opt_state))
    self.assertEqual(before, after)
    self.assertLess(losses[-1], losses[0])

  @parameterized.product(
    transformation=tuple(TRANSFORMATIONS), inner=tuple(INNERS)
  )
  def test_states_can_be_mapped_like_parameters(self, transformation, inner):
    tx = _build(transformation, inner)
    _, opt_state = views.init(tx, _theta())
    mapped = optax.tree.map_params(tx, lambda x: x + 0, opt_state, is_leaf=None)
    chex.assert_trees_all_equal(mapped, opt_state)

  @parameterized.product(
    transformation=tuple(TRANSFORMATIONS), inner=tuple(INNERS)
  )
  def test_scans_and_batches(self, transformation, inner):
    tx = _build(transformation, inner)

    def train(scale):
      theta = jax.tree.map(lambda x: x * scale, _theta())

      def body(carry, _):
        phi, opt_state = carry
        grads = jax.grad(_loss)(views.effective_params(phi, opt_state))
        updates, opt_state = tx.update(grads, opt_state, phi)
        return (optax.apply_updates(phi, updates), opt_state), None

      (phi, opt_state), _ = jax.lax.scan(body, views.init(tx, theta), length=3)
      return views.effective_params(phi, opt_state)

    scales = jnp.array([1.0, 0.5])
    together = jax.jit(jax.vmap(train))(scales)
    alone = jax.jit(train)(scales[1])
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], together), alone, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize('inner', tuple(INNERS))
@pytest.mark.parametrize('transformation', tuple(TRANSFORMATIONS))
def test_state_survives_a_checkpoint(transformation, inner, tmp_path):
  tx = _build(transformation, inner)
  state = views.init(tx, _theta())
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(7, state, {})
    checkpoints.wait()
    restored, step, _ = checkpoints.restore_latest(
      jax.eval_shape(lambda: state)
    )
  assert step == 7
  chex.assert_trees_all_equal(restored, state)
  chex.assert_trees_all_equal_dtypes(restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_hyperparameters_can_be_injected():
  make = lambda learning_rate, alpha: powerprop.powerprop(
    optax.sgd(learning_rate), alpha
  )
  tx = optax.inject_hyperparams(make)(learning_rate=0.1, alpha=2.0)
  phi, opt_state = views.init(tx, _theta())
  grads = jax.grad(_loss)(views.effective_params(phi, opt_state))
  updates, opt_state = tx.update(grads, opt_state, phi)
  assert not jnp.any(jnp.isnan(updates['m']['w']))
