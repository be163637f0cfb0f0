"""Accuracy against the share of weights left."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style


def accuracy_against_sparsity(
  records: Sequence[Record],
  *,
  title: str = '',
  num_classes: int | None = None,
  published: Sequence[Record] = (),
) -> Figure:
  """Test accuracy against the share of weights left, one line for each α.

  Args:
    records: one per measured point, with alpha, key, sparsity and accuracy.
    num_classes: draws the accuracy of guessing, 1/num_classes.
    published: points of others to compare with, drawn as hollow markers:
      records with alpha, sparsity, accuracy and, for the legend, label.

  Returns:
    A figure with the share of weights left, falling to the right on a
    logarithmic scale, and the sparsity written above.
  """
  points = records_lib.usable(records, 'alpha', 'sparsity', 'accuracy')
  scheme = style.by_alpha([*points, *published])
  with style.house_style():
    figure = style.figure(4.4)
    axes = figure.add_subplot()
    drawing.lines(axes, points, records_lib.density, 'accuracy', scheme)
    for record in published:
      look = scheme.looks[scheme.key(record)]._asdict()
      look = {**style.PUBLISHED, **look, 'linestyle': '', 'label': ''}
      axes.plot([records_lib.density(record)], [record['accuracy']], **look)
    labels = dict.fromkeys(r.get('label', 'published') for r in published)
    extra = [
      {**style.PUBLISHED, 'color': style.QUIET, 'label': name}
      for name in labels
    ]
    if num_classes is not None:
      axes.axhline(1 / num_classes, **style.CHANCE)
      extra.append(style.CHANCE)
    lowest = min(1 - point['sparsity'] for point in [*points, *published])
    drawing.weights_left_axis(axes, lowest)
    drawing.share_axis(axes, whole=True)
    axes.set_ylabel('test accuracy (%)')
    legend = style.handles(scheme.looks.values(), extra)
    note = records_lib.spread_note(points, 'accuracy')
    style.frame(figure, title, note, legend)
  return figure


def accuracy_against_density(
  records: Sequence[Record],
  *,
  title: str = '',
  published: Sequence[Record] = (),
) -> Figure:
  """Test accuracy against density, one line for each method of sparse training.

  Accuracies are drawn on a scale that is logarithmic in the error, so that
  those of a few good methods can be told apart beside a bad one.

  Args:
    records: one per trained network, with method, density, accuracy and, if
      there are several, key and alpha. Density is what was asked for, in
      (0, 1]: records of different keys are averaged where it is equal. A method
      of which there is only density 1, the dense network, is drawn as a level.
    published: points of others to compare with, records with method, density,
      accuracy and, for the legend, label; they are drawn as hollow markers in
      the colour of the method, joined by a thin dashed line. One with alpha is
      shown where α is the same, one without everywhere.

  Returns:
    A figure with a pair of axes for each α, with common scales; the density
    falls to the right on a logarithmic scale, with the sparsity written above.
  """
  points = records_lib.usable(records, 'method', 'density', 'accuracy')
  given = [r['alpha'] for r in points if r.get('alpha') is not None]
  alphas = sorted(set(given)) or [None]
  published = [r for r in published if any(_fits(r, a) for a in alphas)]
  shown = [*points, *published]
  scheme = style.by_method(shown)
  found = [*_densities(points), *_densities(published)] or [1.0]
  with style.house_style():
    figure, grid = style.panels(len(alphas))
    for axes, alpha in zip(grid, alphas, strict=True):
      drawing.accuracy_axis(axes, [record['accuracy'] for record in shown])
      drawing.weights_left_axis(
        axes, min(found), max(found), 9 if len(alphas) == 1 else 5
      )
      _draw_methods(axes, [r for r in points if _fits(r, alpha)], scheme)
      _draw_published(axes, [r for r in published if _fits(r, alpha)], scheme)
      drawing.label_first(axes, 'test accuracy (%)')
      if len(alphas) > 1:
        axes.set_title(style.alpha_label(alpha))
    note = records_lib.spread_note(points, 'accuracy')
    style.frame(
      figure,
      title,
      f'{note} Heights are logarithmic in the error.',
      _method_handles(points, published, scheme),
    )
  return figure


def _fits(record: Record, alpha: float | None) -> bool:
  return alpha is None or record.get('alpha') in (None, alpha)


def _is_level(records: Sequence[Record]) -> bool:
  """Whether there is nothing but the dense network."""
  return all(record['density'] == 1 for record in records)


def _densities(records: Sequence[Record]) -> list[float]:
  """All but those of levels, which need no room along the axis."""
  methods = dict.fromkeys(record['method'] for record in records)
  parts = [[r for r in records if r['method'] == m] for m in methods]
  return [r['density'] for part in parts if not _is_level(part) for r in part]


def _draw_methods(
  axes: Axes, points: Sequence[Record], scheme: style.Scheme
) -> None:
  """Our lines, and levels with their bands."""
  for method, look in scheme.looks.items():
    of_method = [point for point in points if point['method'] == method]
    if not of_method:
      continue
    if not _is_level(of_method):
      one = scheme._replace(looks={method: look})
      drawing.lines(axes, of_method, 'density', 'accuracy', one)
      continue
    values = records_lib.group(of_method, 'density', 'accuracy')[1]
    if values:
      axes.axhline(float(np.mean(values)), color=look.color, label=look.label)
      axes.axhspan(min(values), max(values), color=look.color, alpha=0.15, lw=0)


def _draw_published(
  axes: Axes, published: Sequence[Record], scheme: style.Scheme
) -> None:
  """Hollow markers and dashed lines; of a level, the line alone."""
  for method, look in scheme.looks.items():
    of_method = sorted(
      (r for r in published if r['method'] == method),
      key=lambda r: r['density'],
    )
    if not of_method:
      continue
    dashed = {**_DASHED, 'color': look.color}
    if _is_level(of_method):
      axes.axhline(of_method[0]['accuracy'], **{**dashed, 'marker': ''})
    else:
      axes.plot(
        [record['density'] for record in of_method],
        [record['accuracy'] for record in of_method],
        **{**dashed, 'marker': look.marker or 'o'},
      )


def _method_handles(
  points: Sequence[Record], published: Sequence[Record], scheme: style.Scheme
) -> list[Line2D]:
  """Our methods, those that are only published, and what a dashed line is."""
  ours = {point['method'] for point in points}
  theirs = [
    {
      **_DASHED,
      'color': look.color,
      'marker': look.marker or 'o',
      'label': look.label,
    }
    for method, look in scheme.looks.items()
    if method not in ours
  ]
  labels = dict.fromkeys(r.get('label', 'published') for r in published)
  theirs += [
    {**_DASHED, 'color': style.QUIET, 'label': label} for label in labels
  ]
  looks = [look for method, look in scheme.looks.items() if method in ours]
  return style.handles(looks, theirs)


_DASHED: Row = {
  **style.PUBLISHED,
  'linestyle': '--',
  'linewidth': 1,
  'markersize': 5,
  'zorder': 2,
}
