"""How much faster networks are without their zeros."""

from collections.abc import Sequence

from matplotlib import ticker
from matplotlib.figure import Figure

from powerprop_jax.files.tables import Record
from powerprop_jax.report import plotting
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style
from powerprop_jax.report.plotting.style import Look, Scheme
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs.folder import RunFolder

# Colour and marker (colours of Okabe and Ito), in the order of the legend.
_WAYS = {
  'condensed': ('#d55e00', 'o'),
  'auto': ('#e69f00', 'P'),
  'masked': ('#0072b2', 's'),
  'scipy CSR': ('#009e73', 'D'),
  'BCSR': ('#cc79a7', '^'),
  'MKL': ('#56b4e9', 'v'),
  'blocks': ('#000000', 'X'),
  'pairs': ('#999999', '*'),
}


def save(records: Sequence[Record], folder: RunFolder) -> None:
  """Writes the records, where they come from and the figure; ends the run."""
  environment = timing.environment()
  folder.write_results(records)
  folder.write_json('environment.json', {'environment': environment})
  if any('speed_up' in record for record in records):
    figure = speed_ups(records, title=environment)
    plotting.save(figure, folder.path / 'speed_ups')
  folder.mark_complete()
  print(f'\nTables as data and figures: {folder.path}')


def speed_ups(records: Sequence[Record], *, title: str = '') -> Figure:
  """Speed-up over dense against the density, a line for each way to compute.

  There is a pair of axes for each thing that was measured, both scales
  logarithmic; a line at 1 is dense. Records are those of sparse_networks,
  sparse_speed and sparse_gpu; those without speed_up are passed over.
  """
  fields = ('what', 'sparsity', 'way', 'speed_up')
  points = [
    {**point, 'density': 1 - point['sparsity']}
    for point in records_lib.usable(records, *fields)
    if point['way'] in _WAYS
  ]
  ways = {point['way'] for point in points}
  looks = {
    way: Look(colour, marker, '-', way)
    for way, (colour, marker) in _WAYS.items()
    if way in ways
  }
  scheme = Scheme(lambda point: point['way'], looks)
  things = list(dict.fromkeys(point['what'] for point in points))
  densities = [point['density'] for point in points]
  with style.house_style():
    figure, grid = style.panels(len(things))
    for axes, what in zip(grid, things, strict=True):
      here = [point for point in points if point['what'] == what]
      axes.axhline(1, color='0.6', linewidth=0.8)
      drawing.lines(axes, here, 'density', 'speed_up', scheme)
      axes.set_yscale('log')
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
      drawing.weights_left_axis(
        axes, min(densities), max(densities), max_ticks=5
      )
      axes.set_title(what)
      drawing.label_first(axes, 'times as fast as dense')
    note = 'medians of neighbouring runs in one process'
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure
