"""One-shot pruning: exact counts, the order of ranks, sweeps in one program."""

import math

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax.core import distributions, masks, reparam, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.prune import one_shot

SPARSITIES = (0.0, 0.29, 0.5, 0.9, 0.98)


def make_theta(seed=0, ties=False):
  """A small network: three kernels, biases, a norm and a name inside a name."""
  theta = small.normal(
    {
      'net/conv': {'w': (3, 3, 2, 5), 'b': (5,)},
      'net/conv/inner': {'w': (7, 11)},
      'net/logits': {'w': (17, 1), 'b': (1,)},
      'net/norm': {'scale': (1, 1, 5)},
    },
    seed,
  )
  return jax.tree.map(jnp.round, theta) if ties else theta


def by_name(tree):
  return {
    leaf.path: np.asarray(leaf.value) for leaf in trees.named_leaves(tree)
  }


def top_mask(values, k):
  return small.largest_of_all([values], k)[0]


def weights(theta):
  return [leaf.path for leaf in trees.named_leaves(theta) if leaf.name == 'w']


class LayerTest(parameterized.TestCase):
  @parameterized.product(sparsity=SPARSITIES, ties=[True, False])
  def test_each_leaf_keeps_exactly_its_count_of_the_largest(
    self, sparsity, ties
  ):
    theta = make_theta(ties=ties)
    pruned = by_name(one_shot.prune(theta, sparsity))
    for name, value in by_name(theta).items():
      if name.endswith('/w'):
        kept = masks.num_kept(value.size, sparsity)
        np.testing.assert_array_equal(
          pruned[name], top_mask(np.abs(value), kept), name
        )
        self.assertEqual(pruned[name].sum(), kept)
      else:
        self.assertTrue(pruned[name].all(), name)

  @parameterized.parameters(1.5, 2.0, 3.0, 4.0)
  def test_latent_and_effective_weights_rank_alike(self, alpha):
    phi = make_theta()
    theta = trees.map_selected(
      lambda x: reparam.psi(x, alpha), select_lib.is_weight, phi
    )
    for scope in ('layer', 'global'):
      chex.assert_trees_all_equal(
        one_shot.prune(phi, 0.8, scope=scope),
        one_shot.prune(theta, 0.8, scope=scope),
      )

  def test_any_score_can_rank(self):
    theta = make_theta()
    largest = jax.tree.map(jnp.negative, theta)
    pruned = one_shot.prune(theta, 0.5, score=lambda theta: largest)
    value = np.asarray(theta['net/logits']['w'])
    np.testing.assert_array_equal(
      pruned['net/logits']['w'], top_mask(-value, masks.num_kept(17, 0.5))
    )

  @parameterized.parameters(jnp.nan, jnp.inf)
  def test_weights_that_are_not_finite_are_refused(self, value):
    theta = make_theta()
    theta['net/logits']['w'] = theta['net/logits']['w'].at[0].set(value)
    with self.assertRaisesRegex(ValueError, "'net/logits/w' holds a number"):
      one_shot.prune(theta, 0.5)
    jax.eval_shape(lambda theta: one_shot.prune(theta, 0.5), theta)

  def test_a_distribution_gives_each_leaf_its_sparsity(self):
    theta = make_theta()
    sparsities = distributions.erk(theta, 0.7)
    pruned = by_name(one_shot.prune(theta, sparsities))
    sizes = {name: pruned[name].size for name in sparsities}
    for name, sparsity in sparsities.items():
      self.assertLess(abs(pruned[name].sum() - sizes[name] * (1 - sparsity)), 1)
    total = sum(pruned[name].sum() for name in sparsities)
    self.assertEqual(total, masks.num_kept(sum(sizes.values()), 0.7))
    # In a mapping of one's own each leaf counts by itself.
    pruned = by_name(one_shot.prune(theta, dict(sparsities)))
    for name, sparsity in sparsities.items():
      count = masks.num_kept(sizes[name], sparsity)
      self.assertEqual(pruned[name].sum(), count)

  def test_the_output_layer_can_keep_twice_the_fraction(self):
    """The recipe of the authors' notebook."""
    theta = {
      'a': {'w': jnp.ones((100, 10))},
      'logits': {'w': jnp.ones((10, 10))},
    }
    for kept in (0.01, 0.1, 0.5):
      overrides = {'logits/w$': max(0.0, 1 - 2 * kept)}
      counts = one_shot.kept_counts(theta, 1 - kept, overrides=overrides)
      self.assertEqual(counts['a/w'], math.ceil(round(1000 * kept, 6)))
      self.assertEqual(
        counts['logits/w'], min(100, math.ceil(round(200 * kept, 6)))
      )

  def test_a_single_weight_is_never_pruned(self):
    theta = {'a': {'w': jnp.ones((1, 1))}}
    self.assertTrue(one_shot.prune(theta, 0.99)['a']['w'].all())

  def test_half_precision_weights_are_ranked_as_they_are(self):
    theta = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_theta())
    pruned = by_name(one_shot.prune(theta, 0.5))
    value = np.asarray(theta['net/conv']['w'].astype(jnp.float32))
    np.testing.assert_array_equal(
      pruned['net/conv/w'], top_mask(np.abs(value), 45)
    )


class GlobalTest(parameterized.TestCase):
  @parameterized.product(sparsity=SPARSITIES, ties=[True, False])
  def test_the_whole_keeps_exactly_its_count_of_the_largest(
    self, sparsity, ties
  ):
    theta = make_theta(ties=ties)
    names = weights(theta)
    values = np.concatenate([by_name(theta)[name].ravel() for name in names])
    pruned = by_name(one_shot.prune(theta, sparsity, scope='global'))
    together = np.concatenate([pruned[name].ravel() for name in names])
    kept = masks.num_kept(values.size, sparsity)
    self.assertEqual(together.sum(), kept)
    # Ties too: in the order of the leaves of the tree.
    np.testing.assert_array_equal(together, top_mask(np.abs(values), kept))

  def test_an_override_is_ranked_by_itself_and_leaves_the_budget(self):
    theta = make_theta()
    pruned = by_name(
      one_shot.prune(
        theta, 0.9, scope='global', overrides={'logits/w$': 0.5, 'conv': 0.9}
      )
    )
    self.assertEqual(pruned['net/logits/w'].sum(), masks.num_kept(17, 0.5))
    # Two leaves match 'conv'; each is on its own, so nothing is shared.
    self.assertEqual(pruned['net/conv/w'].sum(), masks.num_kept(90, 0.9))
    self.assertEqual(pruned['net/conv/inner/w'].sum(), masks.num_kept(77, 0.9))

    pruned = by_name(
      one_shot.prune(theta, 0.9, scope='global', overrides={'logits/w$': 0.5})
    )
    self.assertEqual(pruned['net/logits/w'].sum(), masks.num_kept(17, 0.5))
    others = pruned['net/conv/w'].sum() + pruned['net/conv/inner/w'].sum()
    self.assertEqual(others, masks.num_kept(90 + 77, 0.9))

  def test_a_layer_may_vanish(self):
    theta = {'a': {'w': jnp.ones((4, 4))}, 'b': {'w': 2 * jnp.ones((4, 4))}}
    pruned = one_shot.prune(theta, 0.5, scope='global')
    self.assertFalse(pruned['a']['w'].any())
    self.assertTrue(pruned['b']['w'].all())


class CompiledTest(parameterized.TestCase):
  @parameterized.parameters('layer', 'global')
  def test_one_program_serves_every_sparsity(self, scope):
    theta = make_theta(ties=True)

    traces = []

    @jax.jit
    def at_counts(theta, counts):
      traces.append(1)
      return one_shot.masks_from_counts(scores.magnitude(theta), counts)

    for sparsity in SPARSITIES:
      counts = one_shot.kept_counts(theta, sparsity, scope=scope)
      traced = jax.tree.map(jnp.int32, counts)
      chex.assert_trees_all_equal(
        at_counts(theta, traced), one_shot.prune(theta, sparsity, scope=scope)
      )
    self.assertLen(traces, 1)

  def test_prune_works_inside_jit(self):
    theta = make_theta()
    chex.assert_trees_all_equal(
      jax.jit(lambda theta: one_shot.prune(theta, 0.7))(theta),
      one_shot.prune(theta, 0.7),
    )

  def test_counts_need_shapes_only(self):
    theta = make_theta()
    shapes = jax.eval_shape(lambda: theta)
    self.assertEqual(
      one_shot.kept_counts(shapes, 0.9, scope='global', overrides={'conv': 0}),
      one_shot.kept_counts(theta, 0.9, scope='global', overrides={'conv': 0}),
    )


def evaluate(theta):
  """Numbers that depend on which weights are left, and on the biases."""
  leaves = jax.tree.leaves(theta)
  return {
    'sum': sum(jnp.sum(x) for x in leaves),
    'left': sum(jnp.sum(x != 0) for x in leaves),
  }


class SweepTest(parameterized.TestCase):
  @parameterized.product(
    scope=['layer', 'global'],
    overrides=[
      None,
      {'logits/w$': 0.5},
      lambda s: {'logits': max(0, 2 * s - 1)},
    ],
  )
  def test_a_sweep_equals_pruning_one_at_a_time(self, scope, overrides):
    theta = make_theta()
    results = one_shot.sweep(
      evaluate, theta, SPARSITIES, scope=scope, overrides=overrides
    )
    chex.assert_shape(list(results.values()), (len(SPARSITIES),))
    for i, sparsity in enumerate(SPARSITIES):
      given = overrides(sparsity) if callable(overrides) else overrides
      kept = one_shot.prune(theta, sparsity, scope=scope, overrides=given)
      expected = evaluate(masks.apply_masks(theta, kept))
      self.assertEqual(results['left'][i], expected['left'])
      np.testing.assert_allclose(
        results['sum'][i], expected['sum'], rtol=1e-5, atol=1e-5
      )

  @parameterized.parameters('layer', 'global')
  def test_lanes_under_vmap_equal_each_alone(self, scope):
    thetas = [make_theta(seed) for seed in range(3)]
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
    run = lambda theta: one_shot.sweep(evaluate, theta, SPARSITIES, scope=scope)
    together = jax.jit(jax.vmap(run))(lanes)
    chex.assert_shape(list(together.values()), (3, len(SPARSITIES)))
    for i, theta in enumerate(thetas):
      alone = run(theta)
      np.testing.assert_array_equal(together['left'][i], alone['left'])
      np.testing.assert_allclose(
        together['sum'][i], alone['sum'], rtol=1e-5, atol=1e-5
      )

  def test_evaluate_is_traced_once_for_all_sparsities(self):
    traces = []

    def traced(theta):
      traces.append(1)
      return evaluate(theta)

    run = jax.jit(lambda theta: one_shot.sweep(traced, theta, SPARSITIES))
    run(make_theta(0))
    run(make_theta(1))
    self.assertLen(traces, 1)

  def test_scores_are_computed_once(self):
    calls = []

    def score(theta):
      calls.append(1)
      return scores.magnitude(theta)

    one_shot.sweep(evaluate, make_theta(), SPARSITIES, score=score)
    self.assertLen(calls, 1)

  def test_a_sweep_over_distributions(self):
    theta = make_theta()
    asked = [distributions.erk(theta, s) for s in (0.5, 0.9)]
    results = one_shot.sweep(evaluate, theta, asked)
    for i, sparsity in enumerate(asked):
      kept = one_shot.prune(theta, sparsity)
      left = evaluate(masks.apply_masks(theta, kept))['left']
      self.assertEqual(results['left'][i], left)

  def test_impossible_sweeps_are_refused(self):
    theta = make_theta()
    with self.assertRaisesRegex(ValueError, 'at least one sparsity'):
      one_shot.sweep(evaluate, theta, [])
    with self.assertRaisesRegex(ValueError, 'fix the same leaves'):
      one_shot.sweep(
        evaluate,
        theta,
        (0.5, 0.9),
        scope='global',
        overrides=lambda s: {'logits': 0.5} if s > 0.6 else {},
      )


class ErrorTest(parameterized.TestCase):
  @parameterized.product(
    sparsity=[-0.1, 1.0, 1.5, float('nan'), float('inf')],
    scope=['layer', 'global'],
  )
  def test_sparsity_outside_the_unit_interval_is_named(self, sparsity, scope):
    message = rf'sparsity must be in \[0, 1\), got {sparsity}'
    with self.assertRaisesRegex(ValueError, message):
      one_shot.prune(make_theta(), sparsity, scope=scope)
    with self.assertRaisesRegex(ValueError, message):
      one_shot.sweep(evaluate, make_theta(), (0.5, sparsity), scope=scope)

  def test_an_unknown_scope_lists_both(self):
    with self.assertRaisesRegex(ValueError, "'layer' or 'global', got 'tree'"):
      one_shot.prune(make_theta(), 0.5, scope='tree')

  def test_a_mapping_must_name_the_selected_leaves(self):
    theta = make_theta()
    given = distributions.uniform(theta, 0.5)
    with self.assertRaisesRegex(ValueError, 'takes one sparsity'):
      one_shot.prune(theta, given, scope='global')
    with self.assertRaisesRegex(ValueError, 'missing: net/logits/w'):
      one_shot.prune(theta, {k: v for k, v in given.items() if 'conv' in k})
    with self.assertRaisesRegex(ValueError, 'not among them: net/conv/b'):
      one_shot.prune(theta, {**given, 'net/conv/b': 0.5})
    with self.assertRaisesRegex(ValueError, "of 'net/conv/w'.*got nan"):
      one_shot.prune(theta, {**given, 'net/conv/w': float('nan')})

  def test_a_tree_without_leaves_gives_empty_masks(self):
    for scope in ('layer', 'global'):
      self.assertEqual(one_shot.prune({}, 0.5, scope=scope), {})
