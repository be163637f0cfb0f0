"""Figures of methods of sparse training."""

import math

from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
import numpy as np
import plots
import pytest

from experiments.class_specialisation import figures
from powerprop_jax.report import plotting

_DENSITIES = (0.01, 0.02, 0.05, 0.1)


def _points(alphas=(1,), methods=('rigl', 'static'), keys=(0, 1)):
  return [
    {
      'method': method,
      'alpha': alpha,
      'key': key,
      'density': density,
      'accuracy': 0.95 + density / (2 * alpha + index) + 0.001 * key,
    }
    for index, method in enumerate(methods)
    for alpha in alphas
    for key in keys
    for density in _DENSITIES
  ]


class DensityTest:
  def test_a_line_of_means_for_each_method_with_a_band(self):
    figure = plotting.accuracy_against_density(_points(), title='Net')
    (axes,) = plots.draw(figure).axes
    x, y = plots.line(axes, 'RigL').get_data()
    np.testing.assert_allclose(x, _DENSITIES)
    np.testing.assert_allclose(y, 0.9505 + np.array(_DENSITIES) / 2)
    assert len(axes.findobj(FillBetweenPolyCollection)) == 2
    assert plots.legend(figure) == ['static', 'RigL']
    left, right = axes.get_xlim()
    assert left > right and axes.get_xscale() == 'log'

  def test_a_method_looks_the_same_whatever_it_is_called_or_drawn_with(self):
    looks = set()
    for methods in (('set',), ('snfs', 'sparse_evolution'), ('x', 'set', 'y')):
      axes = plotting.accuracy_against_density(_points((1,), methods)).axes[0]
      line = plots.line(axes, 'SET')
      looks.add((to_hex(line.get_color()), line.get_marker()))
      assert len({to_hex(x.get_color()) for x in axes.lines}) == len(methods)
    assert len(looks) == 1

  def test_the_dense_network_is_a_level_and_takes_no_room(self):
    dense = [
      {'method': 'dense', 'key': k, 'density': 1.0, 'accuracy': 0.99 + k / 500}
      for k in (0, 1)
    ]
    figure = plotting.accuracy_against_density([*_points(), *dense])
    (axes,) = plots.draw(figure).axes
    assert axes.get_xlim()[0] < 0.2
    x, y = plots.line(axes, 'dense').get_data()
    np.testing.assert_allclose(y, 0.991)
    np.testing.assert_allclose(x, [0, 1])

  def test_equal_steps_up_halve_the_error(self):
    figure = plots.draw(plotting.accuracy_against_density(_points()))
    (axes,) = figure.axes
    points = [(0.05, 0.96), (0.05, 0.98), (0.05, 0.99)]
    low, middle, high = axes.transData.transform(points)[:, 1]
    assert middle - low == pytest.approx(high - middle)
    labels = [float(text.get_text()) for text in axes.get_yticklabels()]
    np.testing.assert_allclose(labels, 100 * axes.get_yticks())
    assert len(labels) >= 3

  def test_published_points_are_hollow_and_dashed_in_our_colours(self):
    published = [
      {'method': method, 'density': density, 'accuracy': 0.97}
      for method in ('rigl', 'deep_r')
      for density in (0.05, 0.02)
    ]
    published.append({'method': 'dense', 'density': 1.0, 'accuracy': 0.98})
    figure = plotting.accuracy_against_density(_points(), published=published)
    (axes,) = plots.draw(figure).axes
    hollow = [x for x in axes.lines if x.get_markerfacecolor() == 'white']
    assert [x.get_linestyle() for x in hollow] == ['--'] * 3
    ours = plots.line(axes, 'RigL').get_color()
    assert to_hex(ours) in [to_hex(x.get_color()) for x in hollow]
    np.testing.assert_allclose(hollow[-1].get_xdata(), [0.02, 0.05])
    legend = ['static', 'RigL', 'dense', 'DeepR', 'published']
    assert plots.legend(figure) == legend
    # Those of another α are not there.
    other = plotting.accuracy_against_density(
      _points(alphas=(2,)), published=[{**published[2], 'alpha': 1}]
    )
    assert plots.legend(other) == ['static', 'RigL']

  def test_each_alpha_has_its_axes_on_common_scales(self):
    point = {'method': 'dsr', 'density': 0.5, 'accuracy': 0.5}
    published = [{**point, 'method': 'set', 'alpha': 2}, point]
    points = _points(alphas=(2, 1))
    figure = plotting.accuracy_against_density(points, published=published)
    first, second = plots.draw(figure).axes
    assert plots.titles(figure) == ['α = 1', 'α = 2']
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()
    assert (len(first.lines), len(second.lines)) == (3, 4)

  def test_any_points_can_be_drawn(self):
    for accuracies, densities in (
      *(((1.0,), (0.03,)), ((0.0,), (1.0,)), ((None,), (0.1,))),
      *(((0.5, math.nan), (0.001, 0.002)), ((1.0, 0.1), (0.5, 1.0))),
      ((0.9412, 0.9418), (0.033, 0.034)),
    ):
      records = [
        {'method': 'rigl', 'density': density, 'accuracy': accuracy}
        for density in densities
        for accuracy in accuracies
      ]
      (axes,) = plots.draw(plotting.accuracy_against_density(records)).axes
      assert len(axes.get_xticks()) and len(axes.get_yticks())


def _over_time(alphas=(1,), keys=(0, 1), **values):
  return [
    {'method': m, 'alpha': a, 'key': k, 'step': s, **values}
    for m in ('rigl', 'static')
    for a in alphas
    for k in keys
    for s in (0, 100, 200)
  ]


class MasksOverTimeTest:
  def test_layer_densities_have_axes_for_each_layer_on_one_scale(self):
    records = [
      {**record, 'layer': f'net/~/linear_{i}/w', 'density': 0.05 * 3**i}
      for record in _over_time()
      for i in range(3)
    ]
    figure = plots.draw(plotting.layer_densities(records, title='Net'))
    assert plots.titles(figure) == ['linear_0', 'linear_1', 'linear_2']
    for i, axes in enumerate(figure.axes):
      x, y = plots.line(axes, 'RigL').get_data()
      np.testing.assert_array_equal(x, [0, 100, 200])
      np.testing.assert_allclose(y, 0.05 * 3**i)
      assert axes.get_ylim() == figure.axes[0].get_ylim()
      assert axes.get_yscale() == 'log'
    assert plots.legend(figure) == ['static', 'RigL']
    # A layer without weights leaves a gap.
    plots.draw(plotting.layer_densities(_over_time(layer='w', density=0.0)))

  def test_several_alphas_differ_in_line_style(self):
    records = _over_time(alphas=(1, 2, 3), layer='w', density=0.5)
    (axes,) = plots.draw(plotting.layer_densities(records)).axes
    lines = [plots.line(axes, f'RigL, α = {alpha}') for alpha in (1, 2, 3)]
    assert len({to_hex(line.get_color()) for line in lines}) == 1
    assert [line.get_linestyle() for line in lines] == ['--', '-', '-.']

  def test_mask_churn_shows_the_fields_that_occur(self):
    records = _over_time(churn=0.3, churn_from_start=0.5)
    figure = plots.draw(plotting.mask_churn(records))
    titles = plots.titles(figure)
    assert titles == ['since the evaluation before', 'since the start']
    for axes, value in zip(figure.axes, (0.3, 0.5), strict=True):
      y = plots.line(axes, 'static').get_ydata()
      np.testing.assert_allclose(y, value)
    only = plots.draw(plotting.mask_churn(_over_time(churn=0.0)))
    assert len(only.axes) == 1


class ClassSpecialisationTest:
  def _records(self, values, **fields):
    return [
      {'layer': f'net/linear_{i}', 'specialisation': value, **fields}
      for i in (0, 1)
      for value in values
    ]

  def test_shares_of_features_dense_filled_others_as_outlines(self):
    records = [
      *self._records([0.1, 0.12, 0.5, None], method='dense'),
      *self._records([0.3, math.nan, 0.9, 0.9], method='rigl'),
    ]
    figure = figures.class_specialisation(records, num_classes=10, bins=8)
    assert plots.titles(plots.draw(figure)) == ['linear_0', 'linear_1']
    for axes in figure.axes:
      dense, rigl = axes.patches
      np.testing.assert_allclose(dense.get_data().edges, np.arange(1, 10) / 10)
      np.testing.assert_allclose(dense.get_data().values[:5].sum(), 1)
      np.testing.assert_allclose(rigl.get_data().values[-1], 2 / 3)
      assert dense.get_fill() and not rigl.get_fill()
      means = [x.get_xdata()[0] for x in axes.lines if x.get_marker() == 'v']
      np.testing.assert_allclose(means, [0.24, 0.7])
    assert plots.legend(figure) == [
      *('dense (25.0% left out)', 'RigL (25.0% left out)'),
      'all classes alike',
    ]

  def test_any_values_can_be_drawn(self):
    for values in ([0.1], [1.0], [None], [0.1 - 1e-9, 0.2], [0.5, 0.55]):
      records = self._records(values, method='static', alpha=2, key=1)
      for num_classes in (None, 2, 10):
        options = {'num_classes': num_classes}
        plots.draw(figures.class_specialisation(records, **options))

  def test_bad_arguments_are_refused(self):
    with pytest.raises(ValueError, match='method, layer, specialisation'):
      figures.class_specialisation([{'layer': 'w'}])
    with pytest.raises(ValueError, match='bins'):
      figures.class_specialisation(self._records([0.5], method='rigl'), bins=0)
