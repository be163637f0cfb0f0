"""Another α for the same θ: how exact, and what stays bit by bit."""

from absl.testing import parameterized
import alphas
import chex
import jax
import jax.numpy as jnp
import numpy as np

import powerprop_jax as pp
from powerprop_jax.core import reparam
from powerprop_jax.core.trees import Static
from powerprop_jax.optim.alphas import remap
from powerprop_jax.optim.powerprop import PowerState

_PAIRS = (
  (1.0, 2.0),
  (1.25, 1.375),
  (2.0, 2.5),
  (2.5, 2.0),
  (4.0, 3.0),
  (4.0, 1.1),
  (3.0, 1.0),
  (8.0, 64.0),
)


def _power(alpha):
  return PowerState(alpha, None, Static(pp.is_weight))


def _remap(phi, old, new):
  tree = {'m': {'w': phi}}
  return remap.remap(tree, _power(old), _power(new))['m']['w']


class RemapTest(parameterized.TestCase):
  @parameterized.parameters(*_PAIRS)
  def test_theta_stays_to_its_rounding(self, old, new):
    sizes = jnp.geomspace(1e-30, 1e3, 10_001, dtype=jnp.float32)
    theta = jnp.stack([sizes, -sizes])
    for store in (Static, jnp.float32):
      value = lambda alpha, store=store: (
        float(alpha) if store is Static else (jnp.float32(alpha))
      )
      phi = reparam.psi_inverse(theta, value(old))
      before = reparam.psi(phi, value(old))
      moved = _remap(phi, store(old), store(new))
      after = reparam.psi(moved, value(new))
      error = np.abs(np.asarray(after, np.float64) - np.asarray(before))
      self.assertTrue(np.all(error <= alphas.theta_bound(theta, old, new)))

  @parameterized.parameters(*_PAIRS)
  def test_zeros_stay_and_nothing_else_becomes_one(self, old, new):
    phi = jnp.array([[0.0, -0.0, 1e-3, -1e-3, 1.0, -5.0]])
    moved = _remap(phi, jnp.float32(old), jnp.float32(new))
    np.testing.assert_array_equal(np.sign(moved), np.sign(phi))
    np.testing.assert_array_equal(np.signbit(moved), np.signbit(phi))
    chex.assert_tree_all_finite(moved)

  @parameterized.parameters(1.0, 1.3, 4.0, 64.0)
  def test_nothing_moves_for_the_same_power(self, alpha):
    phi = jax.random.normal(jax.random.key(0), (50, 20)) ** 5
    for store in (Static, jnp.float32):
      moved = _remap(phi, store(alpha), store(alpha))
      np.testing.assert_array_equal(moved, phi)

  def test_weights_whose_theta_is_too_small_for_float32_live_on(self):
    phi = jnp.array([[1e-12, -1e-15]])  # θ = 1e-48 and 1e-60
    moved = _remap(phi, jnp.float32(4), jnp.float32(2))
    np.testing.assert_allclose(moved, [[1e-24, -1e-30]], rtol=1e-5)

  def test_leaves_that_are_not_selected_are_the_same_arrays(self):
    phi = {'m': {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}}
    moved = remap.remap(phi, _power(Static(1.0)), _power(Static(2.0)))
    self.assertIs(moved['m']['b'], phi['m']['b'])
