"""Flat records: choosing them, averaging them over keys, naming what they hold.

A record is one measured point, a flat dict with the names of results.json:
alpha, key, sparsity, accuracy and so on. A value that could not be measured is
None or NaN.
"""

from collections.abc import Callable, Sequence
import math
import numbers
from typing import Any

from powerprop_jax.files.tables import Record, Row


def pivot(
  records: Sequence[Record],
  *,
  rows: str = 'sparsity',
  columns: str = 'alpha',
  value: str = 'accuracy',
) -> list[Row]:
  """Means of flat records, one field down and another across.

  One row for each value of rows, in ascending order. Its keys are rows and,
  for each value of columns in ascending order, 'columns value'; a combination
  that was not measured is None. Records without one of the three fields, or
  with None for it, are left out. A NaN makes its mean NaN: one diverged run is
  not hidden by the others.

  Example:
    >>> records = [{'alpha': 1.0, 'sparsity': 0.9, 'key': 0, 'accuracy': 0.5},
    ...            {'alpha': 1.0, 'sparsity': 0.9, 'key': 1, 'accuracy': 1.0},
    ...            {'alpha': 2.0, 'sparsity': 0.9, 'key': 0, 'accuracy': 0.9}]
    >>> pivot(records)
    [{'sparsity': 0.9, 'alpha 1': 0.75, 'alpha 2': 0.9}]
  """
  cells: dict[tuple[Any, Any], list[float]] = {}
  for record in records:
    if all(record.get(field) is not None for field in (rows, columns, value)):
      cell = cells.setdefault((record[rows], record[columns]), [])
      cell.append(record[value])
  table: list[Row] = []
  for down in sorted({key[0] for key in cells}):
    row: Row = {rows: down}
    for across in sorted({key[1] for key in cells}):
      values = cells.get((down, across))
      name = f'{across:g}' if isinstance(across, (int, float)) else across
      row[f'{columns} {name}'] = sum(values) / len(values) if values else None
    table.append(row)
  return table


def usable(records: Sequence[Record], *fields: str) -> list[Record]:
  """Records that have all the fields, though perhaps without a value.

  Raises:
    ValueError: if there is none; the message names the fields.
  """
  chosen = [r for r in records if all(field in r for field in fields)]
  if not chosen:
    first = (
      f'the first has {", ".join(records[0])}' if records else 'none given'
    )
    raise ValueError(
      f'no record has all of the fields {", ".join(fields)} ({first}).'
    )
  return chosen


def density(record: Record) -> float:
  """Share of the weights that are left."""
  return 1 - record['sparsity']


def group(
  records: Sequence[Record], x: str | Callable[[Record], float], y: str
) -> dict[float, list[float]]:
  """Finite values of y for each x, x ascending.

  Records without the field y are passed over; an x where no value of y is
  finite keeps its place, with an empty list.

  Example:
    >>> group([{'step': 2, 'loss': None}, {'step': 1, 'loss': 0.5}],
    ...       'step', 'loss')
    {1: [0.5], 2: []}
  """
  groups: dict[float, list[float]] = {}
  for record in records:
    if y in record:
      at = x(record) if callable(x) else record[x]
      values = groups.setdefault(at, [])
      if is_finite(record[y]):
        values.append(record[y])
  return dict(sorted(groups.items()))


def is_finite(value: Any) -> bool:
  """True for a number that is neither NaN nor infinite; False for others."""
  return isinstance(value, numbers.Real) and math.isfinite(value)


def spread_note(records: Sequence[Record], *fields: str) -> str:
  """What lines and bands mean, and how many values of fields are left out.

  Example:
    >>> spread_note([{'key': 0, 'loss': 1.0}, {'key': 1, 'loss': None}], 'loss')
    'Lines: mean over 2 keys. Bands: lowest to highest. Not finite: 1.'
  """
  keys = len({record.get('key') for record in records})
  note = 'One key (random seed).'
  if keys > 1:
    note = f'Lines: mean over {keys} keys. Bands: lowest to highest.'
  lost = sum(
    field in record and not is_finite(record[field])
    for record in records
    for field in fields
  )
  return note + (f' Not finite: {lost:,}.' if lost else '')


def over_keys(count: int, *, spread: bool = False) -> str:
  """What a caption adds about numbers of several keys; '' for those of one.

  Example:
    >>> over_keys(3), over_keys(1)
    (', mean over 3 keys', '')
    >>> over_keys(2, spread=True)
    ', mean ± standard deviation over 2 keys'
  """
  what = 'mean ± standard deviation' if spread else 'mean'
  return f', {what} over {count} keys' if count > 1 else ''


def short_names(leaves: Sequence[str]) -> dict[str, str]:
  """Leaf names without what all of them share, and without Haiku's '~'.

  Example:
    >>> short_names(['mlp/~/linear_0/w', 'mlp/~/linear_1/w'])
    {'mlp/~/linear_0/w': 'linear_0', 'mlp/~/linear_1/w': 'linear_1'}
  """
  parts = [[p for p in leaf.split('/') if p != '~'] for leaf in leaves]
  for part in (-1, 0):
    while _is_shared(parts, part):
      parts = [p[:-1] if part else p[1:] for p in parts]
  return dict(zip(leaves, map('/'.join, parts), strict=True))


def _is_shared(parts: Sequence[Sequence[str]], part: int) -> bool:
  """Whether all names have the same part there, and others besides."""
  if len(parts) < 2 or min(map(len, parts)) < 2:
    return False
  return len({p[part] for p in parts}) == 1
