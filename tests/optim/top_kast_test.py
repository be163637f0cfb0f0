"""Top-KAST: A inside B; what is computed, trained and penalised."""

import itertools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

from powerprop_jax.core import distributions, masks, select
from powerprop_jax.optim import aliases, powerprop, views

ROW = jnp.array([[5.0, -4.0, 3.0, -2.0, 1.0, 0.5, -0.25, 0.125, 0.0625, 0.01]])


def _theta():
  return {'a': {'w': ROW, 'b': jnp.ones(10)}}


def _tx(inner=None, sparsity=0.8, backward_sparsity=0.5, **options):
  inner = optax.sgd(0.1) if inner is None else inner
  return aliases.top_kast(inner, sparsity, backward_sparsity, **options)


class TopKastTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0)
  def test_sizes_are_exact_and_a_is_inside_b_at_every_step(self, alpha):
    theta = small.normal({'a': {'w': (9, 7)}, 'n': {'w': (5, 4)}})
    tx = _tx(powerprop.powerprop(optax.adam(0.1), alpha))
    history = small.history(tx, theta, 8)
    sizes = {'a': 63, 'n': 20}
    for _, state in history:
      for name, size in sizes.items():
        forward, rest = state.masks[name]['w'], state.memory[name]['w']
        self.assertEqual(int(forward.sum()), masks.num_kept(size, 0.8))
        self.assertFalse((forward & rest).any())
        self.assertEqual(int((forward | rest).sum()), masks.num_kept(size, 0.5))
    for (seen, _), (_, state) in itertools.pairwise(history):
      for name, size in sizes.items():
        # The sets are those of the weights that the network has just seen.
        [largest] = small.largest_of_all(
          [jnp.abs(seen[name]['w'])], masks.num_kept(size, 0.8)
        )
        np.testing.assert_array_equal(state.masks[name]['w'], largest)

  def test_the_network_sees_a_and_everything_else_stays_in_phi(self):
    tx = _tx()
    phi, state = views.init(tx, _theta())
    chex.assert_trees_all_equal(phi, _theta())
    seen = views.effective_params(phi, state)['a']['w']
    np.testing.assert_array_equal(seen, [[5.0, -4.0] + [0.0] * 8])
    pinned = views.effective_params(phi, state, pinned=True)['a']['w']
    np.testing.assert_array_equal(seen, pinned)

  def test_b_is_trained_and_what_is_outside_stands_still(self):
    tx = _tx(penalty=0.0)
    phi, state = views.init(tx, _theta())
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, phi), state, phi)
    np.testing.assert_allclose(updates['a']['w'], [[-0.1] * 5 + [0.0] * 5])
    np.testing.assert_allclose(updates['a']['b'], -0.1)

  @parameterized.parameters(
    # D = 0.2: on A the slope itself, on the rest of B five times as much.
    ('l2', [5.0, -4.0, 15.0, -10.0, 5.0]),
    ('l1', [1.0, -1.0, 5.0, -5.0, 5.0]),
  )
  def test_the_penalty_by_hand(self, norm, slopes):
    tx = _tx(optax.sgd(1.0), penalty=0.01, norm=norm)
    phi, state = views.init(tx, _theta())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, phi), state, phi)
    wanted = [-0.01 * s for s in slopes] + [0.0] * 5
    np.testing.assert_allclose(updates['a']['w'], [wanted], rtol=1e-6)
    self.assertFalse(updates['a']['b'].any())

  @parameterized.parameters('l1', 'l2')
  def test_the_penalty_is_a_gradient(self, norm):
    """Of Σ_A + Σ_{B∖A}/D, under powerprop too: it is about θ."""
    tx = _tx(powerprop.powerprop(optax.sgd(1.0), 2.0), penalty=0.1, norm=norm)
    phi, state = views.init(tx, _theta())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, phi), state, phi)
    forward, rest = state.masks['a']['w'], state.memory['a']['w']

    def penalty(phi):
      theta = phi * jnp.abs(phi)
      size = jnp.abs(theta) if norm == 'l1' else theta**2 / 2
      return 0.1 * jnp.sum(jnp.where(forward, size, size * rest / 0.2))

    np.testing.assert_allclose(
      updates['a']['w'], -jax.grad(penalty)(phi['a']['w']), rtol=1e-5
    )

  def test_a_weight_can_grow_into_a(self):
    tx = _tx(optax.sgd(1.0), penalty=0.0)
    push = jax.tree.map(jnp.zeros_like, _theta())
    push['a']['w'] = push['a']['w'].at[0, 4].set(-9.0)
    still = jax.tree.map(jnp.zeros_like, push)
    history = small.history(tx, _theta(), 2, lambda i: still if i else push)
    np.testing.assert_array_equal(
      views.effective_params(*history[-1])['a']['w'],
      [[5.0, 0.0, 0.0, 0.0, 10.0] + [0.0] * 5],
    )

  def test_sets_are_chosen_anew_at_multiples_of_the_period(self):
    tx = _tx(optax.sgd(1.0), period=3, stop=7, penalty=0.0)
    phi, state = views.init(tx, _theta())
    changed = []
    for i in range(10):
      # Another order of sizes at every step, which the masks follow or not.
      shuffled = jnp.roll(ROW, i + 1, axis=1)
      moved = {'a': {'w': shuffled, 'b': phi['a']['b']}}
      _, new = tx.update(jax.tree.map(jnp.zeros_like, phi), state, moved)
      if not np.array_equal(new.masks['a']['w'], state.masks['a']['w']):
        changed.append(i)
      state = new
    self.assertEqual(changed, [0, 3, 6])

  def test_leaves_that_are_not_selected_are_dense_and_free(self):
    theta = {'a': {'w': ROW}, 'n': {'w': ROW}}
    tx = _tx(optax.sgd(1.0), penalty=0.5, select=select.by_regex('^a'))
    phi, state = views.init(tx, theta)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, phi), state, phi)
    self.assertTrue(state.masks['n']['w'].all())
    self.assertFalse(state.memory['n']['w'].any())
    self.assertFalse(updates['n']['w'].any())

  def test_both_sets_may_be_everything(self):
    tx = _tx(sparsity=0.0, backward_sparsity=0.0)
    phi, state = views.init(tx, _theta())
    chex.assert_trees_all_equal(views.effective_params(phi, state), _theta())


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'sparsity': 1.0}, r'forward_sparsity must be in \[0, 1\), got 1.0'),
    ({'backward_sparsity': -0.1}, r'backward_sparsity must be in .*got -0.1'),
    ({'backward_sparsity': 0.9}, 'at most forward_sparsity, got 0.9 and 0.8'),
    ({'penalty': -1.0}, 'penalty must be at least 0, got -1.0'),
    ({'penalty': float('nan')}, 'penalty must be at least 0, got nan'),
    ({'norm': 'l0'}, "norm must be 'l1' or 'l2', got 'l0'"),
    ({'period': 0}, 'period must be at least 1, got 0'),
    ({'stop': 0}, 'stop must be after start'),
  )
  def test_bad_arguments(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _tx(**options)

  def test_a_distribution_that_inverts_the_sets(self):
    def odd(theta, sparsity, *, select):
      del theta, select
      return {'a/w': 1 - sparsity}

    with self.assertRaisesRegex(ValueError, "'a/w' 8 forward.*only 5 backward"):
      _tx(distribution=odd).init(_theta())
    _tx(distribution=distributions.erk).init(_theta())
