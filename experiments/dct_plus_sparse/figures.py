"""Signals on their way through a network."""

from collections.abc import Sequence
import math

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style
from powerprop_jax.report.plotting.style import Look, Scheme
from powerprop_jax.report.records import Record

_FIELDS = {
  'variance': 'variance of activations',
  'gradient_norm': 'gradient norm of the connections',
}
# Above these many layers, their names do not fit under the axis.
_MAX_NAMES = 10


def signal_propagation(records: Sequence[Record], *, title: str = '') -> Figure:
  """Variance of activations and gradient norm, layer by layer.

  Args:
    records: one per layer, as of propagation.signal_records, each with network
      (its kind, as it shall be called) and density added and, if there are
      several, key; averaged over keys. Layers are drawn in the order in which
      they first occur.
    title: which network, and at which time.

  Returns:
    A figure with a pair of axes for each of variance and gradient_norm, with a
    logarithmic scale: a line for each network and density, the colour for the
    density, the line style for the network. Values of 0, of a signal that is
    lost, are gaps.

  Raises:
    ValueError: if no record has these fields.
  """
  points = records_lib.usable(records, 'network', 'density', 'layer', *_FIELDS)
  layers = list(dict.fromkeys(point['layer'] for point in points))
  place = {layer: index for index, layer in enumerate(layers, start=1)}
  scheme = _by_network_and_density(points)
  with style.house_style():
    figure, grid = style.panels(len(_FIELDS))
    for axes, (field, name) in zip(grid, _FIELDS.items(), strict=True):
      drawn = [p | {field: _positive(p[field])} for p in map(dict, points)]
      drawing.lines(axes, drawn, lambda p: place[p['layer']], field, scheme)
      axes.set_yscale('log', nonpositive='mask')
      axes.set_title(name, fontsize=9.5)
      _layer_axis(axes, layers)
    note = records_lib.spread_note(points, *_FIELDS)
    lost = sum(not point[field] for point in points for field in _FIELDS)
    note += f' No signal at all: {lost:,}.' * bool(lost)
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


def _positive(value: float | None) -> float:
  """A value that a logarithmic axis can show; anything else is a gap."""
  return value if value is not None and value > 0 else math.nan


def _by_network_and_density(points: Sequence[Record]) -> Scheme:
  networks = list(dict.fromkeys(point['network'] for point in points))
  densities = sorted({p['density'] for p in points}, reverse=True)
  colours = matplotlib.colormaps['plasma'](
    np.linspace(0.05, 0.75, max(2, len(densities)))
  )
  looks = {
    (network, density): Look(
      tuple(colours[j]),
      'os^D'[i % 4],
      ('--', '-', '-.', ':')[i % 4],
      f'{network}, {100 * density:.4g} % of the weights',
    )
    for i, network in enumerate(networks)
    for j, density in enumerate(densities)
  }
  return Scheme(lambda point: (point['network'], point['density']), looks)


def _layer_axis(axes: Axes, layers: Sequence[str]) -> None:
  axes.set_xlim(0.7, len(layers) + 0.3)
  if len(layers) > _MAX_NAMES:
    axes.set_xlabel('layer, from input to output')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    return
  names = records_lib.short_names(layers)
  axes.set_xticks(
    range(1, len(layers) + 1),
    [names[layer] for layer in layers],
    rotation=30,
    ha='right',
    fontsize=8,
  )
