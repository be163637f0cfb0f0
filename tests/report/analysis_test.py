import math

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

from powerprop_jax.report import analysis


def _net(key, *shapes, dtype=np.float32):
  generator = np.random.default_rng(key)
  return {
    f'net/~/linear_{index}': {
      'w': generator.normal(size=shape).astype(dtype),
      'b': np.zeros(shape[-1], dtype),
    }
    for index, shape in enumerate(shapes)
  }


def _top(values, k):
  """The k largest by a stable sort: what the counting top-k must equal."""
  order = np.argsort(-np.abs(values).ravel(), kind='stable')
  mask = np.zeros(values.size, bool)
  mask[order[:k]] = True
  return mask


class HistogramTest(parameterized.TestCase):
  @parameterized.parameters(1, 10, 101)
  def test_counts_are_those_of_numpy(self, bins):
    theta = _net(0, (40, 30), (30, 10))
    found = analysis.weight_histogram(theta, bins=bins, range=(-1.0, 2.0))
    self.assertEqual(list(found), ['net/~/linear_0/w', 'net/~/linear_1/w'])
    for module in theta:
      weights = theta[module]['w']
      counts, edges = np.histogram(
        weights.astype(np.float64), bins, (-1.0, 2.0)
      )
      histogram = found[f'{module}/w']
      np.testing.assert_array_equal(histogram.counts, counts)
      np.testing.assert_array_equal(histogram.edges, edges)
      self.assertEqual(
        histogram.outside, np.sum((weights < -1) | (weights > 2))
      )

  def test_no_weight_is_lost(self):
    theta = _net(0, (50, 20))
    theta['net/~/linear_0']['w'][0, :3] = [np.nan, np.inf, 1e30]
    found = analysis.weight_histogram(theta)['net/~/linear_0/w']
    self.assertEqual(found.not_finite, 2)
    self.assertEqual(found.outside, 1)
    self.assertEqual(found.counts.sum(), 1000 - 3)

  def test_an_outlier_does_not_stretch_the_range(self):
    theta = _net(0, (100, 100))
    theta['net/~/linear_0']['w'][0, 0] = 1e6
    lowest, highest = analysis.common_range([theta])['net/~/linear_0/w']
    self.assertEqual(lowest, -highest)
    self.assertLess(highest, 4.0)

  def test_range_covers_every_network(self):
    small, large = _net(0, (100, 10)), _net(1, (100, 10))
    large['net/~/linear_0']['w'] *= 10
    found = analysis.weight_histograms({1.0: small, 2.0: large}, bins=11)
    first, second = (found[alpha]['net/~/linear_0/w'] for alpha in (1.0, 2.0))
    np.testing.assert_array_equal(first.edges, second.edges)
    self.assertEqual(first.outside, 0)
    self.assertLessEqual(second.outside, 1)

  def test_zeros_do_not_narrow_the_range(self):
    theta = _net(0, (100, 100))
    dense = analysis.common_range([theta])
    theta['net/~/linear_0']['w'][10:] = 0
    _, highest = analysis.common_range([theta])['net/~/linear_0/w']
    self.assertGreater(highest, 0.7 * dense['net/~/linear_0/w'][1])

  def test_zeros_alone_have_a_range(self):
    theta = {'a': {'w': np.zeros((3, 3), np.float32)}}
    found = analysis.weight_histogram(theta, bins=3)['a/w']
    np.testing.assert_array_equal(found.counts, [0, 9, 0])

  def test_half_precision_is_counted(self):
    theta = {'a': {'w': jnp.array([[-1.0, 0.5]], jnp.bfloat16)}}
    found = analysis.weight_histogram(theta, bins=2, range=(-1, 1))['a/w']
    np.testing.assert_array_equal(found.counts, [1, 1])

  def test_bad_arguments_are_refused(self):
    theta = _net(0, (4, 4))
    with self.assertRaisesRegex(ValueError, 'bins'):
      analysis.weight_histogram(theta, bins=0)
    with self.assertRaisesRegex(ValueError, 'lower to a higher'):
      analysis.weight_histogram(theta, range=(1, 1))
    with self.assertRaisesRegex(ValueError, 'no entry for net/~/linear_0/w'):
      analysis.weight_histogram(theta, range={'other': (0, 1)})
    with self.assertRaisesRegex(ValueError, 'coverage'):
      analysis.common_range([theta], coverage=0)


class NearZeroTest(parameterized.TestCase):
  def test_shares_are_those_of_numpy(self):
    theta = _net(0, (40, 30), (30, 10))
    records = analysis.fraction_near_zero(theta, (0.0, 0.01, 0.5))
    self.assertLen(records, 9)
    weights = {f'{m}/w': theta[m]['w'].ravel() for m in theta}
    weights['total'] = np.concatenate(list(weights.values()))
    for record in records:
      values = weights[record['leaf']]
      expected = np.mean(np.abs(values) <= record['epsilon'])
      self.assertAlmostEqual(record['near_zero'], expected)
      self.assertEqual(record['size'], values.size)

  def test_the_border_counts_and_nan_does_not(self):
    theta = {'a': {'w': np.array([[0.5, -0.5, np.nan, 0.75]])}}
    records = analysis.fraction_near_zero(theta, 0.5)
    self.assertEqual(records[0]['near_zero'], 0.5)

  @parameterized.parameters(-0.1, math.nan)
  def test_a_bad_epsilon_is_refused(self, epsilon):
    with self.assertRaisesRegex(ValueError, 'epsilon'):
      analysis.fraction_near_zero(_net(0, (2, 2)), (0.1, epsilon))


class MaskOverlapTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.05, 0.5, 0.9, 0.99)
  def test_shares_are_those_of_a_sort(self, sparsity):
    before, after = _net(0, (40, 30), (17, 1)), _net(1, (40, 30), (17, 1))
    records = analysis.mask_overlap(before, after, sparsity)
    sums = np.zeros(4)
    for record, module in zip(records, before, strict=False):
      size = before[module]['w'].size
      kept = size - math.floor(size * sparsity)
      a, b = (_top(theta[module]['w'], kept) for theta in (before, after))
      self.assertAlmostEqual(record['density'], kept / size)
      self.assertAlmostEqual(record['agreement'], np.mean(a == b), places=6)
      self.assertAlmostEqual(
        record['intersection'], np.sum(a & b) / kept, places=6
      )
      sums += [size, kept, np.sum(a == b), np.sum(a & b)]
    total = records[-1]
    self.assertEqual(total['leaf'], 'total')
    self.assertAlmostEqual(total['density'], sums[1] / sums[0])
    self.assertAlmostEqual(total['agreement'], sums[2] / sums[0], places=6)
    self.assertAlmostEqual(total['intersection'], sums[3] / sums[1], places=6)

  def test_unrelated_networks_overlap_by_chance(self):
    records = analysis.mask_overlap(
      _net(0, (300, 200)), _net(1, (300, 200)), (0.05, 0.5, 0.8, 0.95)
    )
    for record in records:
      q = 1 - record['sparsity']
      self.assertAlmostEqual(
        record['agreement_by_chance'], q**2 + (1 - q) ** 2, places=3
      )
      self.assertAlmostEqual(record['intersection_by_chance'], q, places=3)
      for share in ('agreement', 'intersection'):
        self.assertAlmostEqual(
          record[share], record[f'{share}_by_chance'], delta=0.02
        )

  def test_a_network_agrees_with_itself(self):
    theta = _net(0, (20, 10))
    for record in analysis.mask_overlap(theta, theta):
      self.assertEqual(record['agreement'], 1.0)
      self.assertEqual(record['intersection'], 1.0)

  def test_only_the_order_of_magnitudes_matters(self):
    before, after = _net(0, (20, 10)), _net(1, (20, 10))
    cubed = {m: {**p, 'w': -(p['w'] ** 3)} for m, p in after.items()}
    self.assertEqual(
      analysis.mask_overlap(before, after),
      analysis.mask_overlap(before, cubed),
    )

  def test_records_hold_every_leaf_at_every_sparsity(self):
    theta = _net(0, (4, 4), (4, 2))
    records = analysis.mask_overlap(theta, theta, (0.5, 0.75))
    self.assertEqual(
      [(record['leaf'][-1], record['sparsity']) for record in records],
      [('w', 0.5), ('w', 0.5), ('l', 0.5)]
      + [('w', 0.75), ('w', 0.75), ('l', 0.75)],
    )

  def test_different_networks_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'same leaves and shapes'):
      analysis.mask_overlap(_net(0, (4, 4)), _net(0, (4, 5)))

  @parameterized.parameters(1.0, -0.1, math.nan)
  def test_a_bad_sparsity_is_refused(self, sparsity):
    with self.assertRaisesRegex(ValueError, 'sparsity'):
      analysis.mask_overlap(_net(0, (4, 4)), _net(1, (4, 4)), sparsity)


if __name__ == '__main__':
  absltest.main()
