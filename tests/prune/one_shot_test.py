"""One-shot pruning: exact counts, the order of ranks, sweeps in one program."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


class PruneTest(parameterized.TestCase):
  @parameterized.product(
    sparsity=SPARSITIES,
    scope=['layer', 'global'],
    ties=[True, False],
    dtype=[jnp.float32, jnp.bfloat16],
  )
  def test_exactly_its_count_of_the_largest_is_kept(
    self, sparsity, scope, ties, dtype
  ):
    theta = optax.tree.cast(make_theta(ties=ties), dtype)
    values = trees.by_path(theta)
    pruned = trees.by_path(one_shot.prune(theta, sparsity, scope=scope))
    names = [name for name in values if name.endswith('/w')]
    # Ties too: in the order of the leaves of the tree.
    for group in [names] if scope == 'global' else [[name] for name in names]:
      sizes = [np.abs(values[name]) for name in group]
      kept = masks.num_kept(sum(x.size for x in sizes), sparsity)
      expected = small.largest_of_all(sizes, kept)
      for name, mask in zip(group, expected, strict=True):
        np.testing.assert_array_equal(pruned.pop(name), mask, name)
    self.assertTrue(all(mask.all() for mask in pruned.values()))

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
    lowest = lambda theta: jax.tree.map(jnp.negative, theta)
    pruned = one_shot.prune(theta, 0.5, score=lowest)['net/logits']['w']
    value = -np.asarray(theta['net/logits']['w'])
    (expected,) = small.largest_of_all([value], masks.num_kept(17, 0.5))
    np.testing.assert_array_equal(pruned, expected)

  @parameterized.parameters(jnp.nan, jnp.inf)
  def test_weights_that_are_not_finite_are_refused(self, value):
    theta = make_theta()
    theta['net/logits']['w'] = theta['net/logits']['w'].at[0].set(value)
    with self.assertRaisesRegex(ValueError, "'net/logits/w' holds a number"):
      one_shot.prune(theta, 0.5)
    jax.eval_shape(lambda theta: one_shot.prune(theta, 0.5), theta)

  def test_a_distribution_gives_each_leaf_its_sparsity(self):
    theta = make_theta()
    shares = distributions.erk(theta, 0.7)
    # In a mapping of one's own each leaf counts by itself.
    for sparsities in (shares, dict(shares)):
      pruned = trees.by_path(one_shot.prune(theta, sparsities))
      sizes = {name: pruned[name].size for name in shares}
      kept = {name: pruned[name].sum() for name in shares}
      self.assertEqual(kept, distributions.counts(sparsities, sizes))

  def test_the_output_layer_can_keep_twice_the_fraction(self):
    """The recipe of the authors' notebook."""
    theta = {
      'a': {'w': jnp.ones((100, 10))},
      'logits': {'w': jnp.ones((10, 10))},
    }
    for kept, expected in (
      (0.01, {'a/w': 10, 'logits/w': 2}),
      (0.1, {'a/w': 100, 'logits/w': 20}),
      (0.5, {'a/w': 500, 'logits/w': 100}),
    ):
      overrides = {'logits/w$': max(0.0, 1 - 2 * kept)}
      counts = one_shot.kept_counts(theta, 1 - kept, overrides=overrides)
      self.assertEqual(counts, expected)

  def test_an_override_is_ranked_by_itself_and_leaves_the_budget(self):
    def num_kept(overrides):
      pruned = trees.by_path(
        one_shot.prune(make_theta(), 0.9, scope='global', overrides=overrides)
      )
      names = ('conv', 'conv/inner', 'logits')
      return [pruned[f'net/{name}/w'].sum() for name in names]

    half = {'logits/w$': 0.5}
    conv, inner, logits = num_kept(half)
    self.assertEqual((conv + inner, logits), (17, 9))  # of 90 + 77, of 17
    # Two leaves match 'conv'; each is on its own, so nothing is shared.
    self.assertEqual(num_kept(half | {'conv': 0.9}), [9, 8, 9])

  def test_a_layer_may_vanish(self):
    theta = {'a': {'w': jnp.ones((4, 4))}, 'b': {'w': 2 * jnp.ones((4, 4))}}
    pruned = one_shot.prune(theta, 0.5, scope='global')
    self.assertFalse(pruned['a']['w'].any())
    self.assertTrue(pruned['b']['w'].all())


class CompiledTest(parameterized.TestCase):
  @parameterized.parameters('layer', 'global')
  def test_one_program_serves_every_sparsity(self, scope):
    theta, traces = make_theta(ties=True), []

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
    theta, prune = make_theta(), lambda theta: one_shot.prune(theta, 0.7)
    chex.assert_trees_all_equal(jax.jit(prune)(theta), prune(theta))


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
      'erk',
    ],
  )
  def test_a_sweep_equals_pruning_one_at_a_time(self, scope, overrides):
    theta, sparsities = make_theta(), SPARSITIES
    if overrides == 'erk':
      scope, overrides = 'layer', None
      sparsities = [distributions.erk(theta, s) for s in SPARSITIES]
    results = one_shot.sweep(
      evaluate, theta, sparsities, scope=scope, overrides=overrides
    )
    chex.assert_shape(list(results.values()), (len(SPARSITIES),))
    for i, sparsity in enumerate(sparsities):
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

  def test_evaluate_is_traced_and_scores_are_computed_once(self):
    traces, calls = [], []
    traced = lambda theta: traces.append(1) or evaluate(theta)
    score = lambda theta: calls.append(1) or scores.magnitude(theta)
    run = jax.jit(
      lambda theta: one_shot.sweep(traced, theta, SPARSITIES, score=score)
    )
    run(make_theta(0))
    run(make_theta(1))
    self.assertEqual((traces, calls), ([1], [1]))

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
