"""One look for all figures: sizes, type, files, what colours and markers mean.

A colour is the same kind of thing in every figure. Where α tells lines apart:
grey and dashed for the baseline α = 1, then from dark blue to orange, which
stays ordered in print and for colour-blind readers. Where methods of sparse
training do: a fixed colour for each, grey for the dense network. Every line has
its own marker besides. A line is a mean over keys (random seeds), a band goes
from the lowest to the highest of them. Values that are missing or not finite
leave gaps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import io
import math
import os
import pathlib
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib import figure as figure_lib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
import numpy as np

from powerprop_jax.files import whole
from powerprop_jax.files.tables import Record, Row

TEXT = '#1f2430'
QUIET = '#6b7280'
RULE = '#9aa1ad'

# Widths of papers in inches: of one column, and of two with what is between.
_WIDTHS = {'column': 3.5, 'page': 7.2}


class _Sheet(NamedTuple):
  """What figures are drawn on: inches, points, and whether they say it all."""

  width: float = 7.2  # 1,080 pixels in the file, the width of a README
  font_size: float = 9.5
  titles: bool = True

  @property
  def is_narrow(self) -> bool:
    return self.width < 5


_SCREEN = _Sheet()
_sheet = contextvars.ContextVar('_sheet', default=_SCREEN)


@contextlib.contextmanager
def paper(
  width: Literal['column', 'page'] | float = 'column', *, titles: bool = False
) -> Iterator[None]:
  """Within it, figures are drawn for a paper.

  They are as wide as a column (3.5 inches), as a page of two (7.2), or as so
  many inches, with letters of 8 points, to be included at their own size.
  Without titles they have neither a title nor the line in small print below,
  which a caption says. Titles of panels stay.

  Example:
    >>> from powerprop_jax.report import plotting
    >>> points = [{'alpha': 2.0, 'sparsity': s, 'accuracy': 1 - s / 9}
    ...           for s in (0.0, 0.5, 0.9)]
    >>> with plotting.paper('column'):
    ...   figure = plotting.accuracy_against_sparsity(points, title='a network')
    >>> float(figure.get_figwidth()), figure.get_suptitle()
    (3.5, '')
  """
  inches: Any = _WIDTHS.get(width) if isinstance(width, str) else width
  if not isinstance(inches, (int, float)) or not 1 <= inches <= 100:
    raise ValueError(
      "width must be 'column', 'page' or a number of inches from 1 to 100, got "
      f'{width!r}.'
    )
  token = _sheet.set(_Sheet(inches, 8, titles))
  try:
    yield
  finally:
    _sheet.reset(token)


class Figure(figure_lib.Figure):
  """A figure that a notebook shows, and of which journals take the files.

  PDF files have TrueType (Type 42) fonts. In SVG files letters are paths: they
  look the same where the font is not installed.
  """

  def savefig(self, fname: Any, **options: Any) -> None:
    """As matplotlib's, with the fonts of files."""
    with style.context([_FILES]):
      super().savefig(fname, **options)

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


_FILES: Row = {
  'pdf.fonttype': 42,
  'ps.fonttype': 42,
  'svg.fonttype': 'path',
  'svg.hashsalt': 'powerprop_jax',
}
_STYLE: Row = {
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'text.color': TEXT,
  'axes.edgecolor': RULE,
  'axes.labelcolor': TEXT,
  'axes.titlecolor': TEXT,
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
  'legend.frameon': False,
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
_OTHER_COLOURS = ('#332288', '#999933', '#aa4499', '#44aa99')


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
  sheet = _sheet.get()
  size, thin = sheet.font_size, sheet.is_narrow
  sizes = {
    'font.size': size,
    'axes.titlesize': size,
    'figure.labelsize': size,
    'figure.titlesize': 1.1 * size,
    'legend.fontsize': 0.95 * size,
    'lines.linewidth': 1.3 if thin else 1.8,
    'lines.markersize': 3.5 if thin else 4.5,
  }
  # 'default' first: not whatever the user's matplotlibrc says.
  return style.context(['default', {**_STYLE, **sizes}])


def figure(height: float, min_width: float = 0) -> Figure:
  """An empty figure; height and least width in inches as on a screen."""
  sheet = _sheet.get()
  if not sheet.titles:
    min_width = 0
  # A narrow one is less wide than a wide one is high.
  scale = 0.3 + 0.7 * sheet.width / _SCREEN.width
  return Figure(figsize=(max(sheet.width, min_width), scale * height))


def panels(count: int) -> tuple[Figure, list[Axes]]:
  """A figure with so many pairs of axes, in one, two or three columns."""
  columns, sizes = {1: 1, 2: 2, 4: 2}.get(count, 3), {1: 3.6, 2: 2.9, 3: 2.3}
  if _sheet.get().is_narrow:
    columns, sizes = (1 if count <= 2 else 2), {1: 3.6, 2: 2.6}
  rows = math.ceil(count / columns)
  made = figure(0.6 + rows * sizes[columns])
  grid = made.subplots(rows, columns, squeeze=False).ravel().tolist()
  for axes in grid[count:]:
    axes.remove()
  return made, grid[:count]


def max_ticks(wide: int, axes: Axes) -> int:
  """How many labels fit beside each other, of those that fit on a screen."""
  spec = axes.get_subplotspec()
  columns = spec.get_gridspec().ncols if spec is not None else 1
  return max(3, wide // 2) if _sheet.get().width / columns < 3 else wide


def frame(
  figure: Figure, title: str, note: str, legend: Sequence[Line2D] = ()
) -> None:
  """Adds title and legend above all axes and a line in small print below."""
  sheet = _sheet.get()
  if not sheet.titles:
    title = note = ''
  # About a hundred letters fit side by side; a handle takes the room of eight.
  letters = 137 * figure.get_figwidth() / sheet.font_size
  longest = max((len(str(h.get_label())) for h in legend), default=0)
  columns = max(1, min(6, int(letters / (longest + 8))))
  line = 0.024 * sheet.font_size  # inches
  top = 0.3 * bool(title) + line * math.ceil(len(legend) / columns)
  bottom = 0.24 if note else 0.02
  height = figure.get_figheight() + top
  figure.set_figheight(height)
  rect = (0, bottom / height, 1, 1 - (top + bottom) / height)
  figure.set_layout_engine('constrained', rect=rect)
  figure.text(0.01, bottom / 4 / height, note, fontsize='small', color=QUIET)
  if title:
    figure.suptitle(
      title,
      x=0.01,
      y=1 - 0.06 / height,
      ha='left',
      va='top',
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
  figure: figure_lib.Figure, path: str | os.PathLike[str], *, dpi: int = 150
) -> pathlib.Path:
  """Writes a figure as PNG, PDF and SVG; equal figures give equal bytes.

  A name with the ending of a format, such as fig.pdf, is that file alone. Each
  file is written in one step.

  Args:
    dpi: of the PNG file.

  Returns:
    The path of the PNG file, or of the only one.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with house_style():
    ...   save(Figure(figsize=(2, 1)), folder / 'density_0.1').name
    'density_0.1.png'
    >>> sorted(path.name for path in folder.iterdir())
    ['density_0.1.pdf', 'density_0.1.png', 'density_0.1.svg']
  """
  path = pathlib.Path(path)
  files = {kind: path.with_name(f'{path.name}.{kind}') for kind in _DATES}
  kind = path.suffix.removeprefix('.').lower()
  if kind in figure.canvas.get_supported_filetypes():
    files = {kind: path}
  engine = figure.get_layout_engine()
  try:
    for kind, file in files.items():
      buffer = io.BytesIO()
      with style.context([_FILES]):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_DATES.get(kind))
      # The second is laid out as the first, which took most of the time.
      if engine is not None:
        figure.set_layout_engine('none')
      whole.write_bytes(file, buffer.getvalue())
  finally:
    if engine is not None:
      figure.set_layout_engine(engine)
  return next(iter(files.values()))


# What would make equal figures differ.
_DATES: Mapping[str, Row] = {
  'png': {'Software': None},
  'pdf': {'CreationDate': None},
  'svg': {'Date': None},
}
