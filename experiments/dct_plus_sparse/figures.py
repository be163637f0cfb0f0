"""Figures of dct_plus_sparse: accuracy by support, and signals by layer."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.files.tables import Record
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style
from powerprop_jax.report.plotting.style import Look, Scheme

# Colour and marker of the networks we know.
_NETWORKS = {'standard': (style.QUIET, 'o'), 'dct': ('#d55e00', 's')}


def accuracy_by_support(
  records: Sequence[Record], *, title: str = '', num_classes: int | None = None
) -> Figure:
  """Test accuracy against density, a pair of axes for each support.

  Common scales, on which the density falls to the right; a line for each
  network and α. Records have support, network, density and accuracy;
  num_classes draws the accuracy of guessing.
  """
  points = records_lib.usable(
    records, 'support', 'network', 'density', 'accuracy'
  )
  scheme = _by_network_and_alpha(points)
  found = [point['density'] for point in points]
  chosen = list(dict.fromkeys(point['support'] for point in points))
  extra: list[Mapping[str, Any]] = []
  if num_classes is not None:
    extra = [style.CHANCE]
  with style.house_style():
    figure, grid = style.panels(len(chosen))
    for axes, support in zip(grid, chosen, strict=True):
      of_support = [p for p in points if p['support'] == support]
      drawing.weights_left_axis(axes, min(found), max(found), 4)
      drawing.lines(axes, of_support, 'density', 'accuracy', scheme)
      if num_classes is not None:
        axes.axhline(1 / num_classes, **style.CHANCE)
      drawing.share_axis(axes, whole=True)
      axes.set_title(support.replace('_', ' '))
      drawing.label_first(axes, 'test accuracy (%)')
    note = records_lib.spread_note(points, 'accuracy')
    legend = style.handles(scheme.looks.values(), extra)
    style.frame(figure, title, note, legend)
  return figure


def _by_network_and_alpha(points: Sequence[Record]) -> Scheme:
  networks = list(dict.fromkeys(point['network'] for point in points))
  alphas = sorted({p['alpha'] for p in points if p.get('alpha') is not None})
  looks: dict[Any, Look] = {}
  for network in networks:
    colour, marker = _NETWORKS.get(network, (style.TEXT, '^'))
    for index, alpha in enumerate(alphas or [None]):
      label = str(network)
      if len(alphas) > 1:
        label += f', {style.alpha_label(alpha)}'
      line = ('-', '--', '-.', ':')[index % 4]
      looks[network, alpha] = Look(colour, marker, line, label)
  return Scheme(lambda point: (point['network'], point.get('alpha')), looks)


_FIELDS = {
  'variance': 'variance of activations',
  'gradient_norm': 'gradient norm of the connections',
}
# Above these many layers, their names do not fit under the axis.
_MAX_NAMES = 10


def signal_propagation(records: Sequence[Record], *, title: str = '') -> Figure:
  """Variance of activations and gradient norm, layer by layer.

  A pair of axes for each of the two, with a logarithmic scale: a line for each
  network and density, the colour for the density, the line style for the
  network. Values of 0, of a signal that is lost, are gaps. Records are those of
  propagation.signal_records, with network (as it shall be called) and density
  added; layers are drawn in the order in which they first occur.
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
      axes.set_title(name)
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
    fontsize='small',
  )
