"""Top-KAST: A inside B; what is computed, trained and penalised."""

import itertools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

import powerprop_jax as pp

ROW = jnp.array([[5.0, -4.0, 3.0, -2.0, 1.0, 0.5, -0.25, 0.125, 0.0625, 0.01]])


def _theta():
  return {'a': {'w': ROW, 'b': jnp.ones(10)}}


def _tx(inner=None, sparsity=0.8, backward_sparsity=0.5, **options):
  inner = optax.sgd(0.1) if inner is None else inner
  return pp.top_kast(inner, sparsity, backward_sparsity, **options)


class TopKastTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0)
  def test_sizes_are_exact_and_a_is_inside_b_at_every_step(self, alpha):
    theta = small.normal({'a': {'w': (9, 7)}, 'n': {'w': (5, 4)}})
    tx = _tx(pp.powerprop(optax.adam(0.1), alpha))
    history = small.history(tx, theta, 8)
    sizes = {'a': 63, 'n': 20}
    shares = {share: pp.erk(theta, share) for share in (0.8, 0.5)}
    kept = lambda name, share: round(
      sizes[name] * (1 - shares[share][f'{name}/w'])
    )
    for _, state in history:
      for name in sizes:
        forward, rest = state.masks[name]['w'], state.memory[name]['w']
        self.assertEqual(int(forward.sum()), kept(name, 0.8))
        self.assertFalse((forward & rest).any())
        self.assertEqual(int((forward | rest).sum()), kept(name, 0.5))
    for (seen, _), (_, state) in itertools.pairwise(history):
      for name in sizes:
        # The sets are those of the weights that the network has just seen.
        [largest] = small.largest_of_all(
          [jnp.abs(seen[name]['w'])], kept(name, 0.8)
        )
        np.testing.assert_array_equal(state.masks[name]['w'], largest)

  def test_the_network_sees_a_b_is_trained_and_the_rest_stands_still(self):
    tx = _tx(penalty=0.0)
    phi, state = pp.init(tx, _theta())
    chex.assert_trees_all_equal(phi, _theta())
    for pinned in (False, True):
      seen = pp.effective_params(phi, state, pinned=pinned)['a']['w']
      np.testing.assert_array_equal(seen, [[5.0, -4.0] + [0.0] * 8])
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, phi), state, phi)
    np.testing.assert_allclose(updates['a']['w'], [[-0.1] * 5 + [0.0] * 5])
    np.testing.assert_allclose(updates['a']['b'], -0.1)

  @parameterized.parameters(
    ({}, 1e-4, 'l2'), ({'penalty': 0.1, 'norm': 'l1'}, 0.1, 'l1')
  )
  def test_the_penalty_is_a_gradient(self, options, rate, norm):
    """Of Σ_A + Σ_{B∖A}/D, under powerprop too: it is about θ."""
    tx = _tx(pp.powerprop(optax.sgd(1.0), 2.0), **options)
    phi, state = pp.init(tx, _theta())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, phi), state, phi)
    forward, rest = state.masks['a']['w'], state.memory['a']['w']

    def penalty(phi):
      theta = phi * jnp.abs(phi)
      size = jnp.abs(theta) if norm == 'l1' else theta**2 / 2
      return rate * jnp.sum(jnp.where(forward, size, size * rest / 0.2))

    np.testing.assert_allclose(
      updates['a']['w'], -jax.grad(penalty)(phi['a']['w']), rtol=1e-5
    )
    self.assertFalse(updates['a']['b'].any())

  def test_sets_are_chosen_anew_at_multiples_of_the_period(self):
    tx = _tx(optax.sgd(1.0), period=3, stop=7, penalty=0.0)
    phi, state = pp.init(tx, _theta())
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
    tx = _tx(optax.sgd(1.0), penalty=0.5, select=pp.by_regex('^a'))
    phi, state = pp.init(tx, theta)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, phi), state, phi)
    self.assertTrue(state.masks['n']['w'].all())
    self.assertFalse(state.memory['n']['w'].any())
    self.assertFalse(updates['n']['w'].any())

  def test_both_sets_may_be_everything(self):
    tx = _tx(sparsity=0.0, backward_sparsity=0.0)
    phi, state = pp.init(tx, _theta())
    chex.assert_trees_all_equal(pp.effective_params(phi, state), _theta())

  def test_a_distribution_that_inverts_the_sets(self):
    def odd(theta, sparsity, *, select):
      del theta, select
      return {'a/w': 1 - sparsity}

    with self.assertRaisesRegex(ValueError, "'a/w' 8 forward.*only 5 backward"):
      _tx(distribution=odd).init(_theta())
    _tx(distribution=pp.erk).init(_theta())
