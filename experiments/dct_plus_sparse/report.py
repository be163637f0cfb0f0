"""Tables, figures and page of experiments/dct_plus_sparse."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from experiments.common import sparse_runs
from experiments.common import tables as common_tables
from experiments.dct_plus_sparse import figures as figures_lib
from experiments.dct_plus_sparse.config import Config
from powerprop_jax.files import tables, whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import plotting
from powerprop_jax.report import records as records_lib
from powerprop_jax.train.runs import contents
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Figure, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

_Records = Sequence[dict[str, Any]]

_SIZES = (
  'Parameters that are trained (connections, biases, scales and offsets), and '
  'bytes of everything that a step takes from the one before: weights, slots '
  "of the optimiser, norms' averages, masks or positions. Condensed, a network "
  'holds its connections alone.'
)
_STEPS = (
  'A training step in the masked form, which takes as long at every density; '
  'networks take turns.'
)
_DENSITIES = 'Weights left in each layer after training (%).'


def write(
  folder: RunFolder,
  config: Config,
  results: _Records,
  costs: Mapping[str, _Records],
) -> None:
  """Prints the tables; writes them, the figures and report.html.

  results are records of networks, with accuracy, and of layers; costs are the
  tables 'sizes' and 'steps'.
  """
  title = f'{config.net} on {config.data.name}'
  of_networks = [record for record in results if 'accuracy' in record]
  of_layers = [record for record in results if 'layer' in record]
  rows = accuracy_table(of_networks)
  text = common_tables.markdown(rows)
  whole.write_bytes(folder.path / 'table.md', text.encode())
  print(f'\n{_accuracy(config)}\n\n{text}', end='')
  for words, name in ((_SIZES, 'sizes'), (_STEPS, 'steps')):
    if costs[name]:
      print(f'\n{words}\n\n{tables.text_table(costs[name])}')
  figures = {
    'accuracy': figures_lib.accuracy_by_support(
      of_networks,
      title=title,
      num_classes=sparse_runs.load(config).num_classes,
    ),
    **{
      f'signals_{support}': figures_lib.signal_propagation(
        signals, title=f'{title}, {support}, before the first step'
      )
      for support, signals in _signals(of_layers).items()
    },
  }
  for name, figure in figures.items():
    plotting.save(figure, folder.path / name)
  shown = {'table': rows, 'densities': density_table(of_layers), **costs}
  for name, found in shown.items():
    folder.write_json(f'{name}.json', found)
  run_report.write(folder.path)


def page(config: Config) -> Page:
  """What the page of a run shows."""
  accuracy = Figure('accuracy', 'test accuracy by density')
  signals = (
    Figure(f'signals_{support}', 'variance and gradient norm by layer')
    for support in config.supports
  )
  table = contents.table_of
  sections = (
    Section(
      'Accuracy against density',
      'Test accuracy after the last step. The network dct adds a fixed cosine '
      'transform to every layer.',
      (accuracy,),
      (table('table', _accuracy(config)),),
    ),
    Section(
      'Signal propagation',
      'Before the first step, on one batch. Layers from input to output.',
      tuple(signals),
    ),
    Section('Costs', tables=(table('sizes', _SIZES), table('steps', _STEPS))),
    Section('Layers', tables=(table('densities', _DENSITIES),)),
  )
  title = f'{config.net} on {config.data.name}'
  subtitle = ', '.join(config.supports)
  return Page(f'Cosine transform plus sparse, {title}', subtitle, sections)


def _accuracy(config: Config) -> str:
  over = records_lib.over_keys(len(config.keys), spread=True)
  return f'Test accuracy in per cent{over}.'


def accuracy_table(records: _Records) -> list[Row]:
  """A row for each support and density, a column for each network and α.

  Cells are words, in per cent; None where nothing was trained.

  Example:
    >>> record = {'network': 'dct', 'support': 'erk', 'density': 0.01,
    ...           'alpha': 1.0, 'accuracy': 0.5}
    >>> accuracy_table([record])
    [{'support': 'erk', 'density': 0.01, 'dct': '50.00'}]
  """
  several = len({record['alpha'] for record in records}) > 1
  rows: dict[Any, Row] = {}
  cells: dict[Any, list[float]] = {}
  for record in records:
    column = record['network']
    if several:
      column += f', α = {record["alpha"]:g}'
    place = (record['support'], record['density'])
    cells.setdefault((place, column), []).append(record['accuracy'])
  columns = dict.fromkeys(column for _, column in cells)
  for (place, column), values in cells.items():
    empty = {'support': place[0], 'density': place[1], **columns}
    row = rows.setdefault(place, empty)
    row[column] = common_tables.mean_and_deviation(values)
  return list(rows.values())


def density_table(records: _Records) -> list[Row]:
  """Densities of layers, a row for each support and density.

  Args:
    records: of layers, with network, support, density, alpha, layer and
      layer_density.

  Returns:
    Rows with network, support, density, α and a column for each layer, in per
    cent, averaged over keys.

  Example:
    >>> place = {'network': 'dct', 'support': 'erk', 'density': 0.1,
    ...          'alpha': 1.0}
    >>> density_table([place | {'layer': 'linear', 'layer_density': 0.25}])
    [{'network': 'dct', 'support': 'erk', 'density': 0.1, 'alpha': 1.0, \
'linear': 25.0}]
  """
  names = records_lib.short_names(
    list(dict.fromkeys(record['layer'] for record in records))
  )
  fields = ('network', 'support', 'density', 'alpha')
  found: dict[Any, dict[str, list[float]]] = {}
  for record in records:
    of_place = found.setdefault(tuple(record[f] for f in fields), {})
    of_layer = of_place.setdefault(names[record['layer']], [])
    of_layer.append(100 * record['layer_density'])
  return [
    dict(zip(fields, place, strict=True))
    | {layer: statistics.fmean(values) for layer, values in of_place.items()}
    for place, of_place in found.items()
  ]


def _signals(records: _Records) -> dict[str, list[Row]]:
  """Records of layers by support, of the first α alone."""
  first = records[0]['alpha']
  found: dict[str, list[Row]] = {}
  for record in records:
    if record['alpha'] == first:
      found.setdefault(record['support'], []).append(record)
  return found
