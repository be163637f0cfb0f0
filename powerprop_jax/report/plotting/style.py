"""One look for all figures: sizes, type, and what colours and markers mean.

A colour is the same kind of thing in every figure. Where α tells lines apart:
grey and dashed for the baseline α = 1, then from dark blue to orange, which
stays ordered in print and for colour-blind readers. Where methods of sparse
training do: a fixed colour for each, grey for the dense network. Every line has
its own marker besides. A line is a mean over keys (random seeds), a band goes
from the lowest to the highest of them. Values that are missing or not finite
leave gaps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import io
import math
import os
import pathlib
from typing import Any, NamedTuple

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from powerprop_jax.files import whole
from powerprop_jax.files.tables import Record, Row

TEXT = '#1f2430'
QUIET = '#6b7280'
RULE = '#9aa1ad'
WIDTH = 7.2  # inches; 1,080 pixels in the file, the width of a README

_STYLE: Row = {
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 9.5,
  'text.color': TEXT,
  'axes.edgecolor': RULE,
  'axes.labelcolor': TEXT,
  'axes.titlecolor': TEXT,
  'axes.titlesize': 10.5,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#e6e8ec',
  'grid.linewidth': 0.8,
  'xtick.color': RULE,
  'ytick.color': RULE,
  'xtick.labelcolor': TEXT,
  'ytick.labelcolor': TEXT,
  'lines.linewidth': 1.8,
  'lines.markersize': 4.5,
  'legend.frameon': False,
  'legend.fontsize': 9,
  'legend.handlelength': 2.4,
  'legend.labelspacing': 0.35,
  'figure.facecolor': 'white',
  'figure.constrained_layout.use': True,
}

CHANCE: Row = {
  'color': QUIET,
  'linestyle': ':',
  'linewidth': 1.2,
  'zorder': 1,
  'label': 'chance',
}
PUBLISHED: Row = {
  'marker': 'o',
  'markerfacecolor': 'white',
  'markersize': 6.5,
  'linestyle': '',
  'zorder': 4,
}

# Colour, marker and name of the methods we know (colours of Okabe and Ito).
_METHODS = {
  'dense': (QUIET, '', 'dense'),
  'static': (TEXT, 'o', 'static'),
  'sparse_evolution': ('#009e73', '^', 'SET'),
  'dsr': ('#cc79a7', 'v', 'DSR'),
  'deep_r': ('#882255', 'P', 'DeepR'),
  'rigl': ('#d55e00', 's', 'RigL'),
  'snfs': ('#0072b2', 'D', 'SNFS'),
  'top_kast': ('#e69f00', 'p', 'Top-KAST'),
  'gradual_pruning': ('#56b4e9', '*', 'gradual pruning'),
  'one_shot_pruning': ('#7a5195', 'X', 'one-shot pruning'),
}
# Names of train.methods for what has a longer one above.
_SHORT = {
  'set': 'sparse_evolution',
  'pruning': 'gradual_pruning',
  'one_shot': 'one_shot_pruning',
}
_OTHER_COLOURS = ('#44aa99', '#999933', '#332288', '#aa4499')


class Look(NamedTuple):
  """Look and name of a line."""

  color: Any
  marker: str
  linestyle: str
  label: str


class Scheme(NamedTuple):
  """What tells lines apart.

  Attributes:
    key: the line that a record belongs to.
    looks: the look of each line by its key, in the order of the legend.
  """

  key: Callable[[Record], Any]
  looks: Mapping[Any, Look]


def by_alpha(records: Sequence[Record]) -> Scheme:
  """A line for each α that occurs, in ascending order."""
  alphas = sorted({record['alpha'] for record in records})
  powers = [alpha for alpha in alphas if alpha != 1]
  colours = matplotlib.colormaps['plasma'](
    np.linspace(0.05, 0.75, len(powers)) if len(powers) > 1 else [0.3]
  )
  looks: dict[float, Look] = {}
  if 1 in alphas:
    looks[1] = Look(QUIET, 'o', '--', alpha_label(1))
  for index, alpha in enumerate(powers):
    marker = 's^Dvp*XPh<>'[index % 11]
    looks[alpha] = Look(tuple(colours[index]), marker, '-', alpha_label(alpha))
  return Scheme(lambda record: record['alpha'], looks)


def by_method(records: Iterable[Record]) -> Scheme:
  """A line for each method: those we know first, in a fixed order."""
  found = dict.fromkeys(record['method'] for record in records)
  names = {method: _SHORT.get(method, method) for method in found}
  looks = {}
  for known, (colour, marker, name) in _METHODS.items():
    for method in (method for method in found if names[method] == known):
      looks[method] = Look(colour, marker, '-', name)
  others = [method for method in found if method not in looks]
  for index, method in enumerate(others):
    colour = _OTHER_COLOURS[index % len(_OTHER_COLOURS)]
    name = str(method).replace('_', ' ')
    looks[method] = Look(colour, 'h<>d'[index % 4], '-', name)
  return Scheme(lambda record: record['method'], looks)


def by_method_and_alpha(records: Sequence[Record]) -> Scheme:
  """A line for each method and α; several α differ in line style, 1 is dashed.

  Records may lack alpha, which then is not in the legend either.
  """
  methods = by_method(records).looks
  found = {(record['method'], record.get('alpha')) for record in records}
  alphas = sorted({alpha for _, alpha in found if alpha is not None})
  powers = [alpha for alpha in alphas if alpha != 1]
  styles = {a: ('-', '-.', ':')[i % 3] for i, a in enumerate(powers)}
  looks = {}
  for method, look in methods.items():
    for alpha in (None, *alphas):
      if (method, alpha) not in found:
        continue
      looks[method, alpha] = look
      if alpha is not None and len(alphas) > 1:
        looks[method, alpha] = look._replace(
          linestyle=styles.get(alpha, '--'),
          label=f'{look.label}, {alpha_label(alpha)}',
        )
  return Scheme(lambda r: (r['method'], r.get('alpha')), looks)


def alpha_label(alpha: float) -> str:
  """How a power is written: 'α = 1.5'."""
  return f'α = {alpha:g}'


def handles(
  looks: Iterable[Look], extra: Sequence[Record] = ()
) -> list[Line2D]:
  """Entries of a legend; extra ones are properties of Line2D."""
  entries: list[Record] = [look._asdict() for look in looks]
  return [Line2D([], [], **entry) for entry in [*entries, *extra]]


def house_style() -> contextlib.AbstractContextManager[None]:
  """Within it, figures have our look and not that of the user's settings."""
  # 'default' first: not whatever the user's matplotlibrc says.
  return style.context(['default', _STYLE])


def panels(count: int) -> tuple[Figure, list[Axes]]:
  """A figure with so many pairs of axes, in one, two or three columns."""
  columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
  rows = math.ceil(count / columns)
  height = 0.6 + rows * {1: 3.6, 2: 2.9, 3: 2.3}[columns]
  figure = Figure(figsize=(WIDTH, height))
  grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
  for axes in grid[count:]:
    axes.remove()
  return figure, grid[:count]


def frame(
  figure: Figure, title: str, note: str, legend: Sequence[Line2D] = ()
) -> None:
  """Adds title and legend above all axes and a line in small print below."""
  # About a hundred letters fit side by side; a handle takes the room of eight.
  longest = max((len(str(h.get_label())) for h in legend), default=0)
  columns = max(1, min(6, 104 // (longest + 8)))
  top = 0.3 * bool(title) + 0.22 * math.ceil(len(legend) / columns)  # inches
  bottom = 0.24
  height = figure.get_figheight() + top
  figure.set_figheight(height)
  rect = (0, bottom / height, 1, 1 - (top + bottom) / height)
  figure.set_layout_engine('constrained', rect=rect)
  figure.text(0.01, bottom / 4 / height, note, fontsize=8, color=QUIET)
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
  if legend:
    figure.legend(
      handles=legend,
      loc='upper left',
      ncols=min(len(legend), columns),
      bbox_to_anchor=(0.002, 1 - (0.26 * bool(title)) / height),
      borderpad=0.2,
      columnspacing=1.5,
    )


def save(
  figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150
) -> pathlib.Path:
  """Writes a figure as PNG in one step; equal figures give equal bytes."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=dpi, metadata={'Software': None})
  return whole.write_bytes(path, buffer.getvalue())
