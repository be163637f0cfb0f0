"""Tables: rows of flat dicts, for people.

All rows have the same keys; values stay numbers until `text_table` or
`html_table` writes them.
"""

from collections.abc import Mapping, Sequence
import html
import math
from typing import Any

import numpy as np

Row = dict[str, Any]
# A row that is only read.
Record = Mapping[str, Any]


class TextTable(str):
  """A table as text that a notebook shows as a table.

  Attributes:
    rows: what it shows.
    note: a line below it, part of the text.
  """

  rows: Sequence[Record]
  note: str

  def __new__(
    cls, text: str, rows: Sequence[Record] = (), note: str = ''
  ) -> 'TextTable':
    """The text, the rows that it shows, and a line below them."""
    table = super().__new__(cls, f'{text}\n{note}' if note else text)
    table.rows, table.note = rows, note
    return table

  def __repr__(self) -> str:
    # What an interactive session prints.
    return str(self)

  def _repr_html_(self) -> str:
    note = f'<p>{html.escape(self.note)}</p>' if self.note else ''
    return html_table(self.rows) + note


def text_table(rows: Sequence[Record], note: str = '') -> TextTable:
  """Rows as plain text: words to the left, numbers to the right.

  A heading and one line a row, without trailing spaces; '' for no rows. A key
  that a row lacks is written like None, as '-'. The note is a line below.

  Example:
    >>> print(text_table([{'alpha': 1.0, 'net_name': 'mlp'},
    ...                   {'alpha': 1.5, 'net_name': 'lenet_5'}]))
    alpha  net name
      1.0  mlp
      1.5  lenet_5
  """
  columns = []
  for name in column_names(rows):
    values = [row.get(name) for row in rows]
    cells = [name.replace('_', ' '), *format_column(values)]
    width = max(map(len, cells))
    justify = str.rjust if is_numeric(values) else str.ljust
    columns.append([justify(cell, width) for cell in cells])
  lines = zip(*columns, strict=True)
  text = '\n'.join('  '.join(line).rstrip() for line in lines)
  return TextTable(text, rows, note)


def html_table(rows: Sequence[Record], caption: str = '') -> str:
  """Rows as a table of HTML, cells as in text_table, all of them escaped.

  Cells of numbers have the class 'number'.

  Example:
    >>> print(html_table([{'net_name': 'mlp'}]))
    <table>
    <thead><tr><th scope="col">net name</th></tr></thead>
    <tbody>
    <tr><td>mlp</td></tr>
    </tbody>
    </table>
  """
  names = column_names(rows)
  columns = [[row.get(name) for row in rows] for name in names]
  classes = [' class="number"' * is_numeric(column) for column in columns]
  headings = ''.join(
    f'<th scope="col"{kind}>{_escaped(name.replace("_", " "))}</th>'
    for kind, name in zip(classes, names, strict=True)
  )
  lines = ['<table>']
  if caption:
    lines.append(f'<caption>{_escaped(caption)}</caption>')
  lines.append(f'<thead><tr>{headings}</tr></thead>\n<tbody>')
  for row in zip(*map(format_column, columns), strict=True):
    cells = zip(classes, row, strict=True)
    values = ''.join(f'<td{kind}>{_escaped(cell)}</td>' for kind, cell in cells)
    lines.append(f'<tr>{values}</tr>')
  return '\n'.join([*lines, '</tbody>', '</table>'])


def _escaped(text: str) -> str:
  return html.escape(text, quote=True)


def column_names(rows: Sequence[Record]) -> list[str]:
  """Keys of all rows, in the order of first appearance."""
  return list(dict.fromkeys(name for row in rows for name in row))


def is_numeric(values: Sequence[Any]) -> bool:
  """True if a column holds at least one number and nothing but numbers."""
  present = [value for value in values if value is not None]
  return bool(present) and all(_is_number(value) for value in present)


def _is_number(value: Any) -> bool:
  is_bool = isinstance(value, (bool, np.bool_))
  return isinstance(value, (int, float, np.number)) and not is_bool


def format_column(values: Sequence[Any]) -> list[str]:
  """Values of one column as text, floats with the same number of decimals.

  Four significant digits, or an exponent where a column's numbers are too small
  or too large for that to line up; integers with separators; booleans as 'yes'
  and '-'; None as '-'.

  Example:
    >>> format_column([0.9812, 0.5, None, float('nan')])
    ['0.9812', '0.5000', '-', 'nan']
    >>> format_column([266200, True, 'w'])
    ['266,200', 'yes', 'w']
  """
  has_floats = any(map(_is_float, values))
  short = [f'{v:.4g}' for v in values if _is_float(v) and math.isfinite(v)]
  scientific = any('e' in text for text in short)
  decimals = max((len(text.partition('.')[2]) for text in short), default=0)

  def text(value: Any) -> str:
    if value is None:
      return '-'
    if isinstance(value, (bool, np.bool_)):
      return 'yes' if value else '-'
    if has_floats and _is_number(value):
      return f'{value:.4g}' if scientific else f'{value:,.{decimals}f}'
    return f'{value:,}' if _is_number(value) else str(value)

  return [text(value) for value in values]


def _is_float(value: Any) -> bool:
  return isinstance(value, (float, np.floating))
