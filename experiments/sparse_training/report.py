"""Table, figures and page of experiments/sparse_training."""

from collections.abc import Sequence
import pathlib
import statistics
from typing import Any

from experiments.common import sparse_runs
from experiments.sparse_training import published
from experiments.sparse_training.config import Config
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import html, plotting

_Records = Sequence[dict[str, Any]]


def write(
  path: pathlib.Path,
  config: Config,
  settings: Row,
  results: _Records,
  logged: _Records,
) -> None:
  """Prints the table; writes it, the figures and report.html.

  Args:
    path: the folder of the run.
    config: the settings of the run.
    settings: those that its results depend on.
    results: records with method, density, alpha, key and accuracy.
    logged: records of the masks, with method, total_density, alpha, key and
      step; and churn, or layer and its density.
  """
  title = f'{config.net} on {config.data.name}'
  theirs = published.sparse_training(config.net, config.data.name)
  rows = table(results, theirs)
  text = markdown(rows)
  whole.write_bytes(path / 'table.md', text.encode())
  print(f'\nTest accuracy (%), {title}, mean ± standard deviation over keys:\n')
  print(text, end='')
  figures = _figures(title, results, logged, theirs)
  paths = {
    name: plotting.save(figure, path / f'{name}.png')
    for name, figure in figures.items()
  }
  sections = [
    html.Section(
      'Accuracy against density',
      'Test accuracy after the last step, for θ = φ beside what others '
      'published.',
      figures=[html.Figure(paths['accuracy'], 'test accuracy against density')],
      tables=[
        html.Table(
          rows, 'Test accuracy in per cent, mean ± standard deviation.'
        )
      ],
    )
  ]
  for kind, heading, alt in (
    ('layers', 'Densities of the layers', 'density of each layer by step'),
    ('churn', 'Connections that moved', 'share of new connections by step'),
  ):
    shown = [name for name in paths if name.startswith(kind)]
    drawn = [html.Figure(paths[n], f'{alt}, {n}') for n in shown]
    if drawn:
      sections.append(html.Section(heading, figures=drawn))
  html.write_report(
    path / 'report.html',
    title='Sparse training',
    subtitle=title,
    config=settings,
    sections=sections,
  )


def table(results: _Records, theirs: _Records = ()) -> list[Row]:
  """Rows with the method, the density, a column for each α, and published ones.

  Args:
    results: records with method, density, alpha, accuracy and
      density_measured.
    theirs: published records with method, density and accuracy.

  Returns:
    One row for each method and density, in the order of the results;
    accuracies are words, in per cent.

  Example:
    >>> record = {'method': 'set', 'density': 0.1, 'density_measured': 0.1,
    ...           'alpha': 1.0, 'accuracy': 0.98}
    >>> table([record, {**record, 'accuracy': 0.99}])[0]['α = 1']
    '98.50 ± 0.71'
  """
  alphas = sorted({record['alpha'] for record in results})
  rows: dict[tuple[str, float], Row] = {}
  for record in results:
    place = (record['method'], record['density'])
    rows.setdefault(
      place,
      {
        'method': record['method'],
        'density': record['density'],
        'measured': round(record['density_measured'], 6),
      },
    )
  for (method, density), row in rows.items():
    for alpha in alphas:
      row[f'α = {alpha:g}'] = mean_and_deviation(
        [
          record['accuracy']
          for record in results
          if (record['method'], record['density'], record['alpha'])
          == (method, density, alpha)
        ]
      )
    if theirs:
      known = [
        f'{record["accuracy"]:.2%}'.rstrip('%')
        for record in theirs
        if (record['method'], record['density']) == (method, density)
      ]
      row['published'] = known[0] if known else None
  return list(rows.values())


def mean_and_deviation(accuracies: Sequence[float]) -> str | None:
  """Accuracies of several keys in words, in per cent; None for no key.

  Example:
    >>> mean_and_deviation([0.98, 0.99]), mean_and_deviation([0.5])
    ('98.50 ± 0.71', '50.00')
  """
  if not accuracies:
    return None
  mean = f'{100 * statistics.fmean(accuracies):.2f}'
  if len(accuracies) == 1:
    return mean
  return f'{mean} ± {100 * statistics.stdev(accuracies):.2f}'


def markdown(rows: _Records) -> str:
  """Rows that have the same names as a table in Markdown.

  Example:
    >>> print(markdown([{'method': 'set', 'density': 0.1}]), end='')
    | method | density |
    |---|---|
    | set | 0.1 |
  """
  names = list(rows[0])
  lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
  text = [f'| {" | ".join(line)} |\n' for line in lines]
  return ''.join([text[0], '|---' * len(names), '|\n', *text[1:]])


def _cell(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:g}' if isinstance(value, float) else str(value)


def _renamed(records: _Records) -> _Records:
  return [
    {**record, 'method': sparse_runs.full_name(record['method'])}
    for record in records
  ]


def _figures(
  title: str, results: _Records, logged: _Records, theirs: _Records
) -> Row:
  figures = {
    'accuracy': plotting.accuracy_against_density(
      _renamed(results),
      title=title,
      published=[{'alpha': 1.0, **record} for record in _renamed(theirs)],
    )
  }
  for density in sorted({record['total_density'] for record in logged}):
    of_density = [r for r in logged if r['total_density'] == density]
    name = f'{title}, density {density:g}'
    for field, kind, draw in (
      ('layer', 'layers', plotting.layer_densities),
      ('churn', 'churn', plotting.mask_churn),
    ):
      shown = _renamed([record for record in of_density if field in record])
      if shown:
        figures[f'{kind}_density_{density:g}'] = draw(shown, title=name)
  return figures
