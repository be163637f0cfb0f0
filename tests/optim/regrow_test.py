"""The first value of a new connection, and why it is not zero under α > 1."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.core import masks, schedules
from powerprop_jax.optim import powerprop, regrow
from powerprop_jax.optim.topologies import drop_grow, fixed


def _theta(dtype=jnp.float32):
  return small.two_layers((12, 10), (5, 8), dtype)


def _rigl(inner, **options):
  return pp.rigl(inner, 0.5, stop=100, period=1, start=0, **options)


def _power(alpha=2.0, inner=None):
  inner = optax.sgd(0.1) if inner is None else inner
  return pp.powerprop(inner, alpha)


def _one_rewiring(inner, mode, theta):
  """State before, gradients, and state and θ after one rewiring."""
  tx, grads = _rigl(inner, regrow=mode), small.grads(0, theta)
  (_, old), (moved, new) = small.history(tx, theta, 1, lambda i: grads)
  # Without the masks, to see what is behind them too.
  power = powerprop.find_power_state(new)
  return old, grads, new, powerprop.to_theta(moved, power)


class RegrowTest(parameterized.TestCase):
  @parameterized.product(
    case=(
      (1.0, 'keep'),
      (2.0, 'keep'),
      (3.0, None),
      (jnp.float32(2), None),  # the default under a power
    ),
    dtype=(jnp.float32, jnp.bfloat16),
  )
  def test_keep_is_the_value_from_before(self, case, dtype):
    alpha, mode = case
    old, _, new, theta = _one_rewiring(_power(alpha), mode, _theta(dtype))
    self.assertFalse(new.pins)
    self.assertTrue(masks.difference(new.masks, old.masks)['a']['w'].any())
    # Dense: what lies behind a mask is still there.
    rtol = 1e-5 if dtype == jnp.float32 else 2e-2
    chex.assert_trees_all_close(theta, _theta(dtype), rtol=rtol)

  @parameterized.product(
    alpha=(1.0, 2.0, 3.0), dtype=(jnp.float32, jnp.bfloat16)
  )
  def test_smallest_has_the_smallest_size_and_descends(self, alpha, dtype):
    start = _theta(dtype)
    old, grads, new, theta = _one_rewiring(_power(alpha), 'smallest', start)
    for name in 'an':
      before, after = old.masks[name]['w'], new.masks[name]['w']
      reborn = np.asarray(after & ~before)
      self.assertTrue(reborn.any())
      survivors = np.asarray(start[name]['w'])[np.asarray(after & before)]
      value = np.asarray(theta[name]['w'], np.float32)[reborn]
      least = np.abs(survivors).min().astype(np.float32)
      rtol = 1e-5 if dtype == jnp.float32 else 2e-2
      np.testing.assert_allclose(np.abs(value), least, rtol)
      slope = np.asarray(grads[name]['w'])[reborn]
      np.testing.assert_array_equal(np.sign(value), -np.sign(slope))

  def test_smallest_by_hand(self):
    row = lambda *values: {'w': jnp.array([values])}
    got = regrow.smallest(
      row(3.0, -2.0, 0.0, 0.5, 0.0, 0.0, 0.0),
      row(0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0),
      row(True, True, True, False, False, False, False),
    )['w'][0, 4:]
    # 0.5 does not survive, the survivor 0 is no size, and what has no gradient
    # is positive.
    np.testing.assert_array_equal(got, [-2.0, 2.0, 2.0])

  def test_redraw_has_the_first_scale_of_its_leaf(self):
    theta = {
      'a': {'w': 3.0 * jax.random.normal(jax.random.key(0), (300, 100))},
      'n': {'w': 0.1 * jax.random.normal(jax.random.key(1), (100, 80))},
    }
    half = schedules.constant(0.5)
    tx = _rigl(_power(), regrow='redraw', drop_fraction=half, key=4)
    (_, old), (phi, new) = small.history(tx, theta, 1)
    moved = pp.effective_params(phi, new)
    for name, scale in (('a', 3.0), ('n', 0.1)):
      reborn = np.asarray(new.masks[name]['w'] & ~old.masks[name]['w'])
      drawn = np.asarray(moved[name]['w'])[reborn] / scale
      self.assertGreater(drawn.size, 500)
      tolerance = 5 / np.sqrt(drawn.size)
      self.assertLess(abs(np.mean(drawn)), tolerance)
      self.assertLess(abs(np.std(drawn) - 1), tolerance)

  @parameterized.parameters('zero', 'keep', 'redraw', 'smallest')
  def test_what_is_dropped_and_grown_at_once_keeps_its_value(self, mode):
    """Here each gradient is largest where the weight is smallest."""
    tx = pp.sparsify(
      optax.sgd(0.1),
      drop_grow.drop_grow(
        {'w': 0.5},
        schedules.at(0),
        0.5,
        drop_grow.by_gradient,
        replaces_step=True,
      ),
      regrow=mode,
    )
    phi = {'w': jnp.array([[4.0, 3.0, 2.0, 1.0, 0.5, 0.25]])}
    phi, state = pp.init(tx, phi)
    grads = jax.tree.map(lambda m: jnp.where(m, 1.0, 0.0), state.masks)
    updates, new = tx.update(grads, state, phi)
    chex.assert_trees_all_equal(new.masks, state.masks)
    np.testing.assert_array_equal(updates['w'], 0.0)

  @parameterized.parameters(
    (2.0,),
    (jnp.float32(2),),
    # Arrays cannot be looked at in a program, so these count as α > 1.
    (jnp.float32(1),),
    ({'a': {'w': 1.0}, 'n': {'w': 1.5}},),
    ({'a': {'w': 1.0}, 'n': {'w': jnp.float32(1.5)}},),
  )
  def test_zero_is_refused(self, alpha):
    tx = _rigl(_power(alpha), regrow='zero')
    message = "regrow='zero' .* φ = 0.*Use regrow='"
    with self.assertRaisesRegex(ValueError, message):
      pp.init(tx, _theta())

  @parameterized.product(
    inner=(
      optax.sgd(0.1),
      _power(1.0),
      _power({'a': {'w': 1.0}, 'n': {'w': 1}}),
    ),
    mode=(None, 'zero'),
  )
  def test_zero_is_zero_and_the_default_where_it_works(self, inner, mode):
    old, _, new, theta = _one_rewiring(inner, mode, _theta())
    reborn = masks.difference(new.masks, old.masks)
    self.assertTrue(reborn['a']['w'].any() and reborn['n']['w'].any())
    values = pp.apply_masks(theta, reborn)
    self.assertFalse(optax.tree.norm(values))
    self.assertTrue(new.pins)

  def test_a_power_raised_later_is_refused_too(self):
    tx = _rigl(_power(1.0), regrow='zero')
    phi, state = pp.with_alpha(*pp.init(tx, _theta()), 2.0)
    with self.assertRaisesRegex(ValueError, "regrow='zero'"):
      tx.update(phi, state, phi)

  def test_connections_grown_after_a_power_was_raised_are_alive(self):
    tx = _rigl(_power(1.0, optax.sgd(0.05)))
    phi, state = pp.with_alpha(*pp.init(tx, _theta()), 2.0)
    self.assertTrue(state.pins)
    for seed in range(4):
      phi, state = _one_more(tx, phi, state, seed)
      for name in 'an':
        # What has no connection is held at zero still.
        alive = phi[name]['w'] != 0
        np.testing.assert_array_equal(alive, state.masks[name]['w'])

  @parameterized.parameters((2.0,), (jnp.float32(2),))
  def test_connections_grown_in_pruned_weights_are_alive(self, alpha):
    kept = {'a': {'w': 0.8, 'b': 0.0}, 'n': {'w': 0.8}}
    theta = jax.tree.map(
      lambda t, k: jnp.where(jnp.abs(t) > k, t, 0), _theta(), kept
    )
    tx = _rigl(_power(alpha, optax.sgd(0.05)))
    with pytest.warns(UserWarning, match='start at exactly zero'):
      phi, state = pp.init(tx, theta)
    for seed in range(3):
      before, old = phi, state
      phi, state = _one_more(tx, phi, state, seed)
    for name in 'an':
      was, now = (np.asarray(s.masks[name]['w']) for s in (old, state))
      size, new = (np.abs(np.asarray(p[name]['w'])) for p in (before, phi))
      dead = now & ~was & (size == 0)
      self.assertTrue(dead.any())
      least = size[now & was & (size > 0)].min()
      np.testing.assert_array_equal(new[dead], least)
      self.assertTrue(new[now].all())

  def test_zeros_are_left_alone_where_alpha_is_one(self):
    tx = _rigl(_power(jnp.float32(1), optax.sgd(0.0)))
    theta = _theta()
    theta['a']['w'] = theta['a']['w'].at[:6].set(0)
    phi, state = _one_more(tx, *pp.init(tx, theta), 0)
    self.assertTrue((state.masks['a']['w'] & (phi['a']['w'] == 0)).any())

  def test_masks_that_would_add_dead_connections_are_refused(self):
    full = masks.full_masks(_theta())
    for mode in ('redraw', 'keep'):
      _, state = pp.init(_rigl(_power(), regrow=mode), _theta())
      fewer = jax.tree.map(lambda m: m.at[::2].set(False), state.masks)
      pp.with_masks(state, fewer)
      if mode == 'keep':
        pp.with_masks(state, full)
        continue
      with self.assertRaisesRegex(ValueError, "would add .* to 'a/w'"):
        pp.with_masks(state, full)

  def test_a_topology_may_prescribe(self):
    topology = fixed.at_random(0.5)
    with self.assertRaisesRegex(ValueError, "prescribes regrow='zero'.*'keep'"):
      pp.sparsify(optax.sgd(0.1), topology, regrow='keep')
    pp.sparsify(optax.sgd(0.1), topology, regrow='zero')


def _one_more(tx, phi, state, seed):
  """φ and the state after an update by random gradients."""
  updates, state = tx.update(small.grads(seed, phi), state, phi)
  return optax.apply_updates(phi, updates), state
