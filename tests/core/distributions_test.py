"""Layer-wise sparsities: the budget, published densities, a slow oracle."""

import functools
import itertools
import math

from absl.testing import parameterized
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

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


@functools.cache
def resnet_50():
  net = hk.transform_with_state(
    lambda x: hk.nets.ResNet50(1000)(x, is_training=True)
  )
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  # Haiku's BatchNorm multiplies integers with floats.
  with jax.numpy_dtype_promotion('standard'):
    theta, _ = jax.eval_shape(net.init, jax.random.key(0), images)
  return theta


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


class OracleTest(parameterized.TestCase):
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
    fixed = {'layer_0': 0.5} if seed % 3 == 0 and 0.3 <= sparsity < 0.9 else {}
    theta = tree_of(shapes)
    overrides = {'layer_0/w$': 0.5} if fixed else None
    try:
      result = fn(theta, sparsity, overrides=overrides)
    except ValueError:
      self.assertTrue(fixed)
      first = np.prod(shapes['layer_0'])
      total = sum(np.prod(shape) for shape in shapes.values())
      left = (1 - sparsity) * total - 0.5 * first
      self.assertFalse(0 < left <= total - first)
      return
    expected = bisection(fn.__name__, shapes, sparsity, fixed)
    self.assertEqual(list(result), sorted(expected))
    for name, value in expected.items():
      self.assertAlmostEqual(result[name], value, places=9)
      self.assertBetween(result[name], 0.0, np.nextafter(1.0, 0.0))
    self.assertAlmostEqual(total_sparsity(theta, result), sparsity, places=9)


class CountsTest(parameterized.TestCase):
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


class PublishedTest(parameterized.TestCase):
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

  @parameterized.parameters((0.8, 8), (0.9, 1), (0.95, 0), (0.99, 0))
  def test_number_of_dense_layers_of_resnet_50_under_erk(
    self, sparsity, num_dense
  ):
    theta = resnet_50()
    result = distributions.erk(theta, sparsity)
    dense = [name for name, s in result.items() if s == 0]
    self.assertLen(result, 54)
    self.assertLen(dense, num_dense)
    for name in dense:
      leaf = theta[name.removesuffix('/w')]['w']
      self.assertEqual(leaf.shape[:2], (1, 1))
      if num_dense == 1:
        self.assertEqual(leaf.shape[2:], (64, 64))

  def test_dense_layers_of_wide_resnet_22_2_under_erk(self):
    shapes = {'first': (3, 3, 3, 16), 'fc': (128, 10)}
    for group, (inputs, outputs) in enumerate([(16, 32), (32, 64), (64, 128)]):
      shapes[f'shortcut_{group}'] = (1, 1, inputs, outputs)
      shapes[f'conv_{group}_0'] = (3, 3, inputs, outputs)
      for i in range(1, 6):
        shapes[f'conv_{group}_{i}'] = (3, 3, outputs, outputs)
    result = distributions.erk(tree_of(shapes), 0.8)
    self.assertEqual(
      [name for name, s in result.items() if s == 0],
      ['fc/w', 'first/w', 'shortcut_0/w', 'shortcut_1/w', 'shortcut_2/w'],
    )


class BudgetTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1, 0.29, 0.9, 0.99, 0.999)
  def test_uniform_returns_the_number_it_was_given(self, sparsity):
    result = distributions.uniform(tree_of(LENET), sparsity)
    self.assertEqual(set(result.values()), {sparsity})

  @parameterized.product(fn=ALL, last=[0.0, 0.5, 0.8, 0.99])
  def test_overrides_are_kept_and_the_rest_makes_up_for_them(self, fn, last):
    theta = tree_of(LENET)
    result = fn(theta, 0.9, overrides={'^c/': last})
    self.assertEqual(result['c/w'], last)
    self.assertAlmostEqual(total_sparsity(theta, result), 0.9, places=12)

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

  def test_arrays_and_shapes_give_the_same(self):
    theta = tree_of({'a': (3, 3, 2, 8), 'b': (8, 4)})
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape), theta)
    for fn in ALL:
      self.assertEqual(fn(theta, 0.7), fn(arrays, 0.7))

  def test_every_leaf_fixed_at_the_total_asked_for_is_accepted(self):
    overrides = {'a': 0.75, 'b': 0.25}
    theta = tree_of({'a': (4, 4), 'b': (4, 4)})
    result = distributions.erk(theta, 0.5, overrides=overrides)
    self.assertEqual(result, {'a/w': 0.75, 'b/w': 0.25})


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product(ALL, [-0.1, 1.0, 2, float('nan')])
  )
  def test_sparsity_outside_the_unit_interval_is_refused(self, fn, sparsity):
    with self.assertRaisesRegex(ValueError, r'sparsity.*\[0, 1\).*got'):
      fn(tree_of(LENET), sparsity)

  def test_an_override_outside_the_unit_interval_is_named(self):
    with self.assertRaisesRegex(ValueError, r"'\^c'.*\[0, 1\), got 1"):
      distributions.erk(tree_of(LENET), 0.9, overrides={'^c': 1.0})

  def test_a_pattern_that_matches_nothing_lists_the_leaves(self):
    with self.assertRaisesRegex(ValueError, "'logits'.*a/w, b/w, c/w"):
      distributions.erk(tree_of(LENET), 0.9, overrides={'logits': 0.5})
    with self.assertRaisesRegex(ValueError, "'c/b'"):  # exists, not selected
      distributions.erk(tree_of(LENET), 0.9, overrides={'c/b': 0.5})
    with self.assertRaisesRegex(ValueError, 'not a regular expression'):
      distributions.erk(tree_of(LENET), 0.9, overrides={'(': 0.5})

  @parameterized.parameters(
    ({'^a': 0.5}, 'keep too many'),  # 117,600 of 26,620 allowed
    ({'^a': 0.999, '^b': 0.999}, 'keep too few'),
    ({'w$': 0.5}, 'fix every leaf'),
  )
  def test_an_impossible_budget_is_explained(self, overrides, problem):
    for fn in ALL:
      with self.assertRaisesRegex(
        ValueError, f'sparsity 0.9 cannot.*{problem}'
      ):
        fn(tree_of(LENET), 0.9, overrides=overrides)

  def test_selecting_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'chose none'):
      distributions.er(tree_of(LENET), 0.9, select=lambda *_: False)
