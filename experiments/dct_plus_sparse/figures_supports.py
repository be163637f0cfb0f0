"""Accuracy against density for each way to choose the connections."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style
from powerprop_jax.report.plotting.style import Look, Scheme
from powerprop_jax.report.records import Record

# Colour and marker of the networks we know.
_NETWORKS = {'standard': (style.QUIET, 'o'), 'dct': ('#d55e00', 's')}


def accuracy_by_support(
  records: Sequence[Record],
  *,
  title: str = '',
  num_classes: int | None = None,
) -> Figure:
  """Test accuracy against density, a pair of axes for each support.

  Args:
    records: one per trained network, with support (how its connections were
      chosen), network (its kind), density in (0, 1], accuracy and, if there are
      several, key and alpha; records of different keys are averaged.
    title: what was trained on what.
    num_classes: draws the accuracy of guessing, 1/num_classes.

  Returns:
    A figure with common scales, on which the density falls to the right; a line
    for each network and α.

  Raises:
    ValueError: if no record has these fields.
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
      axes.set_ylim(0, 1.02)
      drawing.per_cent(axes.yaxis)
      axes.set_title(support.replace('_', ' '), fontsize=9.5)
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
