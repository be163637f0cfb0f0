"""Table, figures and page of experiments/continual_permuted."""

from collections.abc import Mapping, Sequence

from experiments.common import tables
from experiments.continual_permuted import figures as plotting
from experiments.continual_permuted import methods
from experiments.continual_permuted.config import Config
from powerprop_jax.core.trees import Params
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import style
from powerprop_jax.report.plotting import weights as weight_plots
from powerprop_jax.train.runs import contents
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Figure, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

_Records = Sequence[Row]


def write(
  folder: RunFolder,
  config: Config,
  results: _Records,
  weights: Mapping[str, Mapping[float, Params]],
) -> None:
  """Prints the table; writes it, the figures and report.html.

  results are the records of results.json, weights those that all tasks share
  after the last one, by method and α.
  """
  title = _title(config)
  rows = table(results)
  text = tables.markdown(rows)
  whole.write_bytes(folder.path / 'table.md', text.encode())
  over = records_lib.over_keys(len(config.keys), spread=True)
  print(f'\n{title}, in per cent{over}:\n')
  print(text, end='')
  for name, figure in _figures(title, results, weights).items():
    style.save(figure, folder.path / name)
  folder.write_json('table.json', rows)
  folder.write_json('packed.json', _packed(results))
  run_report.write(folder.path)


def page(config: Config) -> Page:
  """What the page of a run shows."""
  over = records_lib.over_keys(len(config.keys), spread=True)
  histograms = (
    Figure(name, f'histograms of the weights for each α, {name}')
    for name in (f'weights_{method}' for method in methods.SPARSE)
  )
  sections = (
    Section(
      'Accuracy',
      'Test accuracy of each task while later ones are learned. Transfers have '
      "the divisor T - 1 of the paper; results.json has GEM's too.",
      (Figure('accuracy', 'test accuracy against tasks learned'),),
      (contents.table_of('table', f'In per cent{over}.'),),
    ),
    Section(
      'Capacity',
      'Shares of the weights that all tasks share.',
      (Figure('capacity', 'weights in use against tasks learned'),),
      (contents.table_of('packed', 'Each task of the first key, as packed.'),),
    ),
    Section(
      'Weights',
      'Shared weights θ after the last task, of the first key.',
      tuple(histograms),
    ),
  )
  subtitle = ', '.join(map(plotting.method_name, config.methods))
  return Page(f'Continual learning, {_title(config)}', subtitle, sections)


def _title(config: Config) -> str:
  stream = config.stream
  if stream.kind == 'sequence':
    return ', then '.join(stream.sequence)
  return f'{stream.num_tasks} tasks, {stream.kind} {config.data.name}'


def table(results: _Records) -> list[Row]:
  """A row for each method and α, with the means of its metrics over keys.

  Numbers are words, in per cent. A cell is empty where nothing was measured.

  Example:
    >>> record = {'method': 'ewc', 'alpha': 1.0, 'key': 0, 'num_tasks': 2,
    ...           'tasks_fitted': 2, 'average_accuracy': 0.9, 'forgetting': 0.1}
    >>> row = table([record])[0]
    >>> row['method'], row['average accuracy'], row['forgetting']
    ('EWC', '90.00', '10.00')
  """
  places = dict.fromkeys((r['method'], r['alpha']) for r in results)
  rows = []
  for method, alpha in places:
    of_place = [
      r for r in results if (r['method'], r['alpha']) == (method, alpha)
    ]
    ends = [r for r in of_place if 'num_tasks' in r]
    row: Row = {
      'method': plotting.method_name(method),
      'α': f'{alpha:g}',
      'tasks': str(min(r['tasks_fitted'] for r in ends)),
    }
    for field in _METRICS:
      row[field.replace('_', ' ')] = tables.mean_and_deviation(
        [r[field] for r in ends if records_lib.is_finite(r.get(field))]
      )
    # It never falls, so the largest is that after the last task.
    used: dict[int, float] = {}
    for record in of_place:
      if 'capacity_used' in record:
        used[record['key']] = record['capacity_used']
    row['capacity used'] = tables.mean_and_deviation(list(used.values()))
    rows.append(row)
  return rows


_METRICS = (
  'average_accuracy',
  'learning_accuracy',
  'forgetting',
  'backward_transfer',
)


def _packed(results: _Records) -> list[Row]:
  """The tasks of the first key as they were packed."""
  first = results[0]['key']
  return [
    {name: record[name] for name in _PACKED if name in record}
    for record in results
    if 'capacity_used' in record and record['key'] == first
  ]


_PACKED = (
  'method',
  'alpha',
  'tasks_learned',
  'dense_accuracy',
  'validation_accuracy',
  'density',
  'new',
  'overlap',
  'capacity_used',
)


def _figures(
  title: str,
  results: _Records,
  weights: Mapping[str, Mapping[float, Params]],
) -> Row:
  entries = [r for r in results if 'task' in r]
  figures = {'accuracy': plotting.accuracy_over_tasks(entries, title=title)}
  packed = [r for r in results if 'capacity_used' in r]
  if packed:
    figures['capacity'] = plotting.capacity(packed, title=title)
  for method, by_alpha in weights.items():
    figures[f'weights_{method}'] = weight_plots.weight_histograms(
      analysis.weight_histograms(by_alpha),
      title=f'Weights after {plotting.method_name(method)}, {title}',
    )
  return figures
