"""Masks that never change: exact counts, published densities, refusals."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

import powerprop_jax as pp
from powerprop_jax.optim.topologies import fixed
from powerprop_jax.optim.topologies.counts import Budget


def _small():
  return small.normal(
    {'a': {'w': (8, 6), 'b': (6,)}, 'b': {'w': (6, 4)}, 'c': {'w': (2, 5)}}
  )


class FixedTest(parameterized.TestCase):
  def test_places_are_uniform(self):
    """Each of 10 places should have 2 of 5 connections' worth of masks."""
    theta = {'c': {'w': jnp.ones((2, 5))}}
    topology = fixed.at_random(0.6, distribution=pp.uniform)
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = jax.vmap(lambda key: topology.init(key, theta)[0]['c']['w'])(keys)
    share = np.mean(np.asarray(masks), axis=0)
    # Five standard deviations of a share of 0.4 among 4000.
    np.testing.assert_allclose(share, 0.4, atol=5 * np.sqrt(0.24 / 4000))

  def test_a_mapping_gives_each_leaf_its_own(self):
    state = pp.static(
      optax.sgd(0.1), {'a/w': 0.5, 'b/w': 0.0, 'c/w': 0.9}
    ).init(_small())
    counts = [int(state.masks[name]['w'].sum()) for name in 'abc']
    self.assertEqual(counts, [24, 24, 1])

  def test_unselected_leaves_are_dense(self):
    only_a = pp.by_regex('^a/w')
    state = pp.static(optax.sgd(0.1), 0.5, select=only_a).init(_small())
    self.assertEqual(int(state.masks['a']['w'].sum()), 24)
    self.assertTrue(state.masks['b']['w'].all())

  def _masks(self):
    return jax.tree.map(lambda x: x > 0, _small())

  def test_masks_are_those_given_and_survive_donation(self):
    masks, phi = self._masks(), _small()
    tx = pp.static(optax.sgd(0.1), masks=masks)
    phi, opt_state = pp.init(tx, phi)
    chex.assert_trees_all_equal(pp.current_masks(phi, opt_state), masks)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    step(phi, opt_state, phi)
    self.assertFalse(any(m.is_deleted() for m in jax.tree.leaves(masks)))

  def test_a_leaf_may_be_without_connections(self):
    """Pruning all leaves together may empty one; powerprop allows it too."""
    masks = self._masks()
    masks['b']['w'] = jnp.zeros_like(masks['b']['w'])
    for inner in (optax.sgd(0.1), pp.powerprop(optax.sgd(0.1), 2.0)):
      tx = pp.static(inner, masks=masks)
      phi, opt_state = pp.init(tx, _small())
      self.assertFalse(pp.effective_params(phi, opt_state)['b']['w'].any())

  def test_masks_of_other_shapes_name_the_leaf(self):
    for change, message in (
      ({'b': {'w': jnp.ones((4, 6), bool)}}, r"'b/w' is \(6, 4\)"),
      ({'b': {}}, "'b/w' .*nothing in the masks"),
      ({'d': {'w': jnp.ones(1, bool)}}, "'d/w' is nothing in the param"),
    ):
      tx = pp.static(optax.sgd(0.1), masks=self._masks() | change)
      with self.assertRaisesRegex(ValueError, message):
        pp.init(tx, _small())

  def test_numbers_are_not_masks(self):
    with self.assertRaisesRegex(
      TypeError, 'boolean, .* is float32.*masks != 0'
    ):
      fixed.given(_small())

  def test_a_leaf_that_would_lose_all_is_named_with_a_way_out(self):
    tx = pp.static(optax.sgd(0.1), 0.95, distribution=pp.uniform)
    message = "'c/w' has 10 weights.*overrides.*leave it out of select"
    with self.assertRaisesRegex(ValueError, message):
      tx.init(_small())
    # Both ways out.
    kept = functools.partial(pp.uniform, overrides={'^c/': 0.5})
    pp.static(optax.sgd(0.1), 0.9, distribution=kept).init(_small())
    left_out = pp.exclude(pp.is_weight, '^c/')
    pp.static(optax.sgd(0.1), 0.95, select=left_out).init(_small())

  def test_one_weight_may_be_all_that_is_left(self):
    theta = {'c': {'w': jnp.ones((2, 5))}}
    for sparsity in (0.9, {'c/w': 0.9}):
      state = pp.static(optax.sgd(0.1), sparsity).init(theta)
      self.assertEqual(int(state.masks['c']['w'].sum()), 1)
    with self.assertRaisesRegex(ValueError, 'would lose all'):
      pp.static(optax.sgd(0.1), 0.91).init(theta)

  def test_a_mapping_must_name_the_selected_leaves(self):
    for given in ({'a/w': 0.5}, {'a/w': 0.5, 'b/w': 0.5, 'c/w': 0.5, 'd': 0.1}):
      with self.assertRaisesRegex(ValueError, 'exactly.*a/w, b/w, c/w'):
        pp.static(optax.sgd(0.1), given).init(_small())
    bad = {'a/w': 0.5, 'b/w': 1.5, 'c/w': 0.5}
    with self.assertRaisesRegex(ValueError, "'b/w' must be in .*got 1.5"):
      pp.static(optax.sgd(0.1), bad).init(_small())

  def test_counts_need_shapes_only(self):
    shapes = jax.eval_shape(_small)
    self.assertEqual(Budget(0.75).counts(shapes), Budget(0.75).counts(_small()))
