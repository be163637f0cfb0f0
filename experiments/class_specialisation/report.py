"""Tables, figure and page of experiments/class_specialisation."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

from experiments.class_specialisation import figures
from experiments.common import tables as common_tables
from powerprop_jax.files import tables as tables_lib
from powerprop_jax.files.tables import Row
from powerprop_jax.report import html, plotting
from powerprop_jax.report import records as records_lib
from powerprop_jax.train.runs import report as run_report

_Records = Sequence[dict[str, Any]]

_MEANS = (
  'Mean class-specialisation of the features that each layer reads, and of the '
  'output, ± its standard deviation over keys where there are several.'
)
_FEATURES = (
  'Features that the layers read, of all keys together; dead are those active '
  'for no image, or alike for all, as without a connection into them.'
)


def write(
  path: pathlib.Path,
  title: str,
  num_classes: int,
  records: _Records,
  tables: Mapping[str, _Records],
) -> None:
  """Prints the tables; writes them and the figure to report.html.

  Records have method, key, and accuracy or layer, feature, specialisation;
  tables are those of features.specialisation_table, by method.
  """
  of_features = [record for record in records if 'feature' in record]
  names = ('method', 'key', 'accuracy')
  accuracies = [
    {name: record[name] for name in names}
    for record in records
    if 'accuracy' in record
  ]
  means = mean_by_layer(of_features)
  rows = _rows(tables)
  for words, table in (
    (_MEANS, means),
    (_FEATURES, rows),
    ('Test accuracy.', accuracies),
  ):
    print(f'\n{words}\n\n{tables_lib.text_table(table)}')
  figure = figures.class_specialisation(
    of_features, title=title, num_classes=num_classes
  )
  image = plotting.save(figure, path / 'class_specialisation')
  run_report.write_page(
    path,
    f'Class-specialisation of the features of {title}',
    '',
    [
      html.Section(
        'Class-specialisation by layer',
        f'1 is a feature of a single class, {1 / num_classes:g} one that '
        'responds to all classes alike. The features of the output are the '
        'classes: there a high value only says that the network classifies.',
        figures=[html.Figure(image, 'histograms of class-specialisation')],
        tables=[html.Table(means, _MEANS), html.Table(rows, _FEATURES)],
      ),
      html.Section('Test accuracy', tables=[html.Table(accuracies)]),
    ],
  )


def mean_by_layer(records: _Records) -> list[Row]:
  """Mean specialisation, a row for each layer and a column for each method.

  In words: the mean over keys of the mean over features, and the standard
  deviation over keys if there are several. Features without one do not count.

  Example:
    >>> record = {'layer': 'linear', 'method': 'set', 'key': 0}
    >>> mean_by_layer([{**record, 'specialisation': 0.25},
    ...                {**record, 'specialisation': 0.75}])
    [{'layer': 'linear', 'set': '0.5000'}]
  """
  values: dict[tuple[str, str], dict[int, list[float]]] = {}
  for record in records:
    of_place = values.setdefault((record['layer'], record['method']), {})
    of_key = of_place.setdefault(record['key'], [])
    if records_lib.is_finite(record['specialisation']):
      of_key.append(record['specialisation'])
  names = records_lib.short_names([layer for layer, _ in values])
  rows: dict[str, Row] = {}
  for (layer, method), by_key in values.items():
    means = [statistics.fmean(of_key) for of_key in by_key.values() if of_key]
    words = common_tables.mean_and_deviation(means, per_cent=False)
    rows.setdefault(layer, {'layer': names[layer]})[method] = words
  return list(rows.values())


def _rows(tables: Mapping[str, _Records]) -> list[Row]:
  """The tables of all methods as one, with short names of layers."""
  layers = dict.fromkeys(r['layer'] for rows in tables.values() for r in rows)
  names = records_lib.short_names(list(layers))
  return [
    {'method': method, **row, 'layer': names[row['layer']]}
    for method, rows in tables.items()
    for row in rows
  ]
