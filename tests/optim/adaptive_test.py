"""adaptive_alpha: α changes inside the step, and θ does not notice."""

import functools

from absl.testing import parameterized
import alphas
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.optim import powerprop


def _look(seen):
  """A controller that changes nothing, and shows when it is asked."""

  def update(theta, masks, alpha, state):
    jax.debug.callback(lambda _: seen.append(1), alpha)
    return alpha, state

  return pp.AlphaController(lambda alpha: (), update)


def _sparse(inner, mode='keep'):
  moves = {'period': 2, 'stop': 100, 'replaces_step': False}
  return pp.rigl(inner, 0.5, regrow=mode, **moves)


class RuleTest(parameterized.TestCase):
  @parameterized.parameters((1, 0), (3, 0), (2, 5), (4, 1))
  def test_asks_at_the_end_of_each_period_after_the_warm_up(
    self, period, warm_up
  ):
    up = pp.AlphaController(
      lambda alpha: (), lambda theta, masks, alpha, state: (alpha + 1, state)
    )
    tx = pp.adaptive_alpha(
      alphas.power(2.0), up, period=period, warm_up=warm_up
    )
    powers = [float(alphas.alpha_of(state)) for _, state in small.run(tx, 12)]
    expected = [2.0 + max(0, n - warm_up) // period for n in range(13)]
    self.assertEqual(powers, expected)

  def test_asks_only_where_it_is_due(self):
    """In none of the lanes otherwise, where a condition would ask in all."""
    calls, counts = [], []
    tx = pp.adaptive_alpha(alphas.power(), _look(calls), period=3)
    start = pp.init(tx, small.weights())
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    step = jax.jit(jax.vmap(functools.partial(small.step, tx)))
    for _ in range(6):
      lanes = jax.block_until_ready(step(*lanes))
      jax.effects_barrier()
      counts.append(len(calls))
    self.assertEqual(counts, [0, 0, 2, 2, 2, 4])

  def test_lanes_at_different_steps_change_at_their_own(self):
    """Only the lane that is due moves."""
    tx = pp.adaptive_alpha(alphas.power(2.0), alphas.always(3.0), period=2)
    states = small.run(tx, 1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, after = jax.jit(jax.vmap(functools.partial(small.step, tx)))(*stacked)
    np.testing.assert_allclose(alphas.alpha_of(after), [2.0, 3.0])

  @parameterized.parameters(alphas.power, lambda: _sparse(alphas.power()))
  @pytest.mark.slow
  def test_equals_a_loop_that_calls_the_controller_itself(self, make):
    """It is shown the connections and θ as the step leaves them."""
    controller = pp.near_zero_controller(0.2)
    inside = small.run(pp.adaptive_alpha(make(), controller, period=3), 12)
    phi, opt_state = pp.init(make(), small.weights())
    alpha, remembered = jnp.float32(1.5), controller.init(jnp.float32(1.5))
    for step in range(1, 13):
      phi, opt_state = small.step(make(), phi, opt_state)
      if step % 3 == 0:
        alpha, remembered = controller.update(
          pp.effective_params(phi, opt_state),
          pp.current_masks(phi, opt_state),
          alpha,
          remembered,
        )
        phi, opt_state = pp.with_alpha(phi, opt_state, alpha)
      np.testing.assert_allclose(
        alphas.alpha_of(inside[step][1]), alpha, rtol=1e-6
      )
      chex.assert_trees_all_close(
        pp.effective_params(*inside[step]),
        pp.effective_params(phi, opt_state),
        rtol=1e-4,
        atol=1e-6,
      )
    self.assertNotEqual(float(alpha), 1.5)


_many = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()
_TREE = {'m': {'w': jnp.float32(1.5)}, 'n': {'w': jnp.float32(2)}}
# What is inside, its next α, and the number of updates at which that comes.
HELD = {
  'plain': (lambda: alphas.power(2.0), 3.0, 1),
  'tree': (lambda: pp.powerprop(optax.sgd(0.1, 0.9), _TREE), 2.5, 2),
  'decay': (
    lambda: optax.chain(alphas.power(2.0), pp.decay_phi(0.5, 0.1)),
    3.0,
    1,
  ),
  'accumulated': (lambda: _many(alphas.power(2.0)), 3.0, 2),
  'keep': (lambda: _sparse(alphas.power(2.0)), 3.0, 3),
  'redraw': (lambda: _sparse(alphas.power(2.0), 'redraw'), 3.0, 3),
  'smallest': (lambda: _sparse(alphas.power(2.0), 'smallest'), 1.6, 3),
  'top_kast': (lambda: pp.top_kast(alphas.power(2.0), 0.5, 0.2), 4.0, 2),
}


class HoldTest(parameterized.TestCase):
  @parameterized.product(name=tuple(HELD), outside=(False, True))
  @pytest.mark.slow
  def test_theta_slots_and_masks_are_those_at_the_old_alpha(
    self, name, outside
  ):
    """Behind the masks too; outside, a period counts whole steps."""
    make, new, period = HELD[name]
    wrap = _many if outside else lambda tx: tx
    tx = pp.adaptive_alpha(make(), alphas.always(new), period=period)
    num_steps = 2 * period if outside else period
    changed, plain = (
      small.run(wrap(inner), num_steps + 1) for inner in (tx, make())
    )
    was, power, expected = (
      powerprop.find_power_state(entries[step][1])
      for entries, step in (
        (changed, num_steps - 1),
        (changed, num_steps),
        (plain, num_steps),
      )
    )
    is_new = lambda a: bool(a == jnp.float32(new))
    self.assertFalse(any(map(is_new, jax.tree.leaves(was.alpha))))
    self.assertTrue(all(map(is_new, jax.tree.leaves(power.alpha))))
    chex.assert_trees_all_equal(power.inner_state, expected.inner_state)
    chex.assert_trees_all_close(
      powerprop.to_theta(changed[num_steps][0], power),
      powerprop.to_theta(plain[num_steps][0], expected),
      rtol=1e-5,
    )
    # Those of the next update are chosen by what is left.
    for step in (num_steps, num_steps + 1):
      chex.assert_trees_all_equal(
        *(pp.current_masks(*entries[step]) for entries in (changed, plain))
      )

  @parameterized.product(
    pair=((1.5, 1.75), (2.6875, 2.125), (4.0, 3.0), (4.0, 1.1), (1.1, 4.0)),
    scale=(1.0, 1e-9),
  )
  @pytest.mark.filterwarnings('ignore:.*start at exactly zero')
  def test_theta_stays_to_its_rounding(self, pair, scale):
    old, new = pair
    theta = small.weights(scale)
    theta['m']['w'] = theta['m']['w'].at[0, :2].set(jnp.array([0.0, -0.0]))
    tx = pp.adaptive_alpha(alphas.power(old), alphas.always(new), period=1)
    phi, opt_state = pp.init(tx, theta)
    before = pp.effective_params(phi, opt_state)
    changed = alphas.still(tx)(phi, opt_state)
    after = pp.effective_params(*changed)
    alphas.assert_theta_stays(before, after, old, new)
    np.testing.assert_array_equal(changed[0]['m']['w'][0, :2], 0)
    chex.assert_trees_all_equal(changed[0]['m']['b'], phi['m']['b'])

  @parameterized.product(
    pair=((1.5, 1.75), (3.0, 2.0)), form=('recommended', 'naive')
  )
  def test_holding_phi_moves_theta(self, pair, form):
    old, new = pair
    power = alphas.power(old, form=form)
    tx = pp.adaptive_alpha(power, alphas.always(new), period=1, hold='phi')
    phi, opt_state = pp.init(tx, small.weights())
    after_phi, after_state = alphas.still(tx)(phi, opt_state)
    chex.assert_trees_all_equal(after_phi, phi)
    after = pp.effective_params(after_phi, after_state)
    expected = jax.tree.map(
      lambda w: jnp.sign(w) * jnp.abs(w) ** (new / old), small.weights()
    )
    expected['m']['b'] = small.weights()['m']['b']
    chex.assert_trees_all_close(after, expected, rtol=1e-5)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_half_precision(self, dtype):
    """Gradients may be coarser than the weights, and both may be coarse."""
    power = alphas.power(4.0, optax.sgd(0.1))
    tx = pp.adaptive_alpha(power, alphas.always(2.0), period=1)
    phi, opt_state = pp.init(tx, small.weights())
    before = pp.effective_params(phi, opt_state)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), phi)
    updates, changed = tx.update(zeros, opt_state, phi)
    after = pp.effective_params(optax.apply_updates(phi, updates), changed)
    alphas.assert_theta_stays(before, after, 4.0, 2.0)
    coarse = jax.tree.map(lambda x: x.astype(dtype), small.weights())
    changed = alphas.still(tx)(*pp.init(tx, coarse))
    after = pp.effective_params(*changed)
    chex.assert_trees_all_equal_dtypes(changed[0], after, coarse)
    chex.assert_trees_all_close(after, coarse, rtol=0.05)


def _make(inner, **kwargs):
  kwargs = {'period': 1} | kwargs
  return pp.adaptive_alpha(inner, pp.near_zero_controller(), **kwargs)


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'period': 0}, 'period must.*got 0'),
    ({'period': -3}, 'period must.*got -3'),
    ({'warm_up': -1}, 'warm_up must be .* got -1'),
    ({'hold': 'both'}, "'theta' or 'phi', got 'both'"),
  )
  def test_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      _make(alphas.power(), **settings)

  @parameterized.parameters(
    (_make(pp.powerprop(optax.sgd(0.1), 2.0)), r'compiled in.*jnp\.float32'),
    (
      _make(pp.powerprop(optax.sgd(0.1), _TREE | {'n': {'w': 2.0}})),
      r'compiled in.*jnp\.float32',
    ),
    (_make(alphas.power(1.0)), r'must start in \(1, 4\], got 1'),
    (_make(optax.sgd(0.1)), 'one powerprop.*found 0'),
    (
      _make(optax.chain(alphas.power(), alphas.power())),
      'one powerprop.*found 2',
    ),
    (_make(alphas.power(form='naive')), "form='naive' keeps.*hold='phi'"),
  )
  def test_what_is_inside(self, tx, message):
    with self.assertRaisesRegex(ValueError, message):
      pp.init(tx, small.weights())
