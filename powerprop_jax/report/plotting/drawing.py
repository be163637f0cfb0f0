"""What figures are drawn of: lines with bands, and axes with their ticks."""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
import numpy as np

from powerprop_jax.files.tables import Record
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import style
from powerprop_jax.report.plotting.style import Scheme


def lines(
  axes: Axes,
  records: Sequence[Record],
  x: str | Callable[[Record], float],
  y: str,
  scheme: Scheme,
) -> None:
  """Draws the means over keys of each line, and a band where keys differ.

  Args:
    records: points; see records.group, also for x and y.
    scheme: which records belong to one line, and its look.
  """
  for key, look in scheme.looks.items():
    of_line = [record for record in records if scheme.key(record) == key]
    groups = records_lib.group(of_line, x, y)
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
      zorder=3,
      **look._asdict(),
    )
    if any(len(values) > 1 for values in groups.values()):
      axes.fill_between(
        at, spread[:, 1], spread[:, 2], color=look.color, alpha=0.15, lw=0
      )


def share_axis(axes: Axes, *, whole: bool = False) -> None:
  """Shares upwards, as numbers of per cent; call it after drawing.

  It ends just beyond 0 and 100 %, with room for a marker; the whole one goes
  from one to the other.
  """
  low, high = (-0.02, 1.02) if whole else axes.get_ylim()
  low, high = max(low, -0.04 * high), min(high, 1 + 0.04 * (1 - low))
  axes.set_ylim(low, max(high, low + 1e-3))
  axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:.6g}')


def log_axis(axes: Axes) -> None:
  """Logarithmic upwards, with plain numbers; call it after drawing."""
  axes.set_yscale('log', nonpositive='mask')
  low, high = axes.get_ylim()
  ticks = _decade_ticks(low, high, 8, fine=high < 4 * low)
  _set_ticks(axes.yaxis, ticks, [f'{tick:.4g}' for tick in ticks])


def step_axis(axes: Axes) -> None:
  """The training step from left to right."""
  spec = axes.get_subplotspec()
  narrow = spec is not None and spec.get_gridspec().ncols > 2
  axes.set_xlabel('training step')
  most = style.max_ticks(3 if narrow else 5, axes)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(most))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))


def label_first(axes: Axes, label: str) -> None:
  """Names the upward axis of the first panel of a row, for all of them."""
  spec = axes.get_subplotspec()
  if spec is None or spec.is_first_col():
    axes.set_ylabel(label)


def weights_left_axis(
  axes: Axes, lowest: float, highest: float = 1, max_ticks: int = 9
) -> None:
  """Logarithmic in the density, falling to the right; the sparsity on top."""
  room = _room(lowest, highest)
  # Limits first: a logarithmic scale warns about limits it cannot show.
  axes.set_xlim(room * highest, lowest / room)
  axes.set_xscale('log')
  narrow = highest < 1 and highest < 4 * lowest
  max_ticks = style.max_ticks(max_ticks, axes)
  ticks = _decade_ticks(lowest / 1.1, 1.1 * highest, max_ticks, fine=narrow)
  if highest < 1.1 * lowest:
    ticks = sorted({lowest, highest})
  top = axes.secondary_xaxis('top')
  top.spines['top'].set_visible(False)
  for axis, labels in (
    (axes.xaxis, [f'{100 * tick:.4g}' for tick in ticks]),
    (top.xaxis, [f'{100 * (1 - tick):.6g}' for tick in ticks]),
  ):
    _set_ticks(axis, ticks, labels)
  axes.set_xlabel('weights left (%)')
  top.set_xlabel('sparsity (%)', color=style.QUIET)
  top.tick_params(labelcolor=style.QUIET, length=0)


def density_axis(axes: Axes, densities: Iterable[float]) -> None:
  """Density upwards, logarithmic, over what is found; 0 is not drawn."""
  found = [value for value in densities if 0 < value < math.inf] or [1.0]
  room = _room(min(found), max(found))
  lowest, highest = min(found) / room, room * max(found)
  axes.set_ylim(lowest, highest)
  axes.set_yscale('log', nonpositive='mask')
  ticks = _decade_ticks(lowest, highest, 8, fine=highest < 4 * lowest)
  _set_ticks(axes.yaxis, ticks, [f'{100 * tick:.4g}' for tick in ticks])


def accuracy_axis(axes: Axes, accuracies: Iterable[float]) -> None:
  """Accuracy upwards, logarithmic in the error: 97 and 98 % lie well apart.

  An accuracy of 1 lies where a fifth of the lowest other error would.
  """
  errors = [1 - value for value in accuracies if records_lib.is_finite(value)]
  positive = [error for error in errors if error > 0] or [0.01]
  room = _room(min(positive), max(positive))
  # Below it the scale is linear in the error, at the same slope.
  lowest = min(positive) / (room if min(errors, default=1) > 0 else 2)
  highest = room * max(positive)
  linear = lambda error: -math.log10(lowest) + _SLOPE * (1 - error / lowest)

  def height(accuracy: Any) -> Any:
    error = 1 - np.asarray(accuracy, float)
    log = -np.log10(np.maximum(error, lowest))
    return np.where(error < lowest, linear(error), log)

  def accuracy(height: Any) -> Any:
    over = (np.asarray(height, float) + math.log10(lowest)) / _SLOPE
    log = 10 ** -np.minimum(height, -math.log10(lowest))
    return 1 - np.where(over > 0, lowest * (1 - over), log)

  axes.set_yscale('function', functions=(height, accuracy))
  is_met = min(errors, default=1) <= 0
  above = math.log10(room) / _SLOPE * lowest
  axes.set_ylim(1 - highest, 1 + above if is_met else 1 - lowest)
  found = _decade_ticks(lowest, min(1, highest), 9, fine=True)
  ticks = [1 - error for error in found]
  ticks = [1.0] * is_met + ticks
  _set_ticks(axes.yaxis, ticks, [f'{100 * tick:.5g}' for tick in ticks])


_SLOPE = math.log10(math.e)


def _room(lowest: float, highest: float) -> float:
  """How far a logarithmic axis goes beyond its points: a marker's width."""
  return max(1.15, (highest / lowest) ** 0.05)


def _decade_ticks(
  lowest: float, highest: float, max_ticks: int, *, fine: bool = False
) -> list[float]:
  """Round numbers in a range of positive ones, as many as fit, descending."""
  first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
  choices: list[tuple[float, ...]] = [(1, 0.5, 0.2), (1, 0.3), (1,)]
  if fine:
    choices = [*_FINE_STEPS, *choices]
  for steps in choices:
    ticks = [
      step * 10.0**decade
      for decade in range(last, first - 1, -1)
      for step in steps
    ]
    ticks = [tick for tick in ticks if lowest <= tick <= highest]
    if len(ticks) <= max_ticks:
      break
  return ticks


# Of a decade, downwards from its end.
_FINE_STEPS = (
  tuple(twentieth / 20 for twentieth in range(20, 2, -1)),
  (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15),
  (1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15),
  (1, 0.5, 0.3, 0.2, 0.15),
)


def _set_ticks(
  axis: Any, ticks: Sequence[float], labels: Sequence[str]
) -> None:
  axis.set_major_locator(ticker.FixedLocator(ticks))
  axis.set_major_formatter(ticker.FixedFormatter(labels))
  axis.set_minor_locator(ticker.NullLocator())
