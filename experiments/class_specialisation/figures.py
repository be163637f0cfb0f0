"""What training did to the features of a network."""

from collections.abc import Sequence
import math

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style


def class_specialisation(
  records: Sequence[Record],
  *,
  title: str = '',
  num_classes: int | None = None,
  bins: int = 25,
) -> Figure:
  """Histograms of the class-specialisation of features, dense against sparse.

  A pair of axes for each layer: shares of the features that are not dead,
  filled for the dense network, as outlines for others; a triangle at each mean.
  The legend says what share of the features of all layers is left out, dead or
  not finite.

  Args:
    records: those of features.specialisation_records, with method ('dense' for
      the dense network) added. Features of different keys are counted together.
    num_classes: marks 1/num_classes, a feature that responds to all classes
      alike, where the scale starts.
    bins: number of bins over the common scale.
  """
  if bins < 1:
    raise ValueError(f'bins must be at least 1, got {bins}.')
  points = records_lib.usable(records, 'method', 'layer', 'specialisation')
  layers = list(dict.fromkeys(point['layer'] for point in points))
  names = records_lib.short_names(layers)
  edges = _edges(_finite(points), num_classes, bins)
  scheme = style.by_method_and_alpha(points)
  lines = {
    key: [point for point in points if scheme.key(point) == key]
    for key in scheme.looks
  }
  with style.house_style():
    figure, grid = style.panels(len(layers))
    for axes, layer in zip(grid, layers, strict=True):
      for key, look in scheme.looks.items():
        of_layer = [point for point in lines[key] if point['layer'] == layer]
        _histogram(axes, _finite(of_layer), edges, look, key[0] == 'dense')
      if num_classes is not None:
        axes.axvline(1 / num_classes, **{**style.CHANCE, 'label': ''})
      axes.set_xlim(edges[0] - 0.01, edges[-1])
      axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
      drawing.share_axis(axes)
      axes.set_title(names[layer])
      axes.set_xlabel('class-specialisation')
      axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
      drawing.label_first(axes, 'features (%)')
    entries: list[Row] = [
      {
        'color': look.color,
        'linestyle': look.linestyle,
        'label': look.label + _left_out(lines[key]),
        **(_FILL if key[0] == 'dense' else {}),
      }
      for key, look in scheme.looks.items()
    ]
    if num_classes is not None:
      entries.append({**style.CHANCE, 'label': 'all classes alike'})
    keys = len({point.get('key') for point in points})
    note = 'Triangles: means.' + f' Features of {keys} keys.' * (keys > 1)
    style.frame(figure, title, note, style.handles([], entries))
  return figure


# A thick pale line in the legend for what is filled.
_FILL: Row = {'linestyle': '-', 'linewidth': 7, 'alpha': 0.35}


def _finite(points: Sequence[Record]) -> np.ndarray:
  values = [point['specialisation'] for point in points]
  return np.array([v for v in values if records_lib.is_finite(v)], np.float64)


def _left_out(points: Sequence[Record]) -> str:
  lost = len(points) - _finite(points).size
  return f' ({lost / len(points):.1%} left out)' if lost else ''


def _edges(
  values: np.ndarray, num_classes: int | None, bins: int
) -> np.ndarray:
  """Common bins, from that of all classes alike to the next tenth upwards."""
  lowest = float(values.min(initial=1.0))
  lowest = math.floor(20 * lowest) / 20
  if num_classes is not None:
    lowest = 1 / num_classes
  highest = math.ceil(10 * float(values.max(initial=0.0)) - 1e-6) / 10
  highest = min(1.0, max(highest, lowest + 0.1))
  return np.linspace(min(lowest, highest - 0.1), highest, bins + 1)


def _histogram(
  axes: Axes,
  values: np.ndarray,
  edges: np.ndarray,
  look: style.Look,
  filled: bool,
) -> None:
  if not values.size:
    return
  # float32 shares of exactly 1/num_classes may lie just below the first edge.
  counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
  shares = counts / values.size
  if filled:
    axes.stairs(shares, edges, fill=True, color=look.color, alpha=0.35)
  else:
    axes.stairs(
      shares, edges, color=look.color, linestyle=look.linestyle, linewidth=1.4
    )
  axes.plot(
    [values.mean()],
    [0.965],
    marker='v',
    color=look.color,
    transform=axes.get_xaxis_transform(),
    zorder=4,
  )
