"""Views of φ: found in any wrapper, inverse to each other, α that changes."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import powerprop_jax as pp

# A weight at zero is what some of these are about.
pytestmark = pytest.mark.filterwarnings('ignore:.*start at exactly zero')


def _theta():
  return {'m': {'w': jnp.array([[4.0, -0.25], [0.0, 1e-3]]), 'b': jnp.ones(2)}}


def _power(alpha=2.0):
  return pp.powerprop(optax.adam(0.1), alpha)


_WRAPPERS = {
  'bare': lambda: _power(),
  'traced': lambda: _power(jnp.float32(2)),
  'chain': lambda: optax.chain(optax.clip(1.0), _power()),
  'multi_steps': lambda: optax.MultiSteps(
    _power(), 2
  ).gradient_transformation(),
  'apply_if_finite': lambda: optax.apply_if_finite(_power(), 3),
  'inject': lambda: optax.inject_hyperparams(
    lambda lr, alpha: pp.powerprop(optax.sgd(lr), alpha)
  )(lr=0.1, alpha=2.0),
}


class ViewsTest(parameterized.TestCase):
  @parameterized.parameters(*_WRAPPERS)
  def test_finds_alpha_inside_wrappers(self, wrapper):
    tx = _WRAPPERS[wrapper]()
    phi, opt_state = pp.init(tx, _theta())
    np.testing.assert_allclose(phi['m']['w'][0], [2.0, -0.5], rtol=1e-6)
    np.testing.assert_array_equal(phi['m']['b'], jnp.ones(2))
    theta = pp.effective_params(phi, opt_state)
    chex.assert_trees_all_close(theta, _theta(), rtol=1e-6)
    chex.assert_trees_all_close(
      pp.latent_params(theta, opt_state), phi, rtol=1e-6
    )

  def test_without_powerprop_theta_is_phi(self):
    tx = optax.adam(0.1)
    phi, opt_state = pp.init(tx, _theta())
    chex.assert_trees_all_equal(phi, _theta())
    chex.assert_trees_all_equal(pp.effective_params(phi, opt_state), phi)

  @parameterized.parameters(*_WRAPPERS)
  def test_refuses_weights_of_zero_that_could_never_move(self, wrapper):
    theta = {
      'a': {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3)},
      'b': {'w': jnp.zeros((3, 1))},
      'c': {'w': jnp.eye(2)},
    }
    with self.assertRaisesRegex(ValueError, "^'a/w', 'b/w' are all.*w_init"):
      pp.init(_WRAPPERS[wrapper](), theta)

  def test_weights_of_zero_are_fine_where_they_can_move(self):
    theta = {'a': {'w': jnp.zeros((2, 3))}, 'b': {'w': jnp.eye(2)}}
    only_b = pp.by_regex('^b/')
    for tx in (
      optax.adam(0.1),
      _power(1.0),
      pp.powerprop(optax.sgd(0.1), 2.0, only_b),
      _power({'a': {'w': 1.0}, 'b': {'w': 2.0}}),
    ):
      pp.init(tx, theta)

  def test_under_jit_weights_of_zero_go_unnoticed_and_stay(self):
    tx = _power()
    theta = {'m': {'w': jnp.zeros((2, 2)), 'b': jnp.zeros(2)}}
    phi, opt_state = jax.jit(lambda t: pp.init(tx, t))(theta)
    ones = jax.tree.map(jnp.ones_like, phi)
    updates, _ = tx.update(ones, opt_state, phi)
    np.testing.assert_array_equal(updates['m']['w'], 0)
    self.assertTrue(np.all(updates['m']['b'] != 0))

  @parameterized.product(old=(1.0, 1.5, 2.0), new=(1.0, 1.3, 4.0))
  def test_with_alpha_keeps_theta(self, old, new):
    for kind in (float, jnp.float32, lambda a: {'m': {'w': jnp.float32(a)}}):
      new = kind(new) if isinstance(kind(old), dict) else new
      phi, opt_state = pp.init(_power(kind(old)), _theta())
      before = pp.effective_params(phi, opt_state)
      phi, opt_state = pp.with_alpha(phi, opt_state, new)
      after = pp.effective_params(phi, opt_state)
      chex.assert_trees_all_close(after, before, rtol=3e-6)

  def test_with_alpha_in_a_compiled_loop_compiles_once(self):
    tx = _power(jnp.float32(1.5))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(phi, opt_state, alpha):
      theta = pp.effective_params(phi, opt_state)
      updates, opt_state = tx.update(theta, opt_state, phi)
      phi = optax.apply_updates(phi, updates)
      return pp.with_alpha(phi, opt_state, alpha)

    phi, opt_state = pp.init(tx, _theta())
    for alpha in (1.5, 2.0, 3.0):
      phi, opt_state = step(phi, opt_state, jnp.float32(alpha))

  @parameterized.product(
    pair=((1.0, 2.0), (3.0, 1.5)), form=('recommended', 'naive')
  )
  def test_with_alpha_that_holds_phi_moves_theta(self, pair, form):
    old, new = pair
    tx = pp.powerprop(optax.adam(0.1), jnp.float32(old), form=form)
    phi, opt_state = pp.init(tx, _theta())
    after, opt_state = pp.with_alpha(phi, opt_state, new, hold='phi')
    self.assertIs(after, phi)
    theta, w = pp.effective_params(phi, opt_state), _theta()['m']['w']
    np.testing.assert_allclose(
      theta['m']['w'], jnp.sign(w) * jnp.abs(w) ** (new / old), rtol=1e-5
    )
    np.testing.assert_array_equal(theta['m']['b'], 1)
    pp.with_alpha(phi, opt_state, 64.0, hold='phi')  # the largest

  @parameterized.parameters(
    (_power(2.0), 0.5, {}, 'at least 1, got 0.5'),
    (_power(2.0), 65.0, {}, 'at most 64, got 65'),
    (_power(jnp.float32(2)), jnp.float32(65), {}, 'at most 64, got 65'),
    (_power(2.0), jnp.float32(3), {}, 'cannot become an array'),
    (_power(2.0), {'m': {'w': 3.0}}, {}, 'another structure'),
    (_power(2.0), 3.0, {'hold': 'psi'}, "'theta' or 'phi', got 'psi'"),
    (optax.sgd(0.1), 3.0, {}, 'found no powerprop'),
    (
      pp.powerprop(optax.adam(0.1), 2.0, form='naive'),
      3.0,
      {},
      "'naive' keeps.*hold='phi'",
    ),
  )
  def test_with_alpha_refuses(self, tx, alpha, options, message):
    phi, opt_state = pp.init(tx, _theta())
    with self.assertRaisesRegex(ValueError, message):
      pp.with_alpha(phi, opt_state, alpha, **options)
