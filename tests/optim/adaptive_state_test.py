"""adaptive_alpha compiled, in lanes, sharded, and around sparse training."""

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
from powerprop_jax.core import trees
from powerprop_jax.optim import powerprop


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
