"""Table, figures and page of experiments/sparse_training."""

from collections.abc import Sequence
from typing import Any

from experiments.common import tables
from experiments.sparse_training import published
from experiments.sparse_training.config import Config
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import records
from powerprop_jax.train.runs import contents
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Figure, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

_Records = Sequence[dict[str, Any]]


def write(folder: RunFolder, config: Config, results: _Records) -> None:
  """Prints the table; writes it, the figures and report.html."""
  rows = table(
    results,
    published.sparse_training(config.net, config.data.name),
    metric='loss' if config.data.is_text else 'accuracy',
  )
  text = tables.markdown(rows)
  whole.write_bytes(folder.path / 'table.md', text.encode())
  folder.write_json('table.json', rows)
  title = f'{config.net} on {config.data.name}'
  over = records.over_keys(len(config.keys), spread=True)
  print(f'\n{_measured(config)}, {title}{over}:\n')
  print(text, end='')
  run_report.write(folder.path)


def page(config: Config, densities: Sequence[float]) -> Page:
  """What the page of a run shows, with a pair of figures for each density."""
  title = f'{config.net} on {config.data.name}'
  theirs = published.sparse_training(config.net, config.data.name)
  accuracy = Figure(
    'accuracy',
    'test accuracy against density',
    'accuracy_against_density',
    options={
      'title': title,
      'published': [{'alpha': 1.0, **record} for record in theirs],
    },
  )
  over = records.over_keys(len(config.keys), spread=True)
  section = Section(
    'Results',
    'Test accuracy after the last step'
    f'{", for θ = φ beside what others published" if theirs else ""}.',
    (accuracy,),
    (contents.table_of('table', f'{_measured(config)}{over}.'),),
  )
  sections = [section, *mask_sections(title, densities)]
  subtitle = ', '.join(config.methods)
  return Page(f'Sparse training of {title}', subtitle, tuple(sections))


def mask_sections(
  title: str, densities: Sequence[float], within: str = 'combinations/*/'
) -> tuple[Section, ...]:
  """How connections moved, from what was logged of each combination."""
  return contents.mask_sections(
    *(
      (
        f'_density_{density:g}',
        f'{title}, density {density:g}',
        contents.Records(
          f'{within}metrics.jsonl',
          where={'total_density': density},
          settings={'method': 'method', 'total_density': 'density'},
        ),
      )
      for density in densities
    )
  )


def _measured(config: Config) -> str:
  if config.data.is_text:
    return 'Loss on the rest of the text in nats per character'
  return 'Test accuracy in per cent'


def table(
  results: _Records, theirs: _Records = (), *, metric: str = 'accuracy'
) -> list[Row]:
  """Rows with the method, the density, a column for each α, and published ones.

  Numbers are words, accuracies in per cent.

  Example:
    >>> record = {'method': 'set', 'density': 0.1, 'density_measured': 0.1,
    ...           'alpha': 1.0, 'accuracy': 0.98}
    >>> table([record, {**record, 'accuracy': 0.99}])[0]['α = 1']
    '98.50 ± 0.71'
  """
  alphas = sorted({record['alpha'] for record in results})
  places: dict[tuple[str, float], list[Row]] = {}
  for record in results:
    place = (record['method'], record['density'])
    places.setdefault(place, []).append(record)
  rows = []
  for place, found in places.items():
    row: Row = {
      'method': place[0],
      'density': place[1],
      'measured': round(found[0]['density_measured'], 6),
    }
    for alpha in alphas:
      row[f'α = {alpha:g}'] = tables.mean_and_deviation(
        [record[metric] for record in found if record['alpha'] == alpha],
        per_cent=metric == 'accuracy',
      )
    if theirs:
      known = [
        f'{record["accuracy"]:.2%}'.rstrip('%')
        for record in theirs
        if (record['method'], record['density']) == place
      ]
      row['published'] = known[0] if known else None
    rows.append(row)
  return rows
