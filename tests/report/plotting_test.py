import io
import math
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import matplotlib
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
import numpy as np

from powerprop_jax.report import analysis, plotting

_ALPHAS = (1, 1.5, 2.0)
_SPARSITIES = (0.0, 0.5, 0.9, 0.99)


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
    for sparsity in _SPARSITIES
  ]


def _net(key, power=1):
  generator = np.random.default_rng(key)
  return {
    f'net/~/linear_{i}': {'w': generator.normal(size=(30, 20)) ** power}
    for i in range(3)
  }


def _draw(figure):
  """Lays the figure out, as saving does; warnings are errors in the tests."""
  figure.savefig(io.BytesIO(), format='png', dpi=50)
  return figure


def _line(axes, alpha):
  (line,) = (x for x in axes.lines if x.get_label() == f'α = {alpha:g}')
  return line


def _texts(figure):
  return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


class AccuracyTest(parameterized.TestCase):
  def test_a_line_for_each_alpha_and_a_band_where_keys_differ(self):
    figure = _draw(plotting.accuracy_against_sparsity(_points(), title='Net'))
    (axes,) = figure.axes
    self.assertLen(axes.lines, 3)
    bands = [
      band
      for band in axes.collections
      if isinstance(band, FillBetweenPolyCollection)
    ]
    self.assertLen(bands, 3)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    self.assertEqual(legend, ['α = 1', 'α = 1.5', 'α = 2'])
    self.assertIn('Net', _texts(figure))
    self.assertIn(
      'Lines: mean over 3 keys. Bands: lowest to highest.', _texts(figure)
    )

  def test_lines_are_means_against_the_share_of_weights_left(self):
    figure = plotting.accuracy_against_sparsity(_points())
    x, y = _line(figure.axes[0], 2).get_data()
    np.testing.assert_allclose(x, [0.01, 0.1, 0.5, 1.0])
    np.testing.assert_allclose(y, 0.91 - (1 - x) / 4)

  def test_axis_falls_to_the_right_and_is_labelled_both_ways(self):
    figure = _draw(plotting.accuracy_against_sparsity(_points()))
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    self.assertGreater(left, right)
    self.assertEqual(axes.get_xlabel(), 'weights left (%)')
    self.assertEqual(axes.get_ylabel(), 'test accuracy (%)')
    below = [text.get_text() for text in axes.get_xticklabels()]
    self.assertEqual(below, ['100', '50', '20', '10', '5', '2', '1'])
    (top,) = axes.child_axes
    above = [text.get_text() for text in top.get_xticklabels()]
    self.assertEqual(above, ['0', '50', '80', '90', '95', '98', '99'])

  def test_the_baseline_is_grey_and_dashed_whatever_else_is_drawn(self):
    for alphas in ((1,), (1, 2), (3, 1, 2)):
      axes = plotting.accuracy_against_sparsity(_points(alphas)).axes[0]
      line = _line(axes, 1)
      self.assertEqual(line.get_linestyle(), '--')
      self.assertEqual(to_hex(line.get_color()), '#6b7280')
      colours = {to_hex(line.get_color()) for line in axes.lines}
      self.assertLen(colours, len(alphas))

  def test_chance_and_published_values_are_in_the_legend(self):
    published = [
      {'alpha': 2, 'sparsity': 0.9, 'accuracy': 0.8, 'label': 'Others'},
      {'alpha': 4, 'sparsity': 0.9, 'accuracy': 0.8, 'label': 'Others'},
    ]
    figure = plotting.accuracy_against_sparsity(
      _points(), num_classes=10, published=published
    )
    (axes,) = _draw(figure).axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    self.assertEqual(legend[-3:], ['α = 4', 'Others', 'chance'])
    chance = [x for x in axes.lines if x.get_label() == 'chance']
    np.testing.assert_allclose(chance[0].get_ydata(), 0.1)

  def test_values_not_finite_leave_gaps_and_are_counted(self):
    points = _points(keys=(0,))
    points[1]['accuracy'] = None
    points[2]['accuracy'] = math.nan
    figure = _draw(plotting.accuracy_against_sparsity(points))
    _, y = _line(figure.axes[0], 1).get_data()
    np.testing.assert_array_equal(np.isnan(y), [False, True, True, False])
    self.assertIn('One key (random seed). Not finite: 2.', _texts(figure))

  @parameterized.parameters(0.0, 0.5, 0.9, 0.9995)
  def test_one_point_is_enough(self, sparsity):
    record = {'alpha': 2.0, 'sparsity': sparsity, 'accuracy': 0.5}
    _draw(plotting.accuracy_against_sparsity([record]))

  def test_no_record_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'alpha, sparsity, accuracy'):
      plotting.accuracy_against_sparsity([{'alpha': 1}])


class HistogramsTest(absltest.TestCase):
  def test_rows_are_layers_and_columns_are_powers(self):
    thetas = {alpha: _net(0, int(alpha)) for alpha in (3, 1, 2)}
    histograms = analysis.weight_histograms(thetas, bins=31)
    figure = _draw(plotting.weight_histograms(histograms, title='Weights'))
    grid = np.reshape(figure.axes, (3, 3))
    self.assertEqual(
      [axes.get_title() for axes in grid[0]], ['α = 1', 'α = 2', 'α = 3']
    )
    self.assertEqual(
      [axes.get_ylabel() for axes in grid[:, 0]],
      ['linear_0', 'linear_1', 'linear_2'],
    )
    for row, leaf in zip(grid, histograms[1], strict=True):
      highest = max(histograms[alpha][leaf].counts.max() for alpha in thetas)
      for axes in row:
        self.assertEqual(axes.get_yscale(), 'log')
        self.assertGreater(axes.get_ylim()[1], highest)
        self.assertEqual(axes.get_xlim(), row[0].get_xlim())

  def test_one_network_of_zeros_or_nan_is_drawn(self):
    for value in (0.0, np.nan):
      theta = {'a': {'w': np.full((3, 3), value)}}
      histograms = analysis.weight_histograms({2.0: theta})
      _draw(plotting.weight_histograms(histograms))

  def test_no_histogram_is_an_error(self):
    for histograms in ({}, {1.0: {}}):
      with self.assertRaisesRegex(ValueError, 'histograms'):
        plotting.weight_histograms(histograms)


class PanelsTest(parameterized.TestCase):
  def test_near_zero_has_axes_for_each_leaf_and_all_together_first(self):
    records = [
      {**record, 'alpha': alpha, 'key': key}
      for alpha in _ALPHAS
      for key in (0, 1)
      for record in analysis.fraction_near_zero(_net(key))
    ]
    figure = _draw(plotting.near_zero(records, title='Near zero'))
    self.assertEqual(
      [axes.get_title(loc='left') for axes in figure.axes],
      ['all layers', 'linear_0', 'linear_1', 'linear_2'],
    )
    for axes in figure.axes:
      self.assertLen(axes.lines, 3)
      self.assertEqual(axes.get_xscale(), 'log')
    self.assertLen(figure.legends, 1)

  def test_mask_overlap_has_both_measures_and_chance(self):
    records = [
      {**record, 'alpha': alpha, 'key': 0}
      for alpha in _ALPHAS
      for record in analysis.mask_overlap(_net(0), _net(int(4 * alpha)))
    ]
    figure = _draw(plotting.mask_overlap(records))
    self.assertEqual(
      [axes.get_title(loc='left') for axes in figure.axes],
      ['agreement', 'intersection'],
    )
    for axes in figure.axes:
      self.assertLen(axes.lines, 4)
    x, y = figure.axes[0].lines[-1].get_data()
    np.testing.assert_allclose(y, x**2 + (1 - x) ** 2, atol=0.01)
    with self.assertRaisesRegex(ValueError, "'conv'; there are .*total"):
      plotting.mask_overlap(records, leaf='conv')

  def test_learning_curves_draw_the_fields_that_occur(self):
    records = [
      {
        'alpha': a,
        'key': k,
        'step': s,
        'loss': math.nan if s > 90 else 1 / (s + 1),
      }
      for a in _ALPHAS
      for k in (0, 1)
      for s in range(100)
    ]
    records += [
      {'alpha': a, 'key': k, 'step': 99, 'accuracy': 0.5}
      for a in _ALPHAS
      for k in (0, 1)
    ]
    records.append({'step': 3, 'steps_per_second': 100.0})
    figure = _draw(plotting.learning_curves(records))
    loss, accuracy = figure.axes
    self.assertEqual(loss.get_yscale(), 'log')
    self.assertEqual(accuracy.get_title(loc='left'), 'accuracy (%)')
    self.assertLen(loss.lines, 3)
    self.assertLen(_line(loss, 2).get_xdata(), 100)
    only = plotting.learning_curves(records, fields=('accuracy', 'other'))
    self.assertLen(_draw(only).axes, 1)
    with self.assertRaisesRegex(ValueError, 'other'):
      plotting.learning_curves(records, fields=('other',))

  @parameterized.parameters(1, 2, 3, 5, 7)
  def test_any_number_of_leaves_and_powers_fits(self, count):
    records = [
      {'alpha': a, 'leaf': f'l_{i}/w', 'epsilon': 0.1, 'near_zero': 0.5}
      for i in range(count)
      for a in range(1, 2 * count)
    ]
    self.assertLen(_draw(plotting.near_zero(records)).axes, count)


class SaveTest(absltest.TestCase):
  def test_png_is_complete_reproducible_and_alone_in_its_folder(self):
    with tempfile.TemporaryDirectory() as folder:
      contents = []
      for _ in range(2):
        figure = plotting.accuracy_against_sparsity(_points())
        path = plotting.save(figure, pathlib.Path(folder) / 'a.png')
        contents.append(path.read_bytes())
      self.assertEqual(os.listdir(folder), ['a.png'])
    self.assertEqual(contents[0], contents[1])
    self.assertEqual(contents[0][:8], b'\x89PNG\r\n\x1a\n')
    self.assertEqual(int.from_bytes(contents[0][16:20], 'big'), 1080)

  def test_global_state_of_matplotlib_is_left_alone(self):
    before = dict(matplotlib.rcParams)
    _draw(plotting.accuracy_against_sparsity(_points()))
    self.assertEqual(dict(matplotlib.rcParams), before)

  def test_pyplot_is_never_imported(self):
    code = (
      'import sys; from powerprop_jax.report import plotting; '
      "plotting.near_zero([dict(alpha=1, leaf='w', epsilon=1, near_zero=1)]); "
      "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


if __name__ == '__main__':
  absltest.main()
