import io
import math

from absl.testing import absltest, parameterized
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
import numpy as np

from experiments.class_specialisation import figures
from powerprop_jax.report import plotting


def _draw(figure):
  """Lays the figure out, as saving does; warnings are errors in the tests."""
  figure.savefig(io.BytesIO(), format='png', dpi=50)
  return figure


_DENSITIES = (0.01, 0.02, 0.05, 0.1)


def _sparse_points(alphas=(1,), methods=('rigl', 'static'), keys=(0, 1)):
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


def _legend(figure):
  (legend,) = figure.legends
  return [text.get_text() for text in legend.get_texts()]


def _named(axes, label):
  (line,) = (x for x in axes.lines if x.get_label() == label)
  return line


class DensityTest(parameterized.TestCase):
  def test_a_line_of_means_for_each_method_with_a_band(self):
    figure = plotting.accuracy_against_density(_sparse_points(), title='Net')
    (axes,) = _draw(figure).axes
    x, y = _named(axes, 'RigL').get_data()
    np.testing.assert_allclose(x, _DENSITIES)
    np.testing.assert_allclose(y, 0.9505 + np.array(_DENSITIES) / 2)
    bands = [
      band
      for band in axes.collections
      if isinstance(band, FillBetweenPolyCollection)
    ]
    self.assertLen(bands, 2)
    self.assertEqual(_legend(figure), ['static', 'RigL'])
    left, right = axes.get_xlim()
    self.assertGreater(left, right)
    self.assertEqual(axes.get_xscale(), 'log')

  def test_a_method_looks_the_same_whatever_else_is_drawn(self):
    looks = set()
    for methods in (('rigl',), ('snfs', 'rigl'), ('other', 'rigl', 'dsr')):
      figure = plotting.accuracy_against_density(_sparse_points((1,), methods))
      line = _named(figure.axes[0], 'RigL')
      looks.add((to_hex(line.get_color()), line.get_marker()))
      self.assertLen(
        {to_hex(x.get_color()) for x in figure.axes[0].lines}, len(methods)
      )
    self.assertLen(looks, 1)

  def test_the_dense_network_is_a_level_and_takes_no_room(self):
    points = _sparse_points()
    dense = [
      {'method': 'dense', 'key': k, 'density': 1.0, 'accuracy': 0.99 + k / 500}
      for k in (0, 1)
    ]
    figure = _draw(plotting.accuracy_against_density([*points, *dense]))
    (axes,) = figure.axes
    self.assertLess(axes.get_xlim()[0], 0.2)
    line = _named(axes, 'dense')
    np.testing.assert_allclose(line.get_ydata(), 0.991)
    np.testing.assert_allclose(line.get_xdata(), [0, 1])

  def test_equal_steps_up_halve_the_error(self):
    figure = _draw(plotting.accuracy_against_density(_sparse_points()))
    (axes,) = figure.axes
    heights = axes.transData.transform(
      [(0.05, 0.96), (0.05, 0.98), (0.05, 0.99)]
    )[:, 1]
    self.assertAlmostEqual(heights[1] - heights[0], heights[2] - heights[1])
    labels = [float(text.get_text()) for text in axes.get_yticklabels()]
    np.testing.assert_allclose(labels, 100 * axes.get_yticks())
    self.assertGreaterEqual(len(labels), 3)

  def test_published_points_are_hollow_and_dashed_in_our_colours(self):
    published = [
      {'method': method, 'density': density, 'accuracy': 0.97}
      for method in ('rigl', 'deep_r')
      for density in (0.05, 0.02)
    ]
    published.append({'method': 'dense', 'density': 1.0, 'accuracy': 0.98})
    figure = plotting.accuracy_against_density(
      _sparse_points(), published=published
    )
    (axes,) = _draw(figure).axes
    hollow = [x for x in axes.lines if x.get_markerfacecolor() == 'white']
    colours = [to_hex(x.get_color()) for x in hollow]
    self.assertIn(to_hex(_named(axes, 'RigL').get_color()), colours)
    self.assertLen(hollow, 3)
    for line in hollow:
      self.assertEqual(line.get_linestyle(), '--')
    np.testing.assert_allclose(hollow[-1].get_xdata(), [0.02, 0.05])
    self.assertEqual(
      _legend(figure), ['static', 'RigL', 'dense', 'DeepR', 'published']
    )

  def test_published_points_of_other_alphas_are_not_in_the_legend(self):
    published = [
      {'method': 'deep_r', 'density': 0.05, 'accuracy': 0.97, 'alpha': 1}
    ]
    figure = plotting.accuracy_against_density(
      _sparse_points(alphas=(2,)), published=published
    )
    self.assertEqual(_legend(figure), ['static', 'RigL'])

  def test_each_alpha_has_its_axes_on_common_scales(self):
    published = [
      {'method': 'set', 'density': 0.5, 'accuracy': 0.5, 'alpha': 2},
      {'method': 'dsr', 'density': 0.5, 'accuracy': 0.5},
    ]
    figure = plotting.accuracy_against_density(
      _sparse_points(alphas=(2, 1)), published=published
    )
    first, second = _draw(figure).axes
    self.assertEqual(
      [axes.get_title(loc='left') for axes in (first, second)],
      ['α = 1', 'α = 2'],
    )
    self.assertEqual(first.get_ylim(), second.get_ylim())
    self.assertEqual(first.get_xlim(), second.get_xlim())
    self.assertLen(first.lines, 3)
    self.assertLen(second.lines, 4)

  @parameterized.parameters(
    ((1.0,), (0.03,)),
    ((0.0,), (1.0,)),
    ((None,), (0.1,)),
    ((0.5, math.nan), (0.001, 0.002)),
    ((1.0, 0.1), (0.5, 1.0)),
    ((0.9412, 0.9418), (0.033, 0.034)),
  )
  def test_any_points_can_be_drawn(self, accuracies, densities):
    records = [
      {'method': 'rigl', 'density': density, 'accuracy': accuracy}
      for density in densities
      for accuracy in accuracies
    ]
    figure = _draw(plotting.accuracy_against_density(records))
    for ticks in (figure.axes[0].get_xticks(), figure.axes[0].get_yticks()):
      self.assertNotEmpty(ticks)

  def test_no_record_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'method, density, accuracy'):
      plotting.accuracy_against_density([{'density': 1}])


class MasksOverTimeTest(parameterized.TestCase):
  def _records(self, alphas=(1,), keys=(0, 1), **values):
    return [
      {'method': m, 'alpha': a, 'key': k, 'step': s, **values}
      for m in ('rigl', 'static')
      for a in alphas
      for k in keys
      for s in (0, 100, 200)
    ]

  def test_layer_densities_have_axes_for_each_layer_on_one_scale(self):
    records = [
      {**record, 'layer': f'net/~/linear_{i}/w', 'density': 0.05 * 3**i}
      for record in self._records()
      for i in range(3)
    ]
    figure = _draw(plotting.layer_densities(records, title='Net'))
    self.assertEqual(
      [axes.get_title(loc='left') for axes in figure.axes],
      ['linear_0', 'linear_1', 'linear_2'],
    )
    for i, axes in enumerate(figure.axes):
      x, y = _named(axes, 'RigL').get_data()
      np.testing.assert_array_equal(x, [0, 100, 200])
      np.testing.assert_allclose(y, 0.05 * 3**i)
      self.assertEqual(axes.get_ylim(), figure.axes[0].get_ylim())
      self.assertEqual(axes.get_yscale(), 'log')
    self.assertEqual(_legend(figure), ['static', 'RigL'])

  def test_a_layer_without_weights_leaves_a_gap(self):
    records = self._records(layer='w', density=0.0)
    _draw(plotting.layer_densities(records))

  def test_several_alphas_differ_in_line_style(self):
    records = self._records(alphas=(1, 2, 3), layer='w', density=0.5)
    (axes,) = _draw(plotting.layer_densities(records)).axes
    lines = [_named(axes, f'RigL, α = {alpha}') for alpha in (1, 2, 3)]
    self.assertLen({to_hex(line.get_color()) for line in lines}, 1)
    self.assertEqual(
      [line.get_linestyle() for line in lines], ['--', '-', '-.']
    )

  def test_mask_churn_shows_the_fields_that_occur(self):
    records = self._records(churn=0.3, churn_from_start=0.5)
    figure = _draw(plotting.mask_churn(records))
    self.assertEqual(
      [axes.get_title(loc='left') for axes in figure.axes],
      ['since the last look', 'since the start'],
    )
    for axes, value in zip(figure.axes, (0.3, 0.5), strict=True):
      np.testing.assert_allclose(_named(axes, 'static').get_ydata(), value)
    only = _draw(plotting.mask_churn(self._records(churn=0.0)))
    self.assertLen(only.axes, 1)
    with self.assertRaisesRegex(ValueError, 'churn, churn_from_start'):
      plotting.mask_churn(self._records())


class ClassSpecialisationTest(parameterized.TestCase):
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
    self.assertEqual(
      [axes.get_title(loc='left') for axes in _draw(figure).axes],
      ['linear_0', 'linear_1'],
    )
    for axes in figure.axes:
      dense, rigl = axes.patches
      np.testing.assert_allclose(dense.get_data().edges, np.arange(1, 10) / 10)
      np.testing.assert_allclose(dense.get_data().values[:5].sum(), 1)
      np.testing.assert_allclose(rigl.get_data().values[-1], 2 / 3)
      self.assertTrue(dense.get_fill())
      self.assertFalse(rigl.get_fill())
      means = [
        line.get_xdata()[0] for line in axes.lines if line.get_marker() == 'v'
      ]
      np.testing.assert_allclose(means, [0.24, 0.7])
    self.assertEqual(
      _legend(figure),
      [
        'dense (25.0% left out)',
        'RigL (25.0% left out)',
        'all classes alike',
      ],
    )

  @parameterized.parameters(
    ([0.1],), ([1.0],), ([None],), ([0.1 - 1e-9, 0.2],), ([0.5, 0.55],)
  )
  def test_any_values_can_be_drawn(self, values):
    for num_classes in (None, 2, 10):
      records = self._records(values, method='static', alpha=2, key=1)
      _draw(figures.class_specialisation(records, num_classes=num_classes))

  def test_bad_arguments_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'method, layer, specialisation'):
      figures.class_specialisation([{'layer': 'w'}])
    with self.assertRaisesRegex(ValueError, 'bins'):
      figures.class_specialisation(self._records([0.5], method='rigl'), bins=0)


if __name__ == '__main__':
  absltest.main()
