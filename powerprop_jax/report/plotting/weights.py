"""What training did to weights: histograms, mass near zero, mask overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.report import analysis
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style


def weight_histograms(
  histograms: Mapping[float, Mapping[str, analysis.Histogram]],
  *,
  title: str = '',
) -> Figure:
  """What analysis.weight_histograms gives: layers downwards, powers across.

  Layers share neither axis; within a row both are shared, and the first
  column's outline is repeated in grey. Where nearly all weights of a panel lie
  in a few bins at zero, their share is written in place of the needle that they
  would be.
  """
  alphas = sorted(histograms)
  leaves = list(histograms[alphas[0]]) if alphas else []
  if not leaves:
    raise ValueError('histograms must hold at least one α and one leaf.')
  looks = style.by_alpha([{'alpha': alpha} for alpha in alphas]).looks
  names = records_lib.short_names(leaves)
  with style.house_style():
    figure = style.figure(0.9 + 1.35 * len(leaves), 1.75 * len(alphas))
    grid = figure.subplots(
      len(leaves), len(alphas), sharex='row', sharey='row', squeeze=False
    )
    for row, leaf in zip(grid, leaves, strict=True):
      drawn = {
        alpha: _without_needle(histograms[alpha][leaf]) for alpha in alphas
      }
      counts = [found.counts.max() for found, _ in drawn.values()]
      top = 2 * max(10, *counts)
      if any(needle for _, needle in drawn.values()):
        # Logarithmic: a third of the height, for two lines of words.
        top = _LOWEST * (1.3 * max(10, *counts) / _LOWEST) ** 1.5
      row[0].set_ylim(_LOWEST, top)
      for axes, alpha in zip(row, alphas, strict=True):
        found, needle = drawn[alpha]
        if alpha != alphas[0]:
          _steps(axes, drawn[alphas[0]][0], color=style.RULE)
        color = looks[alpha].color
        axes.stairs(_positive(found), found.edges, fill=True, color=color)
        _steps(axes, found, color=color)
        if needle:
          axes.text(0.5, 1, needle, transform=axes.transAxes, **_NEEDLE_LOOK)
        axes.set_yscale('log')
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.xaxis.set_major_locator(
          ticker.FixedLocator([0])
          if figure.get_figwidth() < 1.2 * len(alphas)
          else ticker.MaxNLocator(3, symmetric=True)
        )
        axes.tick_params(labelsize='small')
      row[0].set_ylabel(names[leaf])
    for axes, alpha in zip(grid[0], alphas, strict=True):
      axes.set_title(style.alpha_label(alpha), loc='center')
    for axes in grid[-1]:
      axes.set_xlabel('weight θ')
    figure.supylabel('number of weights in a bin')
    style.frame(figure, title, _outside_note(histograms))
  return figure


def near_zero(records: Sequence[Record], *, title: str = '') -> Figure:
  """Share of the weights within ε of zero, against ε, one line for each α.

  Args:
    records: those of analysis.fraction_near_zero, each with alpha added.

  Returns:
    A figure with one pair of axes for each leaf; 'total' comes first.
  """
  points = records_lib.usable(records, 'alpha', 'leaf', 'epsilon', 'near_zero')
  scheme = style.by_alpha(points)
  leaves = list(dict.fromkeys(point['leaf'] for point in points))
  leaves.sort(key=lambda leaf: leaf != analysis.TOTAL)
  layers = [leaf for leaf in leaves if leaf != analysis.TOTAL]
  names = records_lib.short_names(layers)
  names[analysis.TOTAL] = 'all layers'
  with style.house_style():
    figure, grid = style.panels(len(leaves))
    for axes, leaf in zip(grid, leaves, strict=True):
      of_leaf = [point for point in points if point['leaf'] == leaf]
      drawing.lines(axes, of_leaf, 'epsilon', 'near_zero', scheme)
      axes.set_xscale('log')
      drawing.share_axis(axes, whole=True)
      axes.set_title(names[leaf])
      axes.set_xlabel('distance from zero ε')
      drawing.label_first(axes, 'weights with |θ| ≤ ε (%)')
    note = records_lib.spread_note(points, 'near_zero')
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


def mask_overlap(records: Sequence[Record], *, title: str = '') -> Figure:
  """Agreement and intersection of magnitude masks before and after training.

  The records of analysis.mask_overlap, each with alpha added, that are about
  all layers: both measures, with the level of chance as a dotted line.
  """
  fields = ('agreement', 'intersection')
  of_all = [r for r in records if r.get('leaf') == analysis.TOTAL]
  points = records_lib.usable(of_all, 'alpha', 'sparsity', *fields)
  scheme = style.by_alpha(points)
  with style.house_style():
    figure, grid = style.panels(2)
    for axes, field in zip(grid, fields, strict=True):
      drawing.lines(axes, points, records_lib.density, field, scheme)
      chance = records_lib.group(
        points, records_lib.density, f'{field}_by_chance'
      )
      means = [np.mean(values) for values in chance.values()]
      axes.plot(list(chance), means, **style.CHANCE)
      drawing.weights_left_axis(axes, min(1 - p['sparsity'] for p in points))
      drawing.share_axis(axes, whole=True)
      axes.set_title(field)
    grid[0].set_ylabel('positions where masks agree (%)')
    grid[1].set_ylabel('kept weights in common (%)')
    note = records_lib.spread_note(points, *fields)
    legend = style.handles(scheme.looks.values(), [style.CHANCE])
    style.frame(figure, title, note, legend)
  return figure


def _steps(axes: Axes, histogram: analysis.Histogram, color: Any) -> None:
  axes.stairs(
    _positive(histogram),
    histogram.edges,
    baseline=None,
    color=color,
    linewidth=1,
  )


# Where the axis of counts begins: a single weight is seen.
_LOWEST = 0.7
# Of 101 bins, so many at zero are no shape to look at if they hold so much.
_NEEDLE_BINS, _NEEDLE_SHARE = 3, 0.8
_NEEDLE_LOOK: Row = {
  'ha': 'center',
  'va': 'top',
  'fontsize': 'x-small',
  'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 1},
}


def _without_needle(
  histogram: analysis.Histogram,
) -> tuple[analysis.Histogram, str]:
  """A histogram without a needle at zero, and words for it; '' for none."""
  counts, edges = histogram.counts, histogram.edges
  middle = (len(counts) - _NEEDLE_BINS) // 2
  needle = slice(middle, middle + _NEEDLE_BINS)
  total = counts.sum() + histogram.outside
  share = counts[needle].sum() / max(1, total)
  if len(counts) < 33 * _NEEDLE_BINS or share < _NEEDLE_SHARE:
    return histogram, ''
  tails = counts.copy()
  tails[needle] = 0
  per_cent = f'{100 * share:.3g}' if share < 0.9995 or share == 1 else '> 99.9'
  words = f'{per_cent} % within\n±{float(f"{edges[needle.stop]:.2g}"):,g}'
  return histogram._replace(counts=tails), words


def _positive(histogram: analysis.Histogram) -> np.ndarray:
  return np.where(histogram.counts > 0, histogram.counts, np.nan)


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
