"""How α was chosen, and what came of it: a line for each way to choose.

Records have method and, where α is fixed, alpha. Fixed powers have the colours
that they have everywhere; the other methods a colour and marker of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.report import analysis
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style, weights
from powerprop_jax.report.plotting.style import Look, Scheme

# Colour, marker, line and name (colours of Okabe and Ito).
_METHODS = {
  'published_theta': ('#0072b2', 's', '-', 'published, θ kept'),
  'published_phi': ('#56b4e9', 'D', '-', 'published, φ kept'),
  'uncapped_theta': ('#882255', '^', '-', 'no cap, θ kept'),
  'uncapped_phi': ('#cc79a7', 'v', '-', 'no cap, φ kept'),
  'per_leaf': ('#009e73', 'p', '-', 'α for each layer'),
  'race': ('#d55e00', '*', '-', 'race'),
  'branch': ('#1f2430', 'X', '-', 'race of branches'),
}
_LEAF_STYLES = ('-', '--', '-.', ':')


def name_of(method: str, alpha: float | None = None) -> str:
  """What people call a way to choose α.

  Example:
    >>> name_of('fixed', 1.5), name_of('race')
    ('α = 1.5', 'race')
  """
  if alpha is not None:
    return style.alpha_label(alpha)
  known = _METHODS.get(method)
  return known[3] if known else method.replace('_', ' ')


def alpha_over_steps(
  records: Sequence[Record], *, title: str = '', cap: float | None = None
) -> Figure:
  """α against the training step, one line for each method that changes it.

  Args:
    records: with method, step and power; leaf tells layers apart that have an
      α each, analysis.TOTAL is the network.
    cap: a level to draw, the largest α of the methods that have one.
  """
  points = records_lib.usable(records, 'method', 'step', 'power')
  leaves = dict.fromkeys(
    r['leaf'] for r in points if r.get('leaf', analysis.TOTAL) != analysis.TOTAL
  )
  names = records_lib.short_names(list(leaves))
  looks: dict[Any, Look] = {}
  for method, look in _by_method(points).looks.items():
    looks[method, analysis.TOTAL] = look
    for index, leaf in enumerate(leaves):
      looks[method, leaf] = look._replace(
        linestyle=_LEAF_STYLES[index % len(_LEAF_STYLES)],
        label=f'{look.label}: {names[leaf]}',
      )
  key = lambda r: (r['method'], r.get('leaf', analysis.TOTAL))
  found = {key(record) for record in points}
  scheme = Scheme(key, {k: look for k, look in looks.items() if k in found})
  with style.house_style():
    figure = style.figure(3.8)
    axes = figure.add_subplot()
    drawing.lines(axes, points, 'step', 'power', scheme)
    extra: list[Row] = []
    if cap is not None:
      level = {**style.CHANCE, 'label': f'cap, α = {cap:g}'}
      axes.axhline(cap, **level)
      extra.append(level)
    values = [p['power'] for p in points if records_lib.is_finite(p['power'])]
    _power_axis(axes, [*values, cap or 1])
    drawing.step_axis(axes)
    axes.set_ylabel('α')
    note = records_lib.spread_note(points, 'power')
    style.frame(
      figure, title, note, style.handles(scheme.looks.values(), extra)
    )
  return figure


def near_zero_over_steps(
  records: Sequence[Record], *, title: str = '', epsilon: float
) -> Figure:
  """Share of the weights near zero against the training step.

  Records have method, alpha (None where it is not fixed), step, near_zero and,
  if there are several, key.
  """
  points = records_lib.usable(records, 'method', 'step', 'near_zero')

  def finish(axes: Any) -> None:
    drawing.step_axis(axes)
    drawing.share_axis(axes)
    drawing.label_first(axes, f'weights with |θ| < {epsilon:g} (%)')

  return _two_panels(points, 'step', 'near_zero', title, finish)


def accuracy_by_method(
  records: Sequence[Record], *, title: str = '', best: float | None = None
) -> Figure:
  """Test accuracy against the share of weights left, for each way to choose α.

  Records have method, alpha (None where it is not fixed), sparsity and
  accuracy; best is a fixed power to show beside the other methods.
  """
  points = records_lib.usable(records, 'method', 'sparsity', 'accuracy')
  lowest = min(1 - point['sparsity'] for point in points)

  def finish(axes: Any) -> None:
    drawing.weights_left_axis(axes, lowest, max_ticks=5)
    drawing.share_axis(axes, whole=True)
    drawing.label_first(axes, 'test accuracy (%)')

  return _two_panels(
    points, records_lib.density, 'accuracy', title, finish, best=best
  )


def histograms_by_method(
  histograms: Mapping[str, Mapping[str, analysis.Histogram]], *, title: str = ''
) -> Figure:
  """Histograms of weights: a row for each layer, a column for each method."""
  # Columns there are in the order of numbers; 1 would look like the baseline.
  numbered = {
    float(number): histogram
    for number, histogram in enumerate(histograms.values(), start=2)
  }
  figure = weights.weight_histograms(numbered, title=title)
  for axes, method in zip(figure.axes, histograms, strict=False):
    axes.set_title(name_of(method), loc='center', fontsize='small')
  return figure


def _two_panels(
  points: Sequence[Record],
  x: str | Callable[[Record], float],
  y: str,
  title: str,
  finish: Callable[[Any], None],
  best: float | None = None,
) -> Figure:
  """Fixed powers on the left, other methods on the right, on common scales."""
  fixed = [p for p in points if p.get('alpha') is not None]
  others = [p for p in points if p.get('alpha') is None]
  of_best = [p for p in fixed if p['alpha'] == best]
  parts = []
  if fixed:
    parts.append(('fixed α', [(fixed, style.by_alpha(fixed))]))
  if others:
    drawn = [(others, _by_method(others))]
    if of_best:
      label = f'best fixed, {style.alpha_label(of_best[0]["alpha"])}'
      look = Look(style.QUIET, '', '--', label)
      drawn.insert(0, (of_best, Scheme(lambda record: None, {None: look})))
    parts.append(('other methods', drawn))
  with style.house_style():
    figure, grid = style.panels(len(parts))
    figure.set_figheight(figure.get_figheight() + 0.6)
    legend = []
    for axes, (name, drawn) in zip(grid, parts, strict=True):
      for part, scheme in drawn:
        drawing.lines(axes, part, x, y, scheme)
        legend += style.handles(scheme.looks.values())
      axes.set_title(name)
      finish(axes)
    _share_y(grid)
    style.frame(figure, title, records_lib.spread_note(points, y), legend)
  return figure


def _share_y(grid: Sequence[Any]) -> None:
  limits = [axes.get_ylim() for axes in grid]
  for axes in grid:
    axes.set_ylim(
      min(low for low, _ in limits), max(high for _, high in limits)
    )


def _power_axis(axes: Any, powers: Sequence[float]) -> None:
  """α upwards, logarithmic, with the numbers that people choose."""
  highest = max(powers)
  axes.set_ylim(0.96, 1.08 * highest)
  axes.set_yscale('log')
  ticks = [t for t in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 16, 32, 64) if t <= highest]
  axes.yaxis.set_major_locator(ticker.FixedLocator(ticks))
  axes.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def _by_method(records: Sequence[Record]) -> Scheme:
  """A line for each method: those we know first, in a fixed order."""
  found = dict.fromkeys(record['method'] for record in records)
  known = {m: Look(*look) for m, look in _METHODS.items() if m in found}
  others = [{'method': method} for method in found if method not in _METHODS]
  return Scheme(
    lambda r: r['method'], {**known, **style.by_method(others).looks}
  )
