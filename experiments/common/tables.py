"""Tables of results: means over keys in words, and rows as Markdown."""

from collections.abc import Sequence
import statistics
from typing import Any

from powerprop_jax.files.tables import Record


def mean_and_deviation(
  values: Sequence[float], *, per_cent: bool = True
) -> str | None:
  """Shares measured for several keys in words; None for no key.

  Example:
    >>> mean_and_deviation([0.98, 0.99]), mean_and_deviation([0.5])
    ('98.50 ± 0.71', '50.00')
  """
  if not values:
    return None
  unit, digits = (100, 2) if per_cent else (1, 4)
  words = f'{unit * statistics.fmean(values):.{digits}f}'
  if len(values) > 1:
    words += f' ± {unit * statistics.stdev(values):.{digits}f}'
  return words


def markdown(rows: Sequence[Record]) -> str:
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
