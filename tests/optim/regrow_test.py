"""The first value of a new connection, and why it is not zero under α > 1."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from powerprop_jax.core import masks, schedules, trees
from powerprop_jax.optim import aliases, powerprop, regrow, sparsify, views
from powerprop_jax.optim.topologies import drop_grow, fixed

_MODES = ('zero', 'keep', 'redraw', 'smallest')


def _theta():
  return small.two_layers((12, 10), (5, 8))


def _rigl(inner, **options):
  return aliases.rigl(inner, 0.5, stop=100, period=1, start=0, **options)


def _one_rewiring(inner, mode):
  """State and θ before, gradients, and state and θ after one rewiring."""
  tx, grads = _rigl(inner, regrow=mode), small.grads(0, _theta())
  (_, old), (moved, new) = small.history(tx, _theta(), 1, lambda i: grads)
  # Without the masks, to see what is behind them too.
  power = trees.find_states(new, powerprop.PowerState)
  theta = powerprop.to_theta(moved, power[0]) if power else moved
  return old, grads, new, theta


def _one_more(tx, phi, state, seed):
  """φ and the state after an update by random gradients."""
  grads = small.grads(seed, phi)
  updates, state = tx.update(grads, state, phi)
  return optax.apply_updates(phi, updates), state


class ValuesTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0, 3.0)
  def test_keep_is_the_value_from_before(self, alpha):
    power = powerprop.powerprop(optax.sgd(0.1), alpha)
    old, _, new, theta = _one_rewiring(power, 'keep')
    self.assertFalse(new.pins)
    self.assertTrue(masks.difference(new.masks, old.masks)['a']['w'].any())
    # Dense: what lies behind a mask is still there.
    chex.assert_trees_all_close(theta, _theta(), rtol=1e-5)

  @parameterized.parameters(1.0, 2.0, 3.0)
  def test_smallest_has_the_smallest_size_and_descends(self, alpha):
    power = powerprop.powerprop(optax.sgd(0.1), alpha)
    old, grads, new, theta = _one_rewiring(power, 'smallest')
    for name in 'an':
      before, after = old.masks[name]['w'], new.masks[name]['w']
      reborn = np.asarray(after & ~before)
      self.assertTrue(reborn.any())
      survivors = np.asarray(_theta()[name]['w'])[np.asarray(after & before)]
      value = np.asarray(theta[name]['w'])[reborn]
      np.testing.assert_allclose(
        np.abs(value), np.abs(survivors).min(), rtol=1e-5
      )
      slope = np.asarray(grads[name]['w'])[reborn]
      np.testing.assert_array_equal(np.sign(value), -np.sign(slope))

  def test_smallest_by_hand(self):
    row = lambda *values: {'w': jnp.array([values])}
    got = regrow.values(
      'smallest',
      jax.random.key(0),
      row(3.0, -2.0, 0.0, 0.5, 0.0, 0.0, 0.0),
      row(0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0),
      (),
      row(True, True, True, True, False, False, False),
      row(True, True, True, False, True, True, True),
    )['w'][0, 4:]
    # 0.5 does not survive, the survivor 0 is no size, and what has no gradient
    # is positive.
    np.testing.assert_array_equal(got, [-2.0, 2.0, 2.0])

  def test_redraw_has_the_first_scale_of_its_leaf(self):
    theta = {
      'a': {'w': 3.0 * jax.random.normal(jax.random.key(0), (300, 100))},
      'n': {'w': 0.1 * jax.random.normal(jax.random.key(1), (100, 80))},
    }
    tx = _rigl(
      powerprop.powerprop(optax.sgd(0.1), 2.0),
      regrow='redraw',
      drop_fraction=schedules.constant(0.5),
      key=4,
    )
    (_, old), (phi, new) = small.history(tx, theta, 1)
    moved = views.effective_params(phi, new)
    for name, scale in (('a', 3.0), ('n', 0.1)):
      reborn = np.asarray(new.masks[name]['w'] & ~old.masks[name]['w'])
      drawn = np.asarray(moved[name]['w'])[reborn] / scale
      self.assertGreater(drawn.size, 500)
      tolerance = 5 / np.sqrt(drawn.size)
      self.assertLess(abs(np.mean(drawn)), tolerance)
      self.assertLess(abs(np.std(drawn) - 1), tolerance)

  @parameterized.parameters(*_MODES)
  def test_what_is_dropped_and_grown_at_once_keeps_its_value(self, mode):
    """Here each gradient is largest where the weight is smallest."""
    tx = sparsify.sparsify(
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
    phi, state = views.init(tx, phi)
    grads = jax.tree.map(lambda m: jnp.where(m, 1.0, 0.0), state.masks)
    updates, new = tx.update(grads, state, phi)
    chex.assert_trees_all_equal(new.masks, state.masks)
    np.testing.assert_array_equal(updates['w'], 0.0)


class DefaultsAndRefusalsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('number', 2.0),
    ('array', jnp.float32(2)),
    # Arrays cannot be looked at in a program, so these count as α > 1.
    ('array_one', jnp.float32(1)),
    ('tree', {'a': {'w': 1.0}, 'n': {'w': 1.5}}),
    ('tree_array', {'a': {'w': 1.0}, 'n': {'w': jnp.float32(1.5)}}),
  )
  def test_zero_is_refused(self, alpha):
    tx = _rigl(powerprop.powerprop(optax.sgd(0.1), alpha), regrow='zero')
    with self.assertRaisesRegex(
      ValueError, "regrow='zero' .* φ = 0.*Use regrow='"
    ):
      views.init(tx, _theta())

  @parameterized.named_parameters(
    ('none', optax.sgd(0.1)),
    ('one', powerprop.powerprop(optax.sgd(0.1), 1.0)),
    (
      'ones',
      powerprop.powerprop(optax.sgd(0.1), {'a': {'w': 1.0}, 'n': {'w': 1}}),
    ),
  )
  def test_zero_is_zero_and_the_default_where_it_works(self, inner):
    for mode in (None, 'zero'):
      old, _, new, theta = _one_rewiring(inner, mode)
      for name in 'an':
        reborn = masks.difference(new.masks, old.masks)[name]['w']
        self.assertTrue(reborn.any())
        self.assertFalse(theta[name]['w'][reborn].any())
      self.assertTrue(new.pins)

  @parameterized.named_parameters(('number', 2.0), ('array', jnp.float32(2)))
  def test_the_default_under_a_power_is_to_keep(self, alpha):
    inner = powerprop.powerprop(optax.sgd(0.1), alpha)
    _, _, new, theta = _one_rewiring(inner, None)
    _, _, kept, same = _one_rewiring(inner, 'keep')
    chex.assert_trees_all_equal((new.masks, theta), (kept.masks, same))

  def test_a_power_raised_later_is_refused_too(self):
    tx = _rigl(powerprop.powerprop(optax.sgd(0.1), 1.0), regrow='zero')
    phi, state = views.init(tx, _theta())
    phi, state = views.with_alpha(phi, state, 2.0)
    with self.assertRaisesRegex(ValueError, "regrow='zero'"):
      tx.update(phi, state, phi)

  def test_connections_grown_after_a_power_was_raised_are_alive(self):
    tx = _rigl(powerprop.powerprop(optax.sgd(0.05), 1.0))
    phi, state = views.init(tx, _theta())
    phi, state = views.with_alpha(phi, state, 2.0)
    self.assertTrue(state.pins)
    for seed in range(4):
      phi, state = _one_more(tx, phi, state, seed)
      for name in 'an':
        alive = phi[name]['w'][state.masks[name]['w']] != 0
        self.assertTrue(alive.all())
        # What has no connection is held at zero still.
        self.assertFalse(phi[name]['w'][~state.masks[name]['w']].any())

  @parameterized.named_parameters(('number', 2.0), ('array', jnp.float32(2)))
  def test_connections_grown_in_pruned_weights_are_alive(self, alpha):
    theta = _theta()
    kept = {'a': {'w': 0.8, 'b': 0.0}, 'n': {'w': 0.8}}
    theta = jax.tree.map(
      lambda t, k: jnp.where(jnp.abs(t) > k, t, 0), theta, kept
    )
    tx = _rigl(powerprop.powerprop(optax.sgd(0.05), alpha))
    with pytest.warns(UserWarning, match='start at exactly zero'):
      phi, state = views.init(tx, theta)
    old = state
    for seed in range(3):
      before, old = phi, state
      phi, state = _one_more(tx, phi, state, seed)
    for name in 'an':
      new = state.masks[name]['w'] & ~old.masks[name]['w']
      dead = new & (before[name]['w'] == 0)
      self.assertTrue(dead.any())
      survivors = state.masks[name]['w'] & old.masks[name]['w']
      size = jnp.abs(before[name]['w'])
      least = jnp.min(size, where=survivors & (size > 0), initial=jnp.inf)
      np.testing.assert_array_equal(jnp.abs(phi[name]['w'][dead]), least)
      self.assertTrue((phi[name]['w'][state.masks[name]['w']] != 0).all())

  def test_zeros_are_left_alone_where_alpha_is_one(self):
    tx = _rigl(powerprop.powerprop(optax.sgd(0.0), jnp.float32(1)))
    theta = _theta()
    theta['a']['w'] = theta['a']['w'].at[:6].set(0)
    phi, state = views.init(tx, theta)
    phi, state = _one_more(tx, phi, state, 0)
    self.assertTrue((state.masks['a']['w'] & (phi['a']['w'] == 0)).any())

  def test_masks_that_would_add_dead_connections_are_refused(self):
    power = powerprop.powerprop(optax.sgd(0.1), 2.0)
    theta = _theta()
    for regrow_, is_refused in (('redraw', True), ('keep', False)):
      _, state = views.init(_rigl(power, regrow=regrow_), theta)
      full = masks.full_masks(theta)
      if is_refused:
        with self.assertRaisesRegex(ValueError, "would add .* to 'a/w'"):
          views.with_masks(state, full)
      else:
        views.with_masks(state, full)
      fewer = jax.tree.map(
        lambda m: m & (jnp.arange(m.size) % 2 == 0).reshape(m.shape),
        state.masks,
      )
      views.with_masks(state, fewer)

  @parameterized.parameters(*_MODES[1:])
  def test_a_power_changed_later_keeps_training(self, mode):
    tx = _rigl(powerprop.powerprop(optax.adam(0.1), 1.5), regrow=mode)
    phi, state = views.init(tx, _theta())
    phi, state = views.with_alpha(phi, state, 2.0)
    grads = small.grads(0, phi)
    updates, new = tx.update(grads, state, phi)
    self.assertTrue(masks.difference(new.masks, state.masks)['a']['w'].any())
    chex.assert_tree_all_finite(updates)

  def test_unknown_names_are_refused(self):
    with self.assertRaisesRegex(ValueError, "redraw, smallest, got 'random'"):
      _rigl(optax.sgd(0.1), regrow='random')

  def test_a_topology_may_prescribe(self):
    topology = fixed.at_random(0.5)
    with self.assertRaisesRegex(ValueError, "prescribes regrow='zero'.*'keep'"):
      sparsify.sparsify(optax.sgd(0.1), topology, regrow='keep')
    sparsify.sparsify(optax.sgd(0.1), topology, regrow='zero')
