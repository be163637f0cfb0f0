"""What training did to weights: histograms, mass near zero, mask overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.files.tables import Record
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
  column's outline is repeated in grey.
  """
  alphas = sorted(histograms)
  leaves = list(histograms[alphas[0]]) if alphas else []
  if not leaves:
    raise ValueError('histograms must hold at least one α and one leaf.')
  looks = style.by_alpha([{'alpha': alpha} for alpha in alphas]).looks
  names = records_lib.short_names(leaves)
  with style.house_style():
    figure = Figure(
      figsize=(max(style.WIDTH, 1.75 * len(alphas)), 0.9 + 1.35 * len(leaves))
    )
    grid = figure.subplots(
      len(leaves), len(alphas), sharex='row', sharey='row', squeeze=False
    )
    for row, leaf in zip(grid, leaves, strict=True):
      counts = [histograms[alpha][leaf].counts.max() for alpha in alphas]
      row[0].set_ylim(0.7, 2 * max(1, *counts))
      for axes, alpha in zip(row, alphas, strict=True):
        if alpha != alphas[0]:
          _steps(axes, histograms[alphas[0]][leaf], color=style.RULE)
        found = histograms[alpha][leaf]
        axes.stairs(
          _positive(found), found.edges, fill=True, color=looks[alpha].color
        )
        _steps(axes, found, color=looks[alpha].color)
        axes.set_yscale('log')
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3, symmetric=True))
        axes.tick_params(labelsize=8)
      row[0].set_ylabel(names[leaf])
    for axes, alpha in zip(grid[0], alphas, strict=True):
      axes.set_title(style.alpha_label(alpha), loc='center')
    for axes in grid[-1]:
      axes.set_xlabel('weight θ')
    figure.supylabel('number of weights in a bin', fontsize=9.5)
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
      axes.set_ylim(-0.02, 1.02)
      drawing.per_cent(axes.yaxis)
      axes.set_title(names[leaf], fontsize=9.5)
      axes.set_xlabel('distance from zero ε')
      axes.set_ylabel('weights with |θ| ≤ ε (%)')
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
      drawing.per_cent(axes.yaxis)
      axes.set_ylim(0, 1.02)
      axes.set_title(field, fontsize=9.5)
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
