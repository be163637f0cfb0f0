"""Layer-wise sparsities: the budget, published densities, a slow oracle."""

import functools
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax import nets
from powerprop_jax.core import distributions, masks
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim.topologies.counts import Budget
from powerprop_jax.prune import one_shot

ALL = (
  distributions.uniform,
  distributions.er,
  distributions.erk,
  distributions.equal_per_filter,
  distributions.equal_per_layer,
)
LENET = {'a': (784, 300), 'b': (300, 100), 'c': (100, 10)}


def tree_of(shapes):
  """Parameters {name: shape} as shapes, with a bias that is never selected."""
  leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    name: {'w': leaf(shape), 'b': leaf(shape[-1:])}
    for name, shape in shapes.items()
  }


def raw_density(name, shape):
  if name == 'uniform':
    return 1.0
  if name == 'equal_per_filter':
    return shape[-1] / np.prod(shape)
  if name == 'equal_per_layer':
    return 1 / np.prod(shape)
  dims = shape[-2:] if name == 'er' else shape
  return sum(dims) / np.prod(dims)


def bisection(name, shapes, sparsity, fixed):
  """Densities min(1, ε raw) with ε found by halving an interval."""
  sizes = {key: np.prod(shape) for key, shape in shapes.items()}
  density = lambda key, epsilon: (
    1 - fixed[key]
    if key in fixed
    else min(1.0, epsilon * raw_density(name, shapes[key]))
  )
  kept = (1 - sparsity) * sum(sizes.values())
  low, high = 0.0, 1e9
  for _ in range(200):
    middle = (low + high) / 2
    total = sum(density(key, middle) * sizes[key] for key in shapes)
    low, high = (middle, high) if total < kept else (low, middle)
  return {f'{key}/w': 1 - density(key, high) for key in shapes}


def total_sparsity(theta, sparsities):
  sizes = {f'{key}/w': np.prod(leaf['w'].shape) for key, leaf in theta.items()}
  zeros = sum(sparsities[name] * size for name, size in sizes.items())
  return zeros / sum(sizes.values())


class DistributionsTest(parameterized.TestCase):
  @parameterized.product(fn=ALL, seed=list(range(12)))
  def test_agrees_with_bisection_on_random_trees(self, fn, seed):
    rng = np.random.default_rng(seed)
    shapes = {
      f'layer_{i}': tuple(
        int(d) for d in rng.integers(1, 40, size=rng.choice([2, 4]))
      )
      for i in range(rng.integers(1, 12))
    }
    sparsity = float(rng.choice([0.0, 0.3, 0.5, 0.8, 0.9, 0.99]))
    value = float(rng.choice([0.0, 0.5, 0.8, 0.99]))
    fixed = {'layer_0': value} if seed % 2 else {}
    theta = tree_of(shapes)
    overrides = {f'{name}/w$': value for name in fixed}
    try:
      result = fn(theta, sparsity, overrides=overrides)
    except ValueError:
      self.assertTrue(fixed)
      first = np.prod(shapes['layer_0'])
      total = sum(np.prod(shape) for shape in shapes.values())
      left = (1 - sparsity) * total - (1 - value) * first
      self.assertFalse(0 < left <= total - first)
      return
    expected = bisection(fn.__name__, shapes, sparsity, fixed)
    self.assertEqual(list(result), sorted(expected))
    self.assertTrue(all(result[f'{name}/w'] == value for name in fixed))
    for name, value in expected.items():
      self.assertAlmostEqual(result[name], value, places=9)
      self.assertBetween(result[name], 0.0, np.nextafter(1.0, 0.0))
    self.assertAlmostEqual(total_sparsity(theta, result), sparsity, places=9)

  @parameterized.product(fn=ALL, seed=list(range(8)))
  def test_the_counts_are_those_of_the_whole(self, fn, seed):
    rng = np.random.default_rng(seed)
    shapes = {
      f'layer_{i}': tuple(int(d) for d in rng.integers(9, 40, size=2))
      for i in range(rng.integers(1, 9))
    }
    sparsity = float(rng.choice([0.0, 0.29, 0.5, 0.85, 0.9]))
    theta = tree_of(shapes)
    sizes = {f'{name}/w': math.prod(shape) for name, shape in shapes.items()}
    total = masks.num_kept(sum(sizes.values()), sparsity)
    shares = fn(theta, sparsity)
    counts = distributions.counts(shares, sizes)
    self.assertEqual(sum(counts.values()), total)
    self.assertEqual(Budget(sparsity, fn).counts(theta), counts)
    self.assertEqual(one_shot.kept_counts(theta, shares), counts)
    for name, count in counts.items():
      self.assertLess(abs(count - sizes[name] * (1 - shares[name])), 1.001)

  def test_shares_are_a_tree_as_dictionaries_are(self):
    shares = distributions.erk(tree_of({'b': (8, 30), 'a': (30, 10)}), 0.9)
    plain = dict(shares)
    self.assertEqual(jax.tree.leaves(shares), jax.tree.leaves(plain))
    self.assertEqual(
      jax.tree_util.tree_leaves_with_path(shares),
      jax.tree_util.tree_leaves_with_path(plain),
    )
    self.assertEqual(jax.tree.map(lambda s: s, shares), plain)

  def test_an_overridden_leaf_keeps_its_own_count(self):
    theta = tree_of({'a': (8, 31), 'b': (31, 10), 'c': (10, 7)})
    fixed = functools.partial(distributions.erk, overrides={'^c/': 0.55})
    counts = Budget(0.8, fixed).counts(theta)
    self.assertEqual(counts['c/w'], masks.num_kept(70, 0.55))
    self.assertEqual(sum(counts.values()), masks.num_kept(628, 0.8))

  def test_every_leaf_keeps_a_weight(self):
    theta = tree_of({f'layer_{i}': (1, 1) for i in range(4)} | {'w': (5, 5)})
    counts = distributions.uniform(theta, 0.9).counts
    self.assertEqual(sorted(counts.values()), [1] * 5)

  @parameterized.parameters(
    ('er', 0.80, (0.162241, 0.469362, 1)),
    ('er', 0.90, (0.079568, 0.230189, 1)),
    ('er', 0.95, (0.038484, 0.111334, 0.918507)),
    ('er', 0.98, (0.015394, 0.044534, 0.367403)),
    ('er', 0.99, (0.007697, 0.022267, 0.183701)),
    ('equal_per_filter', 0.90, (0.082815, 0.216423, 0.649268)),
    ('equal_per_filter', 0.99, (0.008281, 0.021642, 0.064927)),
    # The first two have half each of 26,620 - 1,000 connections.
    ('equal_per_layer', 0.90, (12_810 / 235_200, 12_810 / 30_000, 1)),
    ('equal_per_layer', 0.99, (0.003773, 0.029578, 0.887333)),
  )
  def test_densities_of_lenet_300_100(self, name, sparsity, densities):
    # Without kernels, the two Erdős–Rényi distributions are one.
    for alias in (name, 'erk') if name == 'er' else (name,):
      result = getattr(distributions, alias)(tree_of(LENET), sparsity)
      np.testing.assert_allclose(
        [1 - s for s in result.values()], densities, atol=6e-7
      )

  @parameterized.parameters(
    ('resnet_50', 0.8, 54, 8),
    ('resnet_50', 0.9, 54, 1),
    ('resnet_50', 0.95, 54, 0),
    ('resnet_50', 0.99, 54, 0),
    # The first and the last layer, and the three shortcuts.
    ('wrn_22_2', 0.8, 23, 5),
  )
  def test_number_of_dense_layers_under_erk(
    self, name, sparsity, num_layers, num_dense
  ):
    net = nets.make(name, 1000 if name == 'resnet_50' else 10)
    # Haiku's BatchNorm multiplies integers with floats.
    with jax.numpy_dtype_promotion('standard'):
      theta, _ = small.net_shapes(net, (224, 224, 3))
    result = distributions.erk(theta, sparsity)
    dense = [theta[n[:-2]]['w'].shape for n, s in result.items() if s == 0]
    self.assertLen(result, num_layers)
    self.assertLen(dense, num_dense)
    if name == 'resnet_50':
      self.assertTrue(all(shape[:2] == (1, 1) for shape in dense))
    if num_dense == 1:
      self.assertEqual(dense, [(1, 1, 64, 64)])

  @parameterized.parameters(0.0, 0.1, 0.29, 0.9, 0.99, 0.999)
  def test_uniform_returns_the_number_it_was_given(self, sparsity):
    result = distributions.uniform(tree_of(LENET), sparsity)
    self.assertEqual(set(result.values()), {sparsity})

  def test_the_first_matching_override_counts(self):
    result = distributions.uniform(
      tree_of(LENET), 0.9, overrides={'^c': 0.25, '[bc]/w$': 0.5}
    )
    self.assertEqual(result['c/w'], 0.25)
    self.assertEqual(result['b/w'], 0.5)

  @parameterized.parameters(*ALL)
  def test_extreme_sparsity_stays_below_1(self, fn):
    result = fn(tree_of(LENET), np.nextafter(1.0, 0.0))
    for sparsity in result.values():
      self.assertLess(sparsity, 1.0)

  @parameterized.parameters(*ALL)
  def test_vectors_scalars_and_empty_leaves_do_no_harm(self, fn):
    shapes = {'v': (5,), 's': (), 'e': (0, 3), 'm': (10, 10)}
    theta = {
      name: {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}
      for name, shape in shapes.items()
    }
    self.assertEqual(fn({}, 0.5), {})
    result = fn(theta, 0.5, select=select_lib.by_regex('w$'))
    self.assertLen(result, 4)
    self.assertAlmostEqual(total_sparsity(theta, result), 0.5, places=12)

  def test_every_leaf_fixed_at_the_total_asked_for_is_accepted(self):
    overrides = {'a': 0.75, 'b': 0.25}
    theta = tree_of({'a': (4, 4), 'b': (4, 4)})
    result = distributions.erk(theta, 0.5, overrides=overrides)
    self.assertEqual(result, {'a/w': 0.75, 'b/w': 0.25})

  @parameterized.product(fn=ALL, sparsity=(-0.1, 1.0, 2, float('nan')))
  def test_sparsity_outside_the_unit_interval_is_refused(self, fn, sparsity):
    with self.assertRaisesRegex(ValueError, r'sparsity.*\[0, 1\).*got'):
      fn(tree_of(LENET), sparsity)

  @parameterized.parameters(
    ({'^c': 1.0}, r"'\^c'.*\[0, 1\), got 1"),
    ({'logits': 0.5}, "'logits'.*a/w, b/w, c/w"),
    ({'c/b': 0.5}, "'c/b'"),  # exists, not selected
    ({'(': 0.5}, 'not a regular expression'),
    ({'^a': 0.5}, 'sparsity 0.9 cannot.*too many'),  # 117,600 of 26,620
    ({'^a': 0.999, '^b': 0.999}, 'sparsity 0.9 cannot.*keep too few'),
    ({'w$': 0.5}, 'sparsity 0.9 cannot.*fix every leaf'),
  )
  def test_impossible_overrides_are_explained(self, overrides, problem):
    for fn in ALL:
      with self.assertRaisesRegex(ValueError, problem):
        fn(tree_of(LENET), 0.9, overrides=overrides)

  def test_selecting_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'chose none'):
      distributions.er(tree_of(LENET), 0.9, select=lambda *_: False)
