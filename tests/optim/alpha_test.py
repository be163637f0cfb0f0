"""Controllers of α: the published rule, its readings, and what they refuse."""

from absl.testing import parameterized
import alphas
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import powerprop_jax as pp
from powerprop_jax.core import reparam, select
from powerprop_jax.optim import alpha as alpha_lib

_EPS = float(jnp.finfo(jnp.float32).eps)


def _first():
  return alpha_lib.AlphaState(jnp.float32(-jnp.inf), jnp.asarray(True))


def _follow(readings, alpha, **kwargs):
  powers, growing, state = [], [], _first()
  for reading in readings:
    alpha, state = alpha_lib.next_alpha(reading, alpha, state, **kwargs)
    powers.append(float(alpha))
    growing.append(bool(state.is_growing))
  return powers, growing


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


class NextAlphaTest(parameterized.TestCase):
  @parameterized.parameters(*alphas.VECTORS)
  def test_follows_the_reference(self, readings, start, expected):
    powers, _ = _follow(readings, jnp.float32(start))
    np.testing.assert_allclose(powers, expected, rtol=2 * _EPS)

  @parameterized.parameters(0, 1, 2)
  def test_is_the_table_of_the_report(self, seed):
    random = np.random.default_rng(seed)
    # Few different readings, so that many are equal.
    readings = random.integers(0, 8, 60).astype(np.float32) / 8
    rule = {'growth': 1.0 + random.uniform(0.2, 2), 'increment': 0.3}
    powers, _ = _follow(readings, 1.4, alpha_max=3.0, **rule)
    expected = _oracle(readings, 1.4, alpha_max=3.0, **rule)
    np.testing.assert_allclose(powers, expected, rtol=1e-5)
    self.assertGreaterEqual(min(powers), 1)
    self.assertLessEqual(max(powers), 3)

  def test_the_first_phase_never_returns(self):
    readings = np.random.default_rng(0).uniform(size=50)
    _, growing = _follow(readings, 1.5)
    first_fall = int(np.argmax(np.diff(readings) < 0)) + 1
    self.assertEqual(growing, [i < first_fall for i in range(50)])

  @parameterized.parameters(1.5, 3.0)
  def test_falls_to_one_at_the_lowest_and_leaves_it_again(self, growth):
    powers, _ = _follow(-np.arange(80.0), 2.0, growth=growth)
    self.assertBetween(powers[-1], 1, 1 + _EPS)
    alpha, _ = alpha_lib.next_alpha(
      0.5, powers[-1], alpha_lib.AlphaState(0.4, False)
    )
    np.testing.assert_allclose(alpha, 1.1, rtol=1e-6)

  def test_a_reading_of_nan_is_a_fall_and_is_forgotten(self):
    alpha, state = alpha_lib.next_alpha(
      jnp.nan, 2.5, alpha_lib.AlphaState(jnp.float32(0.3), jnp.asarray(True))
    )
    np.testing.assert_allclose(alpha, 2)
    np.testing.assert_allclose(state.previous, 0.3)
    self.assertFalse(state.is_growing)

  def test_keeps_types_under_jit_and_vmap(self):
    step = jax.jit(jax.vmap(alpha_lib.next_alpha))
    state = jax.tree.map(lambda x: jnp.stack([x, x]), _first())
    alpha, after = step(jnp.zeros(2), jnp.array([1.5, 2.0]), state)
    np.testing.assert_allclose(alpha, [1.75, 2.5])
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def _theta():
  return {
    'a': {'w': jnp.array([[0.005, 0.2, -0.009, 1.0]]), 'b': jnp.zeros(3)},
    'c': {'w': jnp.array([[0.05, -0.004]])},
  }


def _reading(controller, theta, masks=None, alpha=None):
  alpha = jnp.float32(2) if alpha is None else alpha
  masks = pp.masks.full_masks(theta) if masks is None else masks
  _, state = controller.update(theta, masks, alpha, controller.init(alpha))
  return state.previous


class ReadingTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.01, 3 / 6), (0.005, 1 / 6), (0.1, 4 / 6), (1e-6, 0.0), (2.0, 1.0)
  )
  def test_is_the_share_of_weights_below_epsilon(self, epsilon, expected):
    """Biases do not count, and |θ| = epsilon is not below."""
    controller = alpha_lib.near_zero_controller(epsilon)
    np.testing.assert_allclose(_reading(controller, _theta()), expected)

  def test_only_connections_count(self):
    masks = pp.masks.full_masks(_theta())
    masks['a']['w'] = jnp.array([[True, True, False, True]])
    masks['c']['w'] = jnp.array([[True, False]])
    theta = pp.apply_masks(_theta(), masks)
    reading = _reading(alpha_lib.near_zero_controller(), theta, masks)
    np.testing.assert_allclose(reading, 1 / 4)

  @parameterized.parameters(True, False)
  def test_is_zero_without_connections(self, relative):
    masks = jax.tree.map(jnp.zeros_like, pp.masks.full_masks(_theta()))
    controller = alpha_lib.near_zero_controller(relative=relative)
    np.testing.assert_array_equal(_reading(controller, _theta(), masks), 0)

  def test_selected_leaves_only(self):
    controller = alpha_lib.near_zero_controller(select=select.by_regex('c/w'))
    np.testing.assert_allclose(_reading(controller, _theta()), 1 / 2)

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
    controller = alpha_lib.near_zero_controller(0.7, relative=True)
    near = total = 0
    for name in theta:
      alive = np.asarray(theta[name]['w'])[np.asarray(masks[name]['w'])]
      near += np.sum(np.abs(alive) < 0.7 * np.std(alive))
      total += alive.size
    reading = _reading(controller, theta, masks)
    np.testing.assert_allclose(reading, near / total, atol=1.5 / total)
    scaled = jax.tree.map(lambda x: 8 * x, theta)
    np.testing.assert_array_equal(_reading(controller, scaled, masks), reading)

  def test_does_not_depend_on_alpha(self):
    controller = alpha_lib.near_zero_controller()
    readings = [
      _reading(controller, _theta(), alpha=jnp.float32(alpha))
      for alpha in (1.25, 2.0, 4.0)
    ]
    self.assertEqual(len(set(map(float, readings))), 1)

  def test_half_precision_weights_give_float32_readings(self):
    theta = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _theta())
    reading = _reading(alpha_lib.near_zero_controller(0.1), theta)
    np.testing.assert_allclose(reading, 4 / 6)
    self.assertEqual(reading.dtype, jnp.float32)


class PerLeafTest(parameterized.TestCase):
  def test_each_leaf_follows_its_own_readings(self):
    """As one controller for each leaf would."""
    alpha = {'a': {'w': jnp.float32(1.5)}, 'c': {'w': jnp.float32(2)}}
    together = alpha_lib.near_zero_controller(per_leaf=True)
    state = together.init(alpha)
    alone = {
      name: alpha_lib.near_zero_controller(select=select.by_regex(f'{name}/w'))
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
      for name in alpha:
        expected[name] = alone[name].update(theta, masks, *expected[name])
        got = (
          alpha[name]['w'],
          alpha_lib.AlphaState(
            state.previous[name]['w'], state.is_growing[name]['w']
          ),
        )
        chex.assert_trees_all_equal(got, expected[name])

  def test_leaves_that_are_not_selected_are_left_alone(self):
    alpha = {'a': {'w': jnp.float32(1.5)}, 'c': {'w': jnp.float32(2)}}
    controller = alpha_lib.near_zero_controller(
      per_leaf=True, select=select.by_regex('a/w')
    )
    state = controller.init(alpha)
    theta = _theta()
    after, new_state = controller.update(
      theta, pp.masks.full_masks(theta), alpha, state
    )
    np.testing.assert_allclose(after['a']['w'], 1.75)
    np.testing.assert_array_equal(after['c']['w'], 2)
    np.testing.assert_array_equal(new_state.previous['c']['w'], -jnp.inf)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)

  def test_refuses_when_nothing_is_measured(self):
    theta = _theta()
    alpha = {'a': {'w': jnp.float32(1.5)}}
    controller = alpha_lib.near_zero_controller(
      per_leaf=True, select=select.by_regex('c/w')
    )
    with pytest.raises(ValueError, match='Selected: c/w; with an alpha: a/w'):
      controller.update(
        theta, pp.masks.full_masks(theta), alpha, controller.init(alpha)
      )


class RefusalsTest(parameterized.TestCase):
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
        alpha_lib.near_zero_controller(**{name: value})
      if name in ('growth', 'increment'):
        with self.assertRaisesRegex(ValueError, message):
          alpha_lib.next_alpha(0.5, 2.0, _first(), **{name: value})

  def test_the_largest_cap_is_accepted(self):
    alpha_lib.near_zero_controller(alpha_max=reparam.MAX_ALPHA)

  @parameterized.parameters(1.0, 0.5)
  def test_a_start_that_would_stay(self, alpha):
    with self.assertRaisesRegex(ValueError, r'start in \(1, 4\].*1 would stay'):
      alpha_lib.near_zero_controller().init(jnp.float32(alpha))
    per_leaf = alpha_lib.near_zero_controller(per_leaf=True)
    with self.assertRaisesRegex(ValueError, "for 'm/w': growth"):
      per_leaf.init({'m': {'w': jnp.float32(alpha), 'v': jnp.float32(2)}})

  def test_a_start_above_the_cap(self):
    with self.assertRaisesRegex(ValueError, r'start in \(1, 3\], got 4\.$'):
      alpha_lib.near_zero_controller(alpha_max=3.0).init(jnp.float32(4))

  def test_one_alpha_for_many_and_many_for_one(self):
    with self.assertRaisesRegex(ValueError, 'per_leaf needs one alpha for'):
      alpha_lib.near_zero_controller(per_leaf=True).init(jnp.float32(2))
    with self.assertRaisesRegex(ValueError, 'alpha is a tree.*per_leaf=True'):
      alpha_lib.near_zero_controller().init({'m': {'w': jnp.float32(2)}})

  def test_a_select_that_selects_nothing(self):
    controller = alpha_lib.near_zero_controller(select=select.by_regex('no'))
    with self.assertRaisesRegex(ValueError, 'select chose none'):
      _reading(controller, _theta())


@pytest.mark.parametrize('static', [True, False])
def test_the_largest_alpha_is_inverted_to_1e_5(static):
  theta = jnp.geomspace(1e-30, 1e3, 20_001, dtype=jnp.float32)

  def error(alpha):
    power = float(alpha) if static else jnp.float32(alpha)
    back = reparam.psi(reparam.psi_inverse(theta, power), power)
    exact = np.asarray(theta, np.float64)
    return np.max(np.abs(np.asarray(back, np.float64) / exact - 1))

  assert error(reparam.MAX_ALPHA) < 1.05e-5
  assert error(2 * reparam.MAX_ALPHA) > 1.2e-5
