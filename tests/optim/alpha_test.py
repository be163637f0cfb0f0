"""Controllers of α: the published rule, its readings, and what they refuse."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

import powerprop_jax as pp
from powerprop_jax.core import reparam
from powerprop_jax.optim.alphas import alpha as alpha_lib

# Readings, α at the start, and α after each reading.
_VECTORS = (
  (
    (0.50, 0.60, 0.70, 0.65, 0.66, 0.70, 0.71, 0.69, 0.69),
    1.5,
    (1.75, 2.125, 2.6875, 2.125, 2.225, 2.325, 2.425, 1.95, 2.05),
  ),
  ((0.5, 0.4, 0.3, 0.2), 2.0, (2.5, 2.0, 5 / 3, 13 / 9)),
  ((0.5, 0.6, 0.7), 1.0, (1.0, 1.0, 1.0)),
)


def _follow(readings, alpha, **kwargs):
  powers = []
  state = alpha_lib.AlphaState(jnp.float32(-jnp.inf), jnp.asarray(True))
  for reading in readings:
    alpha, state = alpha_lib.next_alpha(reading, alpha, state, **kwargs)
    powers.append(float(alpha))
  return powers


def _oracle(readings, alpha, growth, increment, alpha_max):
  """The table of the report, in Python numbers."""
  powers, previous, init = [], -np.inf, 1
  for s in readings:
    if s >= previous:
      alpha = 1 + growth * (alpha - 1) if init else alpha + increment
      alpha = min(alpha, alpha_max)
    else:
      alpha, init = 1 + (alpha - 1) / growth, 0
    powers.append(alpha)
    previous = s
  return powers


def _theta():
  return {
    'a': {'w': jnp.array([[0.005, 0.2, -0.009, 1.0]]), 'b': jnp.zeros(3)},
    'c': {'w': jnp.array([[0.05, -0.004]])},
  }


def _reading(controller, theta, masks=None, alpha=2.0):
  alpha = jnp.float32(alpha)
  masks = pp.masks.full_masks(theta) if masks is None else masks
  _, state = controller.update(theta, masks, alpha, controller.init(alpha))
  return state.previous


class AlphaTest(parameterized.TestCase):
  @parameterized.parameters(*_VECTORS)
  def test_follows_the_reference(self, readings, start, expected):
    powers = _follow(readings, jnp.float32(start))
    np.testing.assert_allclose(powers, expected, rtol=3e-7)

  @parameterized.parameters(0, 1, 2)
  def test_is_the_table_of_the_report(self, seed):
    random = np.random.default_rng(seed)
    # Few different readings, so that many are equal; then all the way down.
    readings = random.integers(0, 8, 60).astype(np.float32) / 8
    readings = np.concatenate([readings, -np.arange(80.0), [1.0]])
    rule = {'growth': 1.0 + random.uniform(0.2, 2), 'increment': 0.3}
    powers = _follow(readings, 1.4, alpha_max=3.0, **rule)
    expected = _oracle(readings, 1.4, alpha_max=3.0, **rule)
    np.testing.assert_allclose(powers, expected, rtol=1e-5)
    self.assertGreaterEqual(min(powers), 1)

  def test_a_reading_of_nan_is_a_fall_and_is_forgotten(self):
    alpha, state = alpha_lib.next_alpha(
      jnp.nan, 2.5, alpha_lib.AlphaState(jnp.float32(0.3), jnp.asarray(True))
    )
    np.testing.assert_allclose(alpha, 2)
    np.testing.assert_allclose(state.previous, 0.3)
    self.assertFalse(state.is_growing)

  @parameterized.parameters(
    (0.01, 3 / 6), (0.005, 1 / 6), (0.1, 4 / 6), (1e-6, 0.0), (2.0, 1.0)
  )
  def test_is_the_share_of_weights_below_epsilon(self, epsilon, expected):
    """Biases do not count, |θ| = epsilon is not below, and α is nothing."""
    controller = pp.near_zero_controller(epsilon)
    for alpha in (1.25, 2.0, 4.0):
      reading = _reading(controller, _theta(), alpha=alpha)
      np.testing.assert_allclose(reading, expected)

  def test_only_connections_count(self):
    masks = pp.masks.full_masks(_theta())
    masks['a']['w'] = jnp.array([[True, True, False, True]])
    masks['c']['w'] = jnp.array([[True, False]])
    theta = pp.apply_masks(_theta(), masks)
    reading = _reading(pp.near_zero_controller(), theta, masks)
    np.testing.assert_allclose(reading, 1 / 4)

  @parameterized.parameters(True, False)
  def test_is_zero_without_connections(self, relative):
    masks = jax.tree.map(jnp.zeros_like, pp.masks.full_masks(_theta()))
    controller = pp.near_zero_controller(relative=relative)
    np.testing.assert_array_equal(_reading(controller, _theta(), masks), 0)

  @parameterized.parameters(0, 1)
  def test_relative_to_the_spread_of_each_leaf(self, seed):
    random = np.random.default_rng(seed)
    theta = {
      name: {'w': jnp.asarray(random.normal(1, scale, (30, 20)), jnp.float32)}
      for name, scale in (('a', 0.1), ('b', 5.0))
    }
    masks = jax.tree.map(
      lambda x: jnp.asarray(random.uniform(size=x.shape) < 0.6), theta
    )
    controller = pp.near_zero_controller(0.7, relative=True)
    near = total = 0
    for name in theta:
      alive = np.asarray(theta[name]['w'])[np.asarray(masks[name]['w'])]
      near += np.sum(np.abs(alive) < 0.7 * np.std(alive))
      total += alive.size
    reading = _reading(controller, theta, masks)
    np.testing.assert_allclose(reading, near / total, atol=1.5 / total)
    scaled = jax.tree.map(lambda x: 8 * x, theta)
    np.testing.assert_array_equal(_reading(controller, scaled, masks), reading)

  def test_half_precision_weights_give_float32_readings(self):
    theta = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _theta())
    reading = _reading(pp.near_zero_controller(0.1), theta)
    np.testing.assert_allclose(reading, 4 / 6)
    self.assertEqual(reading.dtype, jnp.float32)

  @parameterized.parameters('ac', 'a')
  def test_each_selected_leaf_follows_its_own_readings(self, selected):
    """As one controller for each leaf would; the others are left alone."""
    alpha = {'a': {'w': jnp.float32(1.5)}, 'c': {'w': jnp.float32(2)}}
    chosen = pp.by_regex(f'[{selected}]/w')
    together = pp.near_zero_controller(per_leaf=True, select=chosen)
    state = together.init(alpha)
    alone = {
      name: pp.near_zero_controller(select=pp.by_regex(f'{name}/w'))
      for name in alpha
    }
    expected = {
      name: (alpha[name]['w'], alone[name].init(alpha[name]['w']))
      for name in alpha
    }
    random = np.random.default_rng(0)
    for _ in range(6):
      theta = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.02, x.shape), jnp.float32),
        _theta(),
      )
      masks = pp.masks.full_masks(theta)
      alpha, state = together.update(theta, masks, alpha, state)
      for name in selected:
        expected[name] = alone[name].update(theta, masks, *expected[name])
      for name in alpha:
        got = alpha_lib.AlphaState(*(tree[name]['w'] for tree in state))
        chex.assert_trees_all_equal((alpha[name]['w'], got), expected[name])

  @parameterized.parameters(
    ('epsilon', (0.0, -0.1, np.inf, np.nan), 'epsilon must be positive'),
    ('growth', (1.0, 0.5, -2.0, np.inf, np.nan), 'growth must be finite and m'),
    ('increment', (-0.1, np.inf, np.nan), 'increment must be finite and'),
    ('alpha_max', (1.0, 0.0, np.nan), 'alpha_max must be more than 1'),
    ('alpha_max', (65.0, 1000.0, np.inf), 'alpha_max must be at most 64, go'),
  )
  def test_settings(self, name, values, message):
    for value in values:
      with self.assertRaisesRegex(ValueError, message):
        pp.near_zero_controller(**{name: value})
      if name in ('growth', 'increment'):
        with self.assertRaisesRegex(ValueError, message):
          _follow([0.5], 2.0, **{name: value})
    pp.near_zero_controller(alpha_max=reparam.MAX_ALPHA)

  @parameterized.parameters(
    ({}, 1.0, r'start in \(1, 4\].*1 would stay'),
    ({}, 0.5, r'start in \(1, 4\]'),
    ({'alpha_max': 3.0}, 4.0, r'start in \(1, 3\], got 4\.$'),
    ({'per_leaf': True}, {'w': 1.0, 'v': 2.0}, "for 'm/w': growth"),
    ({'per_leaf': True}, 2.0, 'per_leaf needs one alpha for'),
    ({}, {'w': 2.0}, 'alpha is a tree.*per_leaf=True'),
  )
  def test_a_start_that_does_not_fit(self, settings, alpha, message):
    alpha = jax.tree.map(jnp.float32, alpha)
    alpha = {'m': alpha} if isinstance(alpha, dict) else alpha
    with self.assertRaisesRegex(ValueError, message):
      pp.near_zero_controller(**settings).init(alpha)

  def test_measuring_nothing(self):
    controller = pp.near_zero_controller(select=pp.by_regex('no'))
    with self.assertRaisesRegex(ValueError, 'select chose none'):
      _reading(controller, _theta())
    controller = pp.near_zero_controller(
      per_leaf=True, select=pp.by_regex('c/w')
    )
    alpha, theta = {'a': {'w': jnp.float32(1.5)}}, _theta()
    masks, state = pp.masks.full_masks(theta), controller.init(alpha)
    with self.assertRaisesRegex(ValueError, 'd: c/w; with an alpha: a/w'):
      controller.update(theta, masks, alpha, state)

  @parameterized.parameters(float, jnp.float32)
  def test_the_largest_alpha_is_inverted_to_1e_5(self, kind):
    theta = jnp.geomspace(1e-30, 1e3, 20_001, dtype=jnp.float32)

    def error(alpha):
      back = reparam.psi(reparam.psi_inverse(theta, alpha), alpha)
      back, exact = (np.asarray(x, np.float64) for x in (back, theta))
      return np.max(np.abs(back / exact - 1))

    self.assertLess(error(kind(reparam.MAX_ALPHA)), 1.05e-5)
    self.assertGreater(error(kind(2 * reparam.MAX_ALPHA)), 1.05e-5)
