"""Figures; the only file that imports matplotlib, and it keeps no global state.

One look for all of them: a colour is a power α, the same kind of thing in every
figure: grey and dashed for the baseline α = 1, then from dark blue to orange,
which stays ordered in print and for colour-blind readers; each α also has its
own marker. A line is a mean over keys (random seeds), a band goes from the
lowest to the highest of them. Values that are missing or not finite leave gaps.

Functions take the flat records of results.json or metrics.jsonl and return a
matplotlib Figure; `save` writes it.
"""

from collections.abc import Mapping, Sequence
import contextlib
import io
import math
import os
import pathlib
from typing import Any, NamedTuple

import matplotlib
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from powerprop_jax.report import analysis, files
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.records import Record

_TEXT = '#1f2430'
_QUIET = '#6b7280'
_WIDTH = 7.2  # inches; 1,080 pixels in the file, the width of a README

_STYLE: dict[str, Any] = {
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 9.5,
  'text.color': _TEXT,
  'axes.edgecolor': '#9aa1ad',
  'axes.labelcolor': _TEXT,
  'axes.titlecolor': _TEXT,
  'axes.titlesize': 10.5,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#e6e8ec',
  'grid.linewidth': 0.8,
  'xtick.color': '#9aa1ad',
  'ytick.color': '#9aa1ad',
  'xtick.labelcolor': _TEXT,
  'ytick.labelcolor': _TEXT,
  'lines.linewidth': 1.8,
  'lines.markersize': 4.5,
  'legend.frameon': False,
  'legend.fontsize': 9,
  'legend.handlelength': 2.4,
  'legend.labelspacing': 0.35,
  'figure.facecolor': 'white',
  'figure.constrained_layout.use': True,
}


def save(
  figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150
) -> pathlib.Path:
  """Writes a figure as PNG in one step; equal figures give equal bytes.

  Args:
    figure: what a function of this file returned.
    path: the file; its folder must exist.
    dpi: pixels per inch.

  Returns:
    The path.
  """
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=dpi, metadata={'Software': None})
  return files.write_bytes(path, buffer.getvalue())


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
    title: what was trained on what.
    num_classes: draws the accuracy of guessing, 1/num_classes.
    published: points of others to compare with, drawn as hollow markers:
      records with alpha, sparsity, accuracy and, for the legend, label.

  Returns:
    A figure with one pair of axes; the share of weights left falls to the right
    on a logarithmic scale, with the sparsity written above.

  Raises:
    ValueError: if no record has these fields.
  """
  points = records_lib.usable(records, 'alpha', 'sparsity', 'accuracy')
  styles = _styles([*points, *published])
  with _house_style():
    figure = Figure(figsize=(_WIDTH, 4.4))
    axes = figure.add_subplot()
    _lines(axes, points, records_lib.density, 'accuracy', styles)
    _published(axes, published, styles)
    extra = _published_handles(published)
    if num_classes is not None:
      axes.axhline(1 / num_classes, **_CHANCE)
      extra.append(_CHANCE)
    lowest = min(1 - point['sparsity'] for point in [*points, *published])
    _weights_left_axis(axes, lowest)
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=''))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel('test accuracy (%)')
    # Above the line of chance, where accuracies fall off to the right.
    anchor = (0, 1 / num_classes) if num_classes else (0, 0)
    axes.legend(
      handles=_handles(styles, extra), loc='lower left', bbox_to_anchor=anchor
    )
    _frame(figure, title, records_lib.spread_note(points, 'accuracy'))
  return figure


def weight_histograms(
  histograms: Mapping[float, Mapping[str, analysis.Histogram]],
  *,
  title: str = '',
) -> Figure:
  """Histograms of the weights: a row for each layer, a column for each α.

  Args:
    histograms: what analysis.weight_histograms returns.
    title: what was trained on what.

  Returns:
    A figure with layers × powers axes. Layers share neither axis; within a row
    both are shared, and the first column's outline is repeated in grey.

  Raises:
    ValueError: if there is no histogram.
  """
  alphas = sorted(histograms)
  leaves = list(histograms[alphas[0]]) if alphas else []
  if not leaves:
    raise ValueError('histograms must hold at least one α and one leaf.')
  styles = _styles([{'alpha': alpha} for alpha in alphas])
  names = records_lib.short_names(leaves)
  with _house_style():
    figure = Figure(
      figsize=(max(_WIDTH, 1.75 * len(alphas)), 0.9 + 1.35 * len(leaves))
    )
    grid = figure.subplots(
      len(leaves), len(alphas), sharex='row', sharey='row', squeeze=False
    )
    for row, leaf in zip(grid, leaves, strict=True):
      counts = [histograms[alpha][leaf].counts.max() for alpha in alphas]
      row[0].set_ylim(0.7, 2 * max(1, *counts))
      for axes, alpha in zip(row, alphas, strict=True):
        if alpha != alphas[0]:
          _steps(axes, histograms[alphas[0]][leaf], color='#9aa1ad')
        found = histograms[alpha][leaf]
        axes.stairs(
          _positive(found), found.edges, fill=True, color=styles[alpha].color
        )
        _steps(axes, found, color=styles[alpha].color)
        axes.set_yscale('log')
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3, symmetric=True))
        axes.tick_params(labelsize=8)
      row[0].set_ylabel(names[leaf])
    for axes, alpha in zip(grid[0], alphas, strict=True):
      axes.set_title(_alpha(alpha), loc='center')
    for axes in grid[-1]:
      axes.set_xlabel('weight θ')
    figure.supylabel('number of weights in a bin', fontsize=9.5)
    _frame(figure, title, _outside_note(histograms))
  return figure


def near_zero(records: Sequence[Record], *, title: str = '') -> Figure:
  """Share of the weights within ε of zero, against ε, one line for each α.

  Args:
    records: those of analysis.fraction_near_zero, each with alpha (and key)
      added: leaf, epsilon, near_zero.
    title: what was trained on what.

  Returns:
    A figure with one pair of axes for each leaf; 'total' comes first.

  Raises:
    ValueError: if no record has these fields.
  """
  points = records_lib.usable(records, 'alpha', 'leaf', 'epsilon', 'near_zero')
  styles = _styles(points)
  leaves = list(dict.fromkeys(point['leaf'] for point in points))
  leaves.sort(key=lambda leaf: leaf != analysis.TOTAL)
  names = records_lib.short_names(
    [leaf for leaf in leaves if leaf != analysis.TOTAL]
  )
  names[analysis.TOTAL] = 'all layers'
  with _house_style():
    figure, grid = _panels(len(leaves))
    for axes, leaf in zip(grid, leaves, strict=True):
      of_leaf = [point for point in points if point['leaf'] == leaf]
      _lines(axes, of_leaf, 'epsilon', 'near_zero', styles)
      axes.set_xscale('log')
      axes.set_ylim(-0.02, 1.02)
      axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=''))
      axes.set_title(names[leaf], fontsize=9.5)
      axes.set_xlabel('distance from zero ε')
      axes.set_ylabel('weights with |θ| ≤ ε (%)')
    note = records_lib.spread_note(points, 'near_zero')
    _frame(figure, title, note, _handles(styles))
  return figure


def mask_overlap(
  records: Sequence[Record], *, title: str = '', leaf: str = analysis.TOTAL
) -> Figure:
  """Agreement and intersection of magnitude masks before and after training.

  Args:
    records: those of analysis.mask_overlap, each with alpha (and key) added.
    title: what was trained on what.
    leaf: the layer to show; by default all of them together.

  Returns:
    A figure with two pairs of axes, each with the level of chance as a dotted
    line.

  Raises:
    ValueError: if no record has these fields, or none is about the leaf.
  """
  fields = ('agreement', 'intersection')
  points = records_lib.usable(records, 'alpha', 'leaf', 'sparsity', *fields)
  of_leaf = [point for point in points if point['leaf'] == leaf]
  if not of_leaf:
    leaves = ', '.join(dict.fromkeys(point['leaf'] for point in points))
    raise ValueError(
      f'no record is about the leaf {leaf!r}; there are {leaves}.'
    )
  styles = _styles(of_leaf)
  with _house_style():
    figure, grid = _panels(2)
    for axes, field in zip(grid, fields, strict=True):
      _lines(axes, of_leaf, records_lib.density, field, styles)
      chance = records_lib.group(
        of_leaf, records_lib.density, f'{field}_by_chance'
      )
      means = [np.mean(values) for values in chance.values()]
      axes.plot(list(chance), means, **_CHANCE)
      _weights_left_axis(axes, min(1 - p['sparsity'] for p in of_leaf))
      axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=''))
      axes.set_ylim(0, 1.02)
      axes.set_title(field, fontsize=9.5)
    grid[0].set_ylabel('positions where masks agree (%)')
    grid[1].set_ylabel('kept weights in common (%)')
    note = records_lib.spread_note(of_leaf, *fields)
    _frame(figure, title, note, _handles(styles, [_CHANCE]))
  return figure


def learning_curves(
  records: Sequence[Record],
  *,
  fields: Sequence[str] = ('loss', 'accuracy'),
  title: str = '',
) -> Figure:
  """Metrics against the training step, one line for each α.

  Args:
    records: those of metrics.jsonl, with step, alpha (and key); a record may
      lack some of the fields.
    fields: what to draw, one pair of axes each. Names that end in 'loss' get a
      logarithmic scale, names that end in 'accuracy' are shown in per cent.
    title: what was trained on what.

  Returns:
    A figure with one pair of axes for each field that occurs.

  Raises:
    ValueError: if no record has alpha, step and one of the fields.
  """
  drawn = [f for f in fields if any(r.get(f) is not None for r in records)]
  if not drawn:
    raise ValueError(f'no record has any of the fields {", ".join(fields)}.')
  points = [
    record
    for record in records_lib.usable(records, 'alpha', 'step')
    if any(field in record for field in drawn)
  ]
  styles = _styles(points)
  with _house_style():
    figure, grid = _panels(len(drawn))
    for axes, field in zip(grid, drawn, strict=True):
      _lines(axes, points, 'step', field, styles)
      if field.endswith('loss'):
        axes.set_yscale('log', nonpositive='mask')
      if field.endswith('accuracy'):
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=''))
      unit = ' (%)' if field.endswith('accuracy') else ''
      axes.set_title(field.replace('_', ' ') + unit, fontsize=9.5)
      axes.set_xlabel('training step')
      axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
      axes.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
    note = records_lib.spread_note(points, *drawn)
    _frame(figure, title, note, _handles(styles))
  return figure


_CHANCE: dict[str, Any] = {
  'color': _QUIET,
  'linestyle': ':',
  'linewidth': 1.2,
  'zorder': 1,
  'label': 'chance',
}
_PUBLISHED: dict[str, Any] = {
  'marker': 'o',
  'markerfacecolor': 'white',
  'markersize': 6.5,
  'linestyle': '',
  'zorder': 4,
}


class _Style(NamedTuple):
  color: Any
  marker: str
  linestyle: str


def _styles(records: Sequence[Record]) -> dict[float, _Style]:
  """Look of each α that occurs, in ascending order."""
  alphas = sorted({record['alpha'] for record in records})
  powers = [alpha for alpha in alphas if alpha != 1]
  colours = matplotlib.colormaps['plasma'](
    np.linspace(0.05, 0.75, len(powers)) if len(powers) > 1 else [0.3]
  )
  styles: dict[float, _Style] = {}
  if 1 in alphas:
    styles[1] = _Style(_QUIET, 'o', '--')
  for index, alpha in enumerate(powers):
    styles[alpha] = _Style(
      tuple(colours[index]), 's^Dvp*XPh<>'[index % 11], '-'
    )
  return styles


def _house_style() -> contextlib.AbstractContextManager[None]:
  # 'default' first: not whatever the user's matplotlibrc says.
  return style.context(['default', _STYLE])


def _panels(count: int) -> tuple[Figure, list[Axes]]:
  columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
  rows = math.ceil(count / columns)
  height = 0.6 + rows * {1: 3.6, 2: 2.9, 3: 2.3}[columns]
  figure = Figure(figsize=(_WIDTH, height))
  grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
  for axes in grid[count:]:
    axes.remove()
  return figure, grid[:count]


def _lines(
  axes: Axes,
  records: Sequence[Record],
  x: Any,
  y: str,
  styles: Mapping[float, _Style],
) -> None:
  for alpha, look in styles.items():
    of_alpha = [r for r in records if r.get('alpha') == alpha]
    groups = records_lib.group(of_alpha, x, y)
    if not groups:
      continue
    at = list(groups)
    spread = np.array(
      [
        (np.mean(v), min(v), max(v)) if (v := groups[value]) else [math.nan] * 3
        for value in at
      ]
    )
    axes.plot(
      at,
      spread[:, 0],
      markevery=max(1, len(at) // 10),
      label=_alpha(alpha),
      zorder=3,
      **look._asdict(),
    )
    if any(len(values) > 1 for values in groups.values()):
      axes.fill_between(
        at, spread[:, 1], spread[:, 2], color=look.color, alpha=0.15, lw=0
      )


def _published(
  axes: Axes, records: Sequence[Record], styles: Mapping[float, _Style]
) -> None:
  for record in records:
    look = {**_PUBLISHED, **styles[record['alpha']]._asdict(), 'linestyle': ''}
    axes.plot([records_lib.density(record)], [record['accuracy']], **look)


def _published_handles(records: Sequence[Record]) -> list[dict[str, Any]]:
  labels = dict.fromkeys(r.get('label', 'published') for r in records)
  return [{**_PUBLISHED, 'color': _QUIET, 'label': name} for name in labels]


def _handles(
  styles: Mapping[float, _Style], extra: Sequence[Mapping[str, Any]] = ()
) -> list[Line2D]:
  looks = [{**s._asdict(), 'label': _alpha(a)} for a, s in styles.items()]
  return [Line2D([], [], **look) for look in [*looks, *extra]]


def _alpha(alpha: float) -> str:
  return f'α = {alpha:g}'


def _weights_left_axis(axes: Axes, lowest: float, max_ticks: int = 9) -> None:
  """Logarithmic in the density, falling to the right; the sparsity on top."""
  # Limits first: a logarithmic scale warns about limits it cannot show.
  axes.set_xlim(1.12, lowest / 1.12)
  axes.set_xscale('log')
  decades = range(math.ceil(-math.log10(lowest) - 1e-9) + 1)
  for steps in ((1, 0.5, 0.2), (1, 0.3), (1,)):
    ticks = [step * 10.0**-decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if tick >= lowest / 1.1]
    if len(ticks) <= max_ticks:
      break
  top = axes.secondary_xaxis('top')
  top.spines['top'].set_visible(False)
  for axis, labels in (
    (axes.xaxis, [f'{100 * tick:.4g}' for tick in ticks]),
    (top.xaxis, [f'{100 * (1 - tick):.6g}' for tick in ticks]),
  ):
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_major_formatter(ticker.FixedFormatter(labels))
    axis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('weights left (%)')
  top.set_xlabel('sparsity (%)', color=_QUIET)
  top.tick_params(labelcolor=_QUIET, length=0)


def _steps(axes: Axes, histogram: analysis.Histogram, color: Any) -> None:
  axes.stairs(
    _positive(histogram),
    histogram.edges,
    baseline=None,
    color=color,
    linewidth=1,
  )


def _positive(histogram: analysis.Histogram) -> np.ndarray:
  return np.where(histogram.counts > 0, histogram.counts, np.nan)


def _frame(
  figure: Figure, title: str, note: str, handles: Sequence[Line2D] = ()
) -> None:
  """Adds title and legend above all axes and a line in small print below."""
  columns = 6
  top = 0.3 * bool(title) + 0.22 * math.ceil(len(handles) / columns)  # inches
  bottom = 0.24
  height = figure.get_figheight() + top
  figure.set_figheight(height)
  rect = (0, bottom / height, 1, 1 - (top + bottom) / height)
  figure.set_layout_engine('constrained', rect=rect)
  figure.text(0.01, bottom / 4 / height, note, fontsize=8, color=_QUIET)
  if title:
    figure.suptitle(
      title,
      x=0.01,
      y=1 - 0.06 / height,
      ha='left',
      va='top',
      fontsize=10.5,
      fontweight='bold',
    ).set_in_layout(False)
  if handles:
    figure.legend(
      handles=handles,
      loc='upper left',
      ncols=min(len(handles), columns),
      bbox_to_anchor=(0.002, 1 - (0.26 * bool(title)) / height),
      borderpad=0.2,
      columnspacing=1.5,
    )


def _outside_note(
  histograms: Mapping[float, Mapping[str, analysis.Histogram]],
) -> str:
  every = [h for of_alpha in histograms.values() for h in of_alpha.values()]
  shares = [h.outside / max(1, h.outside + int(h.counts.sum())) for h in every]
  note = 'Grey: the first column again.' if len(histograms) > 1 else ''
  if max(shares) > 0:
    note += f' Up to {max(shares):.2%} of a layer lies outside its axis.'
  lost = sum(h.not_finite for h in every)
  return (note + f' Not finite: {lost:,}.' * bool(lost)).strip()
