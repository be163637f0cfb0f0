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
    assert plots.legend(figure) == ['α = 1', 'α = 1.5', 'α = 2']
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
    assert plots.legend(figure)[-3:] == ['α = 4', 'Others', 'chance']
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

  def test_a_needle_at_zero_is_told_as_a_share(self):
    theta = {'a': {'w': np.zeros((10, 100))}}
    theta['a']['w'].flat[:20] = np.linspace(-7, 7, 20)
    histograms = analysis.weight_histograms({2.0: theta})
    figure = plots.draw(plotting.weight_histograms(histograms))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ['98 % within\n±0.21']
    counts = axes.patches[0].get_data().values
    assert np.nansum(counts) == histograms[2.0]['a/w'].counts.sum() - 980
    # What has a shape is shown.
    histograms = analysis.weight_histograms({2.0: _net(0, 2)})
    figure = plotting.weight_histograms(histograms)
    assert not any(axes.texts for axes in figure.axes)

  @pytest.mark.parametrize('width', ['column', 'page'])
  def test_the_words_about_a_needle_lie_above_the_bars(self, width):
    needle = {'a': {'w': np.zeros((10, 1000))}}
    needle['a']['w'].flat[:20] = np.linspace(-7, 7, 20)
    thetas = {1.0: {'a': {'w': np.full((10, 1000), 0.5)}}, 4.0: needle}
    histograms = analysis.weight_histograms(thetas)
    with plotting.paper(width):
      figure = plots.draw(plotting.weight_histograms(histograms))
    axes = figure.axes[1]
    (text,) = axes.texts
    box = text.get_window_extent()
    lowest = axes.transData.inverted().transform((0, box.y0))[1]
    assert lowest > histograms[1.0]['a/w'].counts.max() == 10_000

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


def test_axes_of_shares_end_at_all_of_them_with_room_for_a_marker():
  for values in ((1.0, 1.0), (0.2, 1.0), (0.99, 0.995), (0.0, 0.0)):
    records = [
      {'alpha': 1, 'step': step, 'accuracy': value, 'loss': 0.1}
      for step, value in enumerate(values)
    ]
    figure = plots.draw(plotting.learning_curves(records))
    loss, accuracy = figure.axes
    low, high = accuracy.get_ylim()
    ticks = [t for t in accuracy.get_yticks() if low <= t <= high]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 1
    for value in values:
      assert 0.02 < (value - low) / (high - low) < 0.98
    labels = [text.get_text() for text in loss.get_yticklabels()]
    assert labels and all(float(label) > 0 for label in labels)


def test_the_best_accuracies_and_a_lone_density_stand_clear_of_the_frame():
  records = [
    {'method': method, 'density': 0.1, 'accuracy': accuracy}
    for method, accuracy in (('set', 1.0), ('rigl', 0.5), ('snfs', 0.999))
  ]
  figure = plots.draw(plotting.accuracy_against_density(records))
  (axes,) = figure.axes
  for record in records:
    at = axes.transData.transform((0.1, record['accuracy']))
    assert ((at - axes.bbox.min) / axes.bbox.size > 0.03).all()
    assert ((axes.bbox.max - at) / axes.bbox.size > 0.03).all()
  labels = [text.get_text() for text in axes.get_yticklabels()]
  assert labels[0] == '100'
  assert [text.get_text() for text in axes.get_xticklabels()] == ['10']


class PaperTest:
  def test_figures_have_the_width_and_say_only_what_a_caption_cannot(self):
    histograms = analysis.weight_histograms(
      {alpha: _net(0) for alpha in range(1, 5)}
    )
    for width, inches in (('column', 3.5), ('page', 7.2), (5, 5)):
      with plotting.paper(width):
        for figure in (
          plotting.accuracy_against_sparsity(_points(), title='Net'),
          plotting.weight_histograms(histograms, title='Net'),
        ):
          assert plots.draw(figure).get_figwidth() == inches
          said = ' '.join(plots.texts(figure))
          assert 'Net' not in said and 'keys' not in said
    with plotting.paper('column', titles=True):
      figure = plotting.accuracy_against_sparsity(_points(), title='Net')
    assert 'Net' in plots.texts(figure)
    assert plotting.near_zero(_near_zero()).get_figwidth() == 7.2

  @pytest.mark.parametrize('width', ['colum', 0, 350, None])
  def test_a_width_that_cannot_be_is_refused(self, width):
    with (
      pytest.raises(ValueError, match=f'inches.* got {width!r}'),
      plotting.paper(width),
    ):
      pass


def _near_zero():
  return [{'alpha': 1, 'leaf': 'w', 'epsilon': 1.0, 'near_zero': 1.0}]


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


def test_files_are_complete_reproducible_and_alone_in_their_folder(tmp_path):
  before = dict(matplotlib.rcParams)
  contents = []
  for _ in range(2):
    figure = plotting.accuracy_against_sparsity(_points())
    assert plotting.save(figure, tmp_path / 'a_0.5') == tmp_path / 'a_0.5.png'
    files = sorted(tmp_path.iterdir())
    contents.append([file.read_bytes() for file in files])
  assert [file.name for file in files] == [
    *('a_0.5.pdf', 'a_0.5.png', 'a_0.5.svg')
  ]
  assert contents[0] == contents[1]
  pdf, png, svg = contents[0]
  assert png[:8] == b'\x89PNG\r\n\x1a\n'
  assert int.from_bytes(png[16:20], 'big') == 1080
  # Type 42 is called TrueType; journals refuse Type 3.
  assert pdf[:5] == b'%PDF-' and b'FontFile2' in pdf and b'/Type3' not in pdf
  assert svg[:5] == b'<?xml' and b'<text' not in svg
  # Global state of matplotlib is left alone.
  assert dict(matplotlib.rcParams) == before


def test_a_name_with_an_ending_is_one_file(tmp_path):
  figure = plotting.near_zero(_near_zero())
  assert plotting.save(figure, tmp_path / 'a.pdf') == tmp_path / 'a.pdf'
  assert os.listdir(tmp_path) == ['a.pdf']
  # Saved by its own method, it has the same fonts.
  figure.savefig(tmp_path / 'b.pdf')
  assert b'/Type3' not in (tmp_path / 'b.pdf').read_bytes()


def test_a_notebook_shows_a_figure():
  formatters = pytest.importorskip('IPython.core.formatters')
  found, _ = formatters.DisplayFormatter().format(
    plotting.near_zero(_near_zero())
  )
  assert found['image/png'][:4] == b'\x89PNG'


def test_pyplot_is_never_imported():
  code = (
    'import sys; from powerprop_jax.report import plotting; '
    "plotting.near_zero([dict(alpha=1, leaf='w', epsilon=1, near_zero=1)]); "
    "sys.exit('matplotlib.pyplot' in sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
