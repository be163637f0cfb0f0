import math

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.report import analysis

LEAF = 'net/~/linear_0/w'


def _net(key, *shapes):
  generator = np.random.default_rng(key)
  return {
    f'net/~/linear_{index}': {
      'w': generator.normal(size=shape).astype(np.float32),
      'b': np.zeros(shape[-1], np.float32),
    }
    for index, shape in enumerate(shapes)
  }


def _top(values, k):
  """The k largest by a stable sort: what the counting top-k must equal."""
  order = np.argsort(-np.abs(values).ravel(), kind='stable')
  mask = np.zeros(values.size, bool)
  mask[order[:k]] = True
  return mask


class HistogramTest:
  @pytest.mark.parametrize('bins', [1, 10, 101])
  def test_counts_are_those_of_numpy(self, bins):
    theta = _net(0, (40, 30), (30, 10))
    found = analysis.weight_histograms({0: theta}, bins=bins)[0]
    assert list(found) == [LEAF, 'net/~/linear_1/w']
    for module in theta:
      weights = theta[module]['w'].astype(np.float64)
      histogram = found[f'{module}/w']
      reach = histogram.edges[-1]
      counts, edges = np.histogram(weights, bins, (-reach, reach))
      np.testing.assert_array_equal(histogram.counts, counts)
      np.testing.assert_array_equal(histogram.edges, edges)
      assert histogram.outside == np.sum(np.abs(weights) > reach) <= 2

  def test_no_weight_is_lost(self):
    theta = _net(0, (50, 20))
    theta['net/~/linear_0']['w'][0, :3] = [np.nan, np.inf, 1e30]
    found = analysis.weight_histograms({0: theta})[0][LEAF]
    assert (found.not_finite, found.outside) == (2, 1)
    assert found.counts.sum() == 1000 - 3

  def test_neither_an_outlier_nor_zeros_change_the_range_much(self):
    theta = _net(0, (100, 100))
    reach = lambda: analysis.weight_histograms({0: theta})[0][LEAF].edges[-1]
    dense = reach()
    theta['net/~/linear_0']['w'][0, 0] = 1e6
    assert reach() < 4.0
    theta['net/~/linear_0']['w'][10:] = 0
    assert reach() > 0.7 * dense

  def test_range_covers_every_network(self):
    small, large = _net(0, (100, 10)), _net(1, (100, 10))
    large['net/~/linear_0']['w'] *= 10
    found = analysis.weight_histograms({1.0: small, 2.0: large}, bins=11)
    first, second = (found[alpha][LEAF] for alpha in (1.0, 2.0))
    np.testing.assert_array_equal(first.edges, second.edges)
    assert first.outside == 0 and second.outside <= 1

  def test_zeros_alone_and_half_precision_are_counted(self):
    theta = {'a': {'w': np.zeros((3, 3), np.float32)}}
    found = analysis.weight_histograms({0: theta}, bins=3)[0]['a/w']
    np.testing.assert_array_equal(found.counts, [0, 9, 0])
    theta = {'a': {'w': jnp.array([[-1.0, -1.0, 0.5]], jnp.bfloat16)}}
    found = analysis.weight_histograms({0: theta}, bins=2)[0]['a/w']
    np.testing.assert_array_equal(found.counts, [2, 1])

  @pytest.mark.parametrize(
    ('call', 'told'),
    [
      (lambda t: analysis.weight_histograms({0: t}, bins=0), 'bins'),
      (lambda t: analysis.fraction_near_zero(t, (0.1, -0.1)), 'epsilon'),
      (lambda t: analysis.fraction_near_zero(t, math.nan), 'epsilon'),
      (lambda t: analysis.mask_overlap(t, _net(0, (4, 5))), 'same leaves and'),
      (lambda t: analysis.mask_overlap(t, t, 1.0), 'sparsity'),
      (lambda t: analysis.mask_overlap(t, t, -0.1), 'sparsity'),
      (lambda t: analysis.mask_overlap(t, t, math.nan), 'sparsity'),
    ],
  )
  def test_bad_arguments_are_refused(self, call, told):
    with pytest.raises(ValueError, match=told):
      call(_net(0, (4, 4)))


def test_shares_near_zero_are_those_of_numpy():
  theta = _net(0, (40, 30), (30, 10))
  records = analysis.fraction_near_zero(theta, (0.0, 0.01, 0.5))
  assert len(records) == 9
  weights = {f'{m}/w': theta[m]['w'].ravel() for m in theta}
  weights['total'] = np.concatenate(list(weights.values()))
  for record in records:
    values = weights[record['leaf']]
    expected = np.mean(np.abs(values) <= record['epsilon'])
    assert record['near_zero'] == pytest.approx(expected)
    assert record['size'] == values.size
  theta = {'a': {'w': np.array([[0.5, -0.5, np.nan, 0.75]])}}
  assert analysis.fraction_near_zero(theta, 0.5)[0]['near_zero'] == 0.5


class MaskOverlapTest:
  @pytest.mark.parametrize('sparsity', [0.0, 0.05, 0.5, 0.9, 0.99])
  def test_shares_are_those_of_a_sort(self, sparsity):
    before, after = _net(0, (40, 30), (17, 1)), _net(1, (40, 30), (17, 1))
    *records, total = analysis.mask_overlap(before, after, sparsity)
    sums = np.zeros(4)
    for record, module in zip(records, before, strict=True):
      size = before[module]['w'].size
      kept = size - math.floor(size * sparsity)
      a, b = (_top(theta[module]['w'], kept) for theta in (before, after))
      found = np.array([size, kept, np.sum(a == b), np.sum(a & b)])
      self._check(record, found)
      sums += found
    assert total['leaf'] == 'total'
    self._check(total, sums)

  def _check(self, record, counts):
    size, kept, agree, common = counts
    assert record['density'] == pytest.approx(kept / size)
    assert record['agreement'] == pytest.approx(agree / size, abs=1e-6)
    assert record['intersection'] == pytest.approx(common / kept, abs=1e-6)

  def test_unrelated_networks_overlap_by_chance(self):
    for record in analysis.mask_overlap(
      _net(0, (300, 200)), _net(1, (300, 200)), (0.05, 0.5, 0.8, 0.95)
    ):
      q = 1 - record['sparsity']
      chance = {'agreement': q**2 + (1 - q) ** 2, 'intersection': q}
      for share, expected in chance.items():
        by_chance = record[f'{share}_by_chance']
        assert by_chance == pytest.approx(expected, abs=1e-3)
        assert record[share] == pytest.approx(by_chance, abs=0.02)

  def test_only_the_order_of_magnitudes_matters(self):
    theta = _net(0, (4, 4), (4, 2))
    cubed = {m: {**p, 'w': -(p['w'] ** 3)} for m, p in theta.items()}
    records = analysis.mask_overlap(theta, cubed, (0.5, 0.75))
    assert all(r['agreement'] == r['intersection'] == 1.0 for r in records)
    leaves = [*(f'net/~/linear_{i}/w' for i in (0, 1)), 'total']
    assert [(r['leaf'], r['sparsity']) for r in records] == [
      (leaf, sparsity) for sparsity in (0.5, 0.75) for leaf in leaves
    ]
