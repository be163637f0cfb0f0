"""Published distributions that lose connections: the numbers of the authors."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import distributions, leaky_distributions

LENET_300_100 = {'a': (784, 300), 'b': (300, 100), 'logits': (100, 10)}
# The LeNet-5 of the authors, which has 82 units where others have 84.
LENET_5 = {
  'conv_0': (5, 5, 3, 6),
  'conv_1': (5, 5, 6, 16),
  'conv_2': (5, 5, 16, 120),
  'linear': (120, 82),
  'logits': (82, 10),
}
NAMES = ('equal_per_filter', 'equal_per_layer', 'erk')
# Densities layer by layer, and of the whole network where layers are full.
PUBLISHED = (
  (LENET_300_100, 0.9, NAMES[0], (0.082815, 0.216423, 0.649268), 0.1),
  (LENET_300_100, 0.9, NAMES[1], (0.037727, 0.295778, 1), 0.0704),
  (LENET_300_100, 0.9, NAMES[2], (0.076968, 0.222668, 1), 0.0969),
  (LENET_300_100, 0.99, NAMES[0], (0.008281, 0.021642, 0.064927), 0.01),
  (LENET_300_100, 0.99, NAMES[1], (0.003773, 0.029578, 0.887333), 0.01),
  (LENET_300_100, 0.99, NAMES[2], (0.007697, 0.022267, 0.183701), 0.01),
  (
    LENET_5,
    0.9,
    NAMES[0],
    (0.350484, 0.175242, 0.065716, 0.219053, 0.320565),
    0.1,
  ),
  (LENET_5, 0.9, NAMES[1], (1, 0.512583, 0.025629, 0.12502, 1), 0.0806),
  (
    LENET_5,
    0.9,
    NAMES[2],
    (0.528939, 0.167033, 0.038104, 0.25717, 1),
    0.0946,
  ),
  (
    LENET_5,
    0.99,
    NAMES[0],
    (0.035048, 0.017524, 0.006572, 0.021905, 0.032056),
    0.01,
  ),
  (
    LENET_5,
    0.99,
    NAMES[1],
    (0.273378, 0.051258, 0.002563, 0.012502, 0.150024),
    0.01,
  ),
  (
    LENET_5,
    0.99,
    NAMES[2],
    (0.052894, 0.016703, 0.00381, 0.025717, 0.140552),
    0.01,
  ),
)


def tree_of(shapes):
  leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    name: {'w': leaf(shape), 'b': leaf(shape[-1:])}
    for name, shape in shapes.items()
  }


def achieved(shapes, sparsities):
  sizes = np.array([np.prod(shapes[name.split('/')[0]]) for name in sparsities])
  densities = 1 - np.array(list(sparsities.values()))
  return float(densities @ sizes / sizes.sum())


class LeakyDistributionsTest(parameterized.TestCase):
  @parameterized.parameters(*PUBLISHED)
  def test_published_densities(self, shapes, sparsity, name, densities, total):
    result = getattr(leaky_distributions, name)(tree_of(shapes), sparsity)
    self.assertEqual(list(result), [f'{layer}/w' for layer in shapes])
    np.testing.assert_allclose(
      [1 - s for s in result.values()], densities, atol=1e-6
    )
    self.assertAlmostEqual(achieved(shapes, result), total, places=4)

  @parameterized.parameters(*PUBLISHED)
  def test_solved_again_they_keep_the_budget(
    self, shapes, sparsity, name, densities, total
  ):
    result = getattr(distributions, name)(tree_of(shapes), sparsity)
    self.assertAlmostEqual(achieved(shapes, result), 1 - sparsity, places=9)
    if total == round(1 - sparsity, 2) and max(densities) < 0.8:
      np.testing.assert_allclose(
        [1 - s for s in result.values()], densities, atol=1e-6
      )

  def test_the_last_layer_must_be_one(self):
    with self.assertRaisesRegex(ValueError, 'got none of a/w, b/w'):
      leaky_distributions.equal_per_layer(
        tree_of({'a': (2, 2), 'b': (2, 2)}), 0.5
      )
    with self.assertRaisesRegex(ValueError, 'got a/w, b/w of'):
      leaky_distributions.equal_per_layer(
        tree_of({'a': (2, 2), 'b': (2, 2)}), 0.5, last='w$'
      )

  @parameterized.parameters(*NAMES)
  def test_sparsity_outside_the_unit_interval_is_refused(self, name):
    with self.assertRaisesRegex(ValueError, r'\[0, 1\), got 1'):
      getattr(leaky_distributions, name)(tree_of(LENET_5), 1.0)
