"""Figures of powers: accuracies, weights, curves; and how all are saved."""

import math
import os
import subprocess
import sys

import matplotlib
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
import numpy as np
import plots
import pytest

from powerprop_jax.report import analysis, plotting

_ALPHAS = (1, 1.5, 2.0)


def _points(alphas=_ALPHAS, keys=(0, 1, 2)):
  return [
    {
      'alpha': alpha,
      'key': key,
      'sparsity': sparsity,
      'accuracy': 0.9 - sparsity / (2 * alpha) + 0.01 * key,
    }
    for alpha in alphas
    for key in keys
    for sparsity in (0.0, 0.5, 0.9, 0.99)
  ]


def _net(key, power=1):
  generator = np.random.default_rng(key)
  return {
    f'net/~/linear_{i}': {'w': generator.normal(size=(30, 20)) ** power}
    for i in range(3)
  }


class AccuracyTest:
  def test_a_line_of_means_for_each_alpha_and_a_band_where_keys_differ(self):
    figure = plotting.accuracy_against_sparsity(_points(), title='Net')
    (axes,) = plots.draw(figure).axes
    bands = axes.findobj(FillBetweenPolyCollection)
    assert (len(axes.lines), len(bands)) == (3, 3)
    assert plots.legend(axes) == ['α = 1', 'α = 1.5', 'α = 2']
    note = 'Lines: mean over 3 keys. Bands: lowest to highest.'
    assert {'Net', note} <= set(plots.texts(figure))
    x, y = plots.line(axes, 'α = 2').get_data()
    np.testing.assert_allclose(x, [0.01, 0.1, 0.5, 1.0])
    np.testing.assert_allclose(y, 0.91 - (1 - x) / 4)

  def test_axis_falls_to_the_right_and_is_labelled_both_ways(self):
    figure = plots.draw(plotting.accuracy_against_sparsity(_points()))
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert left > right
    assert axes.get_xlabel() == 'weights left (%)'
    assert axes.get_ylabel() == 'test accuracy (%)'
    (top,) = axes.child_axes
    for each, expected in ((axes, '100 50 20 10 5 2 1'),
                           (top, '0 50 80 90 95 98 99')):  # fmt: skip
      labels = [text.get_text() for text in each.get_xticklabels()]
      assert labels == expected.split()

  def test_the_baseline_is_grey_and_dashed_whatever_else_is_drawn(self):
    for alphas in ((1,), (1, 2), (3, 1, 2)):
      axes = plotting.accuracy_against_sparsity(_points(alphas)).axes[0]
      line = plots.line(axes, 'α = 1')
      looks = line.get_linestyle(), to_hex(line.get_color())
      assert looks == ('--', '#6b7280')
      assert len({to_hex(x.get_color()) for x in axes.lines}) == len(alphas)

  def test_chance_and_published_values_are_in_the_legend(self):
    published = [
      {'alpha': alpha, 'sparsity': 0.9, 'accuracy': 0.8, 'label': 'Others'}
      for alpha in (2, 4)
    ]
    figure = plotting.accuracy_against_sparsity(
      _points(), num_classes=10, published=published
    )
    (axes,) = plots.draw(figure).axes
    assert plots.legend(axes)[-3:] == ['α = 4', 'Others', 'chance']
    np.testing.assert_allclose(plots.line(axes, 'chance').get_ydata(), 0.1)

  def test_values_not_finite_leave_gaps_and_are_counted(self):
    points = _points(keys=(0,))
    points[1]['accuracy'], points[2]['accuracy'] = None, math.nan
    figure = plots.draw(plotting.accuracy_against_sparsity(points))
    _, y = plots.line(figure.axes[0], 'α = 1').get_data()
    np.testing.assert_array_equal(np.isnan(y), [False, True, True, False])
    assert 'One key (random seed). Not finite: 2.' in plots.texts(figure)

  def test_one_point_is_enough(self):
    for sparsity in (0.0, 0.5, 0.9, 0.9995):
      record = {'alpha': 2.0, 'sparsity': sparsity, 'accuracy': 0.5}
      plots.draw(plotting.accuracy_against_sparsity([record]))


class WeightsTest:
  def test_rows_of_histograms_are_layers_and_columns_are_powers(self):
    thetas = {alpha: _net(0, int(alpha)) for alpha in (3, 1, 2)}
    histograms = analysis.weight_histograms(thetas, bins=31)
    figure = plots.draw(plotting.weight_histograms(histograms, title='Weights'))
    grid = np.reshape(figure.axes, (3, 3))
    assert [x.get_title() for x in grid[0]] == ['α = 1', 'α = 2', 'α = 3']
    layers = ['linear_0', 'linear_1', 'linear_2']
    assert [x.get_ylabel() for x in grid[:, 0]] == layers
    for row, leaf in zip(grid, histograms[1], strict=True):
      highest = max(histograms[alpha][leaf].counts.max() for alpha in thetas)
      for axes in row:
        assert axes.get_yscale() == 'log' and axes.get_ylim()[1] > highest
        assert axes.get_xlim() == row[0].get_xlim()

    for value in (0.0, np.nan):
      theta = {'a': {'w': np.full((3, 3), value)}}
      histograms = analysis.weight_histograms({2.0: theta})
      plots.draw(plotting.weight_histograms(histograms))

  def test_near_zero_has_axes_for_each_leaf_and_all_together_first(self):
    records = [
      {**record, 'alpha': alpha, 'key': key}
      for alpha in _ALPHAS
      for key in (0, 1)
      for record in analysis.fraction_near_zero(_net(key))
    ]
    figure = plots.draw(plotting.near_zero(records, title='Near zero'))
    layers = ['all layers', 'linear_0', 'linear_1', 'linear_2']
    assert plots.titles(figure) == layers
    for axes in figure.axes:
      assert (len(axes.lines), axes.get_xscale()) == (3, 'log')
    assert len(figure.legends) == 1

  @pytest.mark.slow
  def test_any_number_of_leaves_and_powers_fits(self):
    for count in (1, 2, 3, 5, 7):
      records = [
        {'alpha': a, 'leaf': f'l_{i}/w', 'epsilon': 0.1, 'near_zero': 0.5}
        for i in range(count)
        for a in range(1, 2 * count)
      ]
      assert len(plots.draw(plotting.near_zero(records)).axes) == count

  def test_mask_overlap_has_both_measures_and_chance(self):
    records = [
      {**record, 'alpha': alpha, 'key': 0}
      for alpha in _ALPHAS
      for record in analysis.mask_overlap(_net(0), _net(int(4 * alpha)))
    ]
    figure = plots.draw(plotting.mask_overlap(records))
    assert plots.titles(figure) == ['agreement', 'intersection']
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    x, y = figure.axes[0].lines[-1].get_data()
    np.testing.assert_allclose(y, x**2 + (1 - x) ** 2, atol=0.01)


def test_learning_curves_draw_the_fields_that_occur():
  records = [
    {'alpha': a, 'key': k, 'step': s, 'loss': 1 / (s + 1) if s < 91 else None}
    for a in _ALPHAS
    for k in (0, 1)
    for s in range(100)
  ]
  records += [{**r, 'accuracy': 0.5} for r in records if r['step'] == 99]
  records.append({'step': 3, 'steps_per_second': 100.0})
  loss, accuracy = plots.draw(plotting.learning_curves(records)).axes
  assert loss.get_yscale() == 'log'
  assert accuracy.get_title(loc='left') == 'accuracy (%)'
  assert len(loss.lines) == 3
  assert len(plots.line(loss, 'α = 2').get_xdata()) == 100
  only = plotting.learning_curves(records, fields=('accuracy', 'other'))
  assert len(plots.draw(only).axes) == 1
  with pytest.raises(ValueError, match='other'):
    plotting.learning_curves(records, fields=('other',))


@pytest.mark.parametrize(
  ('draw', 'given', 'told'),
  [
    ('accuracy_against_sparsity', [{'alpha': 1}], 'alpha, sparsity, accuracy'),
    ('accuracy_against_density', [{'density': 1}], 'method, density, accuracy'),
    ('weight_histograms', {}, 'histograms'),
    ('weight_histograms', {1.0: {}}, 'histograms'),
    ('mask_churn', [{'method': 'set', 'step': 0}], 'churn, churn_from_start'),
  ],
)
def test_nothing_to_draw_is_an_error(draw, given, told):
  with pytest.raises(ValueError, match=told):
    getattr(plotting, draw)(given)


def test_png_is_complete_reproducible_and_alone_in_its_folder(tmp_path):
  before = dict(matplotlib.rcParams)
  contents = []
  for _ in range(2):
    figure = plotting.accuracy_against_sparsity(_points())
    contents.append(plotting.save(figure, tmp_path / 'a.png').read_bytes())
  assert os.listdir(tmp_path) == ['a.png']
  assert contents[0] == contents[1]
  assert contents[0][:8] == b'\x89PNG\r\n\x1a\n'
  assert int.from_bytes(contents[0][16:20], 'big') == 1080
  # Global state of matplotlib is left alone.
  assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
  code = (
    'import sys; from powerprop_jax.report import plotting; '
    "plotting.near_zero([dict(alpha=1, leaf='w', epsilon=1, near_zero=1)]); "
    "sys.exit('matplotlib.pyplot' in sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
