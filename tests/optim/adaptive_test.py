"""adaptive_alpha: α changes inside the step, and θ does not notice."""

import functools

from absl.testing import parameterized
import alphas
import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import reparam, trees
from powerprop_jax.optim import powerprop


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(*alphas.VECTORS[:2])
  def test_follows_the_reference_on_crafted_weights(
    self, readings, start, expected
  ):
    """φ is set before each step so that a share of θ is below epsilon."""
    tx = pp.adaptive_alpha(
      alphas.power(start, optax.sgd(0.1)), pp.near_zero_controller(), period=1
    )
    place = jnp.arange(100).reshape(10, 10)
    weights = lambda share: {
      'm': {'w': jnp.where(place < round(100 * share), 0.009, 0.5)}
    }
    _, opt_state = pp.init(tx, weights(0.5))
    powers, step = [], alphas.still(tx)
    for reading in readings:
      phi = pp.latent_params(weights(reading), opt_state)
      _, opt_state = step(phi, opt_state)
      powers.append(float(alphas.alpha_of(opt_state)))
    np.testing.assert_allclose(powers, expected, rtol=3e-7)

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

  def test_measures_theta_as_the_step_leaves_it(self):
    seen = []

    def look(theta, masks, alpha, state):
      jax.debug.callback(lambda t: seen.append(t), theta)
      return alpha, state

    tx = pp.adaptive_alpha(
      alphas.power(), pp.AlphaController(lambda alpha: (), look), period=1
    )
    _, after = small.run(tx, 1)
    jax.effects_barrier()
    chex.assert_trees_all_close(seen[-1], pp.effective_params(*after))

  def test_asks_only_where_it_is_due(self):
    """In none of the lanes otherwise, where a condition would ask in all."""
    calls = []

    def look(theta, masks, alpha, state):
      jax.debug.callback(lambda _: calls.append(1), alpha)
      return alpha, state

    tx = pp.adaptive_alpha(
      alphas.power(), pp.AlphaController(lambda alpha: (), look), period=3
    )
    lanes = jax.tree.map(
      lambda x: jnp.stack([x, x]), pp.init(tx, small.weights())
    )
    step = jax.jit(jax.vmap(functools.partial(small.step, tx)))
    counts = []
    for _ in range(6):
      lanes = step(*lanes)
      jax.block_until_ready(lanes)
      jax.effects_barrier()
      counts.append(len(calls))
    self.assertEqual(counts, [0, 0, 2, 2, 2, 4])

  def test_equals_a_loop_that_calls_the_controller_itself(self):
    controller = pp.near_zero_controller(0.2)
    tx = pp.adaptive_alpha(alphas.power(), controller, period=3)
    inside = small.run(tx, 12)
    phi, opt_state = pp.init(alphas.power(), small.weights())
    alpha, remembered = jnp.float32(1.5), controller.init(jnp.float32(1.5))
    for step in range(1, 13):
      phi, opt_state = small.step(alphas.power(), phi, opt_state)
      if step % 3 == 0:
        theta = pp.effective_params(phi, opt_state)
        alpha, remembered = controller.update(
          theta, pp.masks.full_masks(theta), alpha, remembered
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

  def test_one_alpha_for_each_leaf(self):
    alpha = {'m': {'w': jnp.float32(1.5)}, 'n': {'w': jnp.float32(2)}}
    tx = pp.adaptive_alpha(
      pp.powerprop(optax.sgd(0.1), alpha),
      pp.near_zero_controller(0.1, per_leaf=True),
      period=2,
    )
    before, after = small.run(tx, 2)[1:]
    chex.assert_trees_all_close(
      alphas.alpha_of(after[1]), {'m': {'w': 1.75}, 'n': {'w': 2.5}}
    )
    plain = pp.powerprop(optax.sgd(0.1), alpha)
    phi, _ = small.step(plain, before[0], plain.init(before[0]))
    chex.assert_trees_all_close(
      pp.effective_params(*after),
      pp.effective_params(phi, plain.init(phi)),
      rtol=1e-5,
    )


class HoldTest(parameterized.TestCase):
  @parameterized.product(
    pair=((1.5, 1.75), (2.6875, 2.125), (4.0, 3.0), (4.0, 1.1), (1.1, 4.0)),
    scale=(1.0, 1e-9),
  )
  @pytest.mark.filterwarnings('ignore:.*start at exactly zero')
  def test_theta_stays_to_its_rounding(self, pair, scale):
    """Added to φ as a step, and set by with_alpha."""
    old, new = pair
    theta = small.weights(scale)
    theta['m']['w'] = theta['m']['w'].at[0, :2].set(jnp.array([0.0, -0.0]))
    tx = pp.adaptive_alpha(alphas.power(old), alphas.always(new), period=1)
    phi, opt_state = pp.init(tx, theta)
    before = pp.effective_params(phi, opt_state)
    changed = alphas.still(tx)(phi, opt_state)
    np.testing.assert_allclose(alphas.alpha_of(changed[1]), new)
    alphas.assert_theta_stays(before, pp.effective_params(*changed), old, new)
    np.testing.assert_array_equal(changed[0]['m']['w'][0, :2], 0)
    chex.assert_trees_all_equal(changed[0]['m']['b'], phi['m']['b'])
    set_phi, set_state = pp.with_alpha(phi, opt_state, new)
    after = pp.effective_params(set_phi, set_state)
    for name in ('m', 'n'):
      a, b = (np.asarray(x[name]['w'], np.float64) for x in (before, after))
      self.assertTrue(np.all(np.abs(b - a) <= alphas.theta_bound(a, old, new)))
    if scale == 1:  # so the loss does not notice
      for theta in (pp.effective_params(*changed), after):
        np.testing.assert_allclose(
          small.loss(theta), small.loss(before), rtol=1e-6
        )

  def test_a_way_down_and_up_again_keeps_theta(self):
    powers = (3.0, 2.0, 1.5, 1.2, 2.0, 3.5, 4.0, 1.5)
    tx = pp.adaptive_alpha(
      alphas.power(4.0), alphas.set_alpha(*powers), period=1
    )
    phi, opt_state = pp.init(tx, small.weights())
    before = pp.effective_params(phi, opt_state)
    step = alphas.still(tx)
    for _ in powers:
      phi, opt_state = step(phi, opt_state)
    chex.assert_trees_all_close(
      pp.effective_params(phi, opt_state), before, rtol=2e-5
    )

  @parameterized.parameters((1.5, 1.75), (3.0, 2.0))
  def test_holding_phi_moves_theta(self, old, new):
    tx = pp.adaptive_alpha(
      alphas.power(old), alphas.always(new), period=1, hold='phi'
    )
    phi, opt_state = pp.init(tx, small.weights())
    before = pp.effective_params(phi, opt_state)
    after_phi, after_state = alphas.still(tx)(phi, opt_state)
    chex.assert_trees_all_equal(after_phi, phi)
    after = pp.effective_params(after_phi, after_state)
    for name in ('m', 'n'):
      w = before[name]['w']
      np.testing.assert_allclose(
        after[name]['w'], jnp.sign(w) * jnp.abs(w) ** (new / old), rtol=1e-5
      )
    chex.assert_trees_all_equal(after['m']['b'], before['m']['b'])

  def test_slots_of_the_optimiser_stay(self):
    tx = pp.adaptive_alpha(alphas.power(2.0), alphas.always(3.0), period=1)
    plain = alphas.power(2.0)
    after, expected = (small.run(t, 1)[1][1] for t in (tx, plain))
    chex.assert_trees_all_equal(
      after.inner_state.inner_state, expected.inner_state
    )

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_half_precision(self, dtype):
    """Gradients may be coarser than the weights, and both may be coarse."""
    tx = pp.adaptive_alpha(
      alphas.power(4.0, optax.sgd(0.1)), alphas.always(2.0), period=1
    )
    phi, opt_state = pp.init(tx, small.weights())
    before = pp.effective_params(phi, opt_state)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), phi)
    updates, changed = tx.update(zeros, opt_state, phi)
    after = pp.effective_params(optax.apply_updates(phi, updates), changed)
    alphas.assert_theta_stays(before, after, 4.0, 2.0)
    coarse = jax.tree.map(lambda x: x.astype(dtype), small.weights())
    phi, opt_state = pp.init(tx, coarse)
    after_phi, changed = alphas.still(tx)(phi, opt_state)
    chex.assert_trees_all_equal_dtypes(after_phi, phi)
    chex.assert_trees_all_close(
      pp.effective_params(after_phi, changed), coarse, rtol=0.05
    )


class WrappersTest(parameterized.TestCase):
  def test_decay_of_phi_inside(self):
    """Its step is part of what θ is held at."""
    make = lambda: optax.chain(alphas.power(2.0), pp.decay_phi(0.5, 0.1))
    tx = pp.adaptive_alpha(make(), alphas.always(3.0), period=1)
    adaptive, plain = small.run(tx, 1)[1], small.run(make(), 1)[1]
    np.testing.assert_allclose(alphas.alpha_of(adaptive[1]), 3)
    chex.assert_trees_all_close(
      pp.effective_params(*adaptive), pp.effective_params(*plain), rtol=1e-5
    )

  def test_refuses_decay_of_phi_around(self):
    tx = optax.chain(
      pp.adaptive_alpha(alphas.power(), pp.near_zero_controller(), period=1),
      pp.decay_phi(1e-3, 0.1),
    )
    with self.assertRaisesRegex(ValueError, 'decay_phi goes inside'):
      pp.init(tx, small.weights())

  @parameterized.parameters(True, False)
  def test_gradients_are_accumulated(self, outside):
    """Outside, a period counts whole steps; inside, mini-steps."""
    many = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()
    adapt = lambda tx: pp.adaptive_alpha(
      tx, alphas.set_alpha(3.0, 4.0), period=2
    )
    tx = (
      many(adapt(alphas.power(2.0)))
      if outside
      else adapt(many(alphas.power(2.0)))
    )
    runs, plain = small.run(tx, 4), small.run(many(alphas.power(2.0)), 4)
    powers = [float(alphas.alpha_of(state)) for _, state in runs]
    expected = [2, 2, 2, 2, 3] if outside else [2, 2, 3, 3, 4]
    np.testing.assert_allclose(powers, expected)
    last = 4 if outside else 2
    chex.assert_trees_all_close(
      pp.effective_params(*runs[last]),
      pp.effective_params(*plain[last]),
      rtol=1e-5,
    )

  def test_extra_arguments_reach_the_optimiser(self):
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = pp.adaptive_alpha(
      alphas.power(2.0, optax.chain(optax.sgd(0.1), plateau)),
      pp.near_zero_controller(),
      period=1,
    )
    phi, opt_state = pp.init(tx, small.weights())
    tx.update(small.weights(), opt_state, phi, value=jnp.float32(1))


class CompiledTest(parameterized.TestCase):
  def test_alpha_changes_in_a_scan_that_is_compiled_once(self):
    tx = pp.adaptive_alpha(
      alphas.power(), pp.near_zero_controller(0.1), period=2
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def train(phi, opt_state):
      def body(carry, _):
        carry = small.step(tx, *carry)
        return carry, alphas.alpha_of(carry[1])

      return jax.lax.scan(body, (phi, opt_state), length=8)

    carry, first = train(*pp.init(tx, small.weights()))
    _, second = train(*carry)
    powers = np.concatenate([first, second])
    self.assertGreater(len(np.unique(powers)), 3)
    np.testing.assert_array_equal(powers[1::2][:-1], powers[2::2])

  def test_lanes_with_different_alphas(self):
    def train(alpha, scale):
      tx = pp.adaptive_alpha(
        pp.powerprop(optax.sgd(0.1, 0.9), alpha),
        pp.near_zero_controller(0.2),
        period=2,
      )
      theta = jax.tree.map(lambda x: x * scale, small.weights())
      body = lambda carry, _: (
        small.step(tx, *carry),
        alphas.alpha_of(carry[1]),
      )
      return jax.lax.scan(body, pp.init(tx, theta), length=7)

    powers, scales = jnp.array([1.25, 2.0, 3.0]), jnp.array([1.0, 0.3, 0.5])
    together = jax.jit(jax.vmap(train))(powers, scales)
    alone_jit = jax.jit(train)
    for i in range(3):
      alone = alone_jit(powers[i], scales[i])
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-3, atol=1e-5
      )
    self.assertGreater(len(np.unique(together[1])), 5)

  def test_lanes_at_different_steps_change_at_their_own(self):
    """Only the lane that is due moves."""
    tx = pp.adaptive_alpha(alphas.power(2.0), alphas.always(3.0), period=2)
    states = small.run(tx, 1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, after = jax.jit(jax.vmap(functools.partial(small.step, tx)))(*stacked)
    np.testing.assert_allclose(alphas.alpha_of(after), [2.0, 3.0])

  @parameterized.parameters(True, False)
  @pytest.mark.slow
  def test_eight_devices_do_as_one(self, explicit):
    theta = {
      'm': {'w': jax.random.normal(jax.random.key(0), (16, 8))},
      'n': {'w': jax.random.normal(jax.random.key(1), (8, 12))},
    }
    specs = {
      'm': {'w': PartitionSpec('x', 'y')},
      'n': {'w': PartitionSpec(None, 'x')},
    }
    tx = pp.adaptive_alpha(
      alphas.power(), pp.near_zero_controller(0.3, relative=True), period=1
    )

    def train(theta):
      phi, opt_state = pp.init(tx, theta)
      update, powers = jax.jit(tx.update), []
      for i in range(3):
        wave = jax.tree.map(lambda p, i=i: 0.3 * jnp.sin(3 * p + i), phi)
        updates, opt_state = update(wave, opt_state, phi)
        phi = optax.apply_updates(phi, updates)
        powers.append(float(alphas.alpha_of(opt_state)))
      return phi, powers

    alone, powers_alone = train(theta)
    mesh, sharded = small.on_devices(theta, specs, explicit)
    with jax.set_mesh(mesh):
      phi, powers = train(sharded)
    np.testing.assert_allclose(powers, powers_alone, rtol=1e-6)
    self.assertNotEqual(powers[0], powers[-1])
    host = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_close(host(phi), host(alone), atol=1e-5)
    for name in specs:
      self.assertEqual(phi[name]['w'].sharding.spec, specs[name]['w'])


def _sparse(inner, mode='keep', **kwargs):
  moves = {'period': 2, 'stop': 100, 'regrow': mode}
  return pp.rigl(inner, 0.5, **moves, **kwargs)


class SparseTest(parameterized.TestCase):
  @parameterized.parameters(('keep', 3.0), ('redraw', 3.0), ('smallest', 1.6))
  @pytest.mark.slow
  def test_alpha_and_connections_change_in_one_step(self, mode, new):
    """Masks and θ, behind the masks too, are those at the old α."""
    make = lambda: _sparse(alphas.power(2.0), mode, replaces_step=False)
    tx = pp.adaptive_alpha(make(), alphas.always(new), period=3)
    sparse, plain = small.run(tx, 3), small.run(make(), 3)
    before, after = sparse[2][1].inner_state, sparse[3][1].inner_state
    moved = masks_lib.difference(after.masks, before.masks)
    self.assertTrue(moved['m']['w'].any())
    np.testing.assert_allclose(alphas.alpha_of(after), new)
    chex.assert_trees_all_equal(after.masks, plain[3][1].masks)
    theta = lambda phi, state: powerprop.to_theta(
      phi, trees.find_states(state, pp.PowerState)[0]
    )
    got, expected = theta(*sparse[3]), theta(*plain[3])
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    if mode != 'keep':
      phi = sparse[3][0]
      chex.assert_trees_all_equal(phi, masks_lib.apply_masks(phi, after.masks))

  def test_only_connections_are_measured(self):
    tx = pp.adaptive_alpha(
      _sparse(alphas.power()), pp.near_zero_controller(0.3), period=1
    )
    phi, opt_state = small.run(tx, 1)[1]
    theta = pp.effective_params(phi, opt_state)
    masks = pp.current_masks(phi, opt_state)
    alive = np.concatenate(
      [np.asarray(theta[n]['w'])[np.asarray(masks[n]['w'])] for n in 'mn']
    )
    np.testing.assert_allclose(
      opt_state.controller_state.previous, np.mean(np.abs(alive) < 0.3)
    )

  def test_top_kast_ranks_weights_behind_the_mask_as_at_the_old_alpha(self):
    make = lambda: pp.top_kast(alphas.power(2.0), 0.5, 0.2)
    tx = pp.adaptive_alpha(make(), alphas.always(4.0), period=2)
    adaptive, plain = small.run(tx, 3)[3], small.run(make(), 3)[3]
    chex.assert_trees_all_equal(
      pp.current_masks(*adaptive), pp.current_masks(*plain)
    )

  def test_refuses_to_be_inside_sparsify(self):
    tx = _sparse(
      pp.adaptive_alpha(alphas.power(), pp.near_zero_controller(), period=1)
    )
    with self.assertRaisesRegex(ValueError, 'sparsify goes inside adaptive'):
      pp.init(tx, small.weights())
    opt_state = tx.init(small.weights())
    with self.assertRaisesRegex(ValueError, 'sparsify goes inside adaptive'):
      pp.effective_params(small.weights(), opt_state)


class RefusalsTest(parameterized.TestCase):
  def _make(self, inner, **kwargs):
    kwargs = {'period': 1} | kwargs
    return pp.adaptive_alpha(inner, pp.near_zero_controller(), **kwargs)

  @parameterized.parameters(
    ({'period': 0}, 'period must.*got 0'),
    ({'period': -3}, 'period must.*got -3'),
    ({'warm_up': -1}, 'warm_up must be .* got -1'),
    ({'hold': 'both'}, "'theta' or 'phi', got 'both'"),
  )
  def test_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      self._make(alphas.power(), **settings)

  @parameterized.parameters(
    (pp.powerprop(optax.sgd(0.1), 2.0), r'compiled in.*jnp\.float32'),
    (
      pp.powerprop(
        optax.sgd(0.1), {'m': {'w': jnp.float32(2)}, 'n': {'w': 2.0}}
      ),
      r'compiled in.*jnp\.float32',
    ),
    (alphas.power(1.0), r'must start in \(1, 4\], got 1'),
    (optax.sgd(0.1), 'one powerprop.*found 0'),
    (optax.chain(alphas.power(), alphas.power()), 'one powerprop.*found 2'),
  )
  def test_what_is_inside(self, inner, message):
    with self.assertRaisesRegex(ValueError, message):
      pp.init(self._make(inner), small.weights())

  def test_the_naive_form_unless_phi_is_held(self):
    naive = lambda: alphas.power(form='naive')
    with self.assertRaisesRegex(ValueError, "form='naive' keeps.*hold='phi'"):
      pp.init(self._make(naive()), small.weights())
    small.run(self._make(naive(), hold='phi'), 2)

  def test_update_without_parameters(self):
    tx = self._make(alphas.power())
    with self.assertRaisesRegex(ValueError, 'effective_params'):
      tx.update(small.weights(), tx.init(small.weights()))


def test_the_bound_on_alpha_is_what_the_docstrings_say():
  assert reparam.MAX_ALPHA == 64
