"""Figures and report.html of a run, from nothing but the files in its folder.

It needs neither the data nor the checkpoints: config.json says what the page
shows, metrics.jsonl and results.json hold the numbers. Figures that need the
weights were drawn by the run while it had them, and are shown as they are.
"""

import collections
from collections.abc import Sequence
import pathlib
from typing import Any

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.report import html, plotting, records
from powerprop_jax.train.runs import contents, folder, metrics
from powerprop_jax.train.runs.contents import Figure, Records, Section
from powerprop_jax.train.runs.errors import UserError


def write(path: str | pathlib.Path) -> pathlib.Path:
  """Draws the figures of a run, complete or not, and writes its report.html.

  Both are replaced, nothing else.

  Raises:
    UserError: if the folder holds no run, or one that says nothing of a report,
      or a file of the run cannot be read. Nothing is written then.
  """
  path = pathlib.Path(path).expanduser()
  stored = folder.read_config(path)
  page = contents.read(path, stored).page
  if page is None:
    raise UserError(
      f'{path} holds a run of {stored["program"]}, which writes its report '
      f'itself. Run it again with --resume: {stored["command"]}'
    )
  sections: list[html.Section] = []
  if not (path / 'results.json').exists():
    text = 'None yet: the run was stopped before its end.'
    sections.append(html.Section('Results', text))
  drawn: dict[str, Any] = {}
  shown = [(part, *_filled(path, part, drawn)) for part in page.sections]
  for name, figure in drawn.items():
    plotting.save(figure, path / name)
  sections += [
    html.Section(
      part.title,
      part.text,
      [html.Figure(path / f'{f.name}.png', f.alt) for f in figures],
      tables,
    )
    for part, figures, tables in shown
    if figures or tables
  ]
  return write_page(path, page.title, page.subtitle, sections)


def write_page(
  path: pathlib.Path,
  title: str,
  subtitle: str,
  sections: Sequence[html.Section],
) -> pathlib.Path:
  """The report.html of a run, for one that draws its sections itself.

  It adds the date, how the run was made, and its settings.
  """
  stored = folder.read_config(path)
  devices = collections.Counter[str](stored.get('devices', []))
  return html.write_report(
    path / 'report.html',
    title=title,
    subtitle=', '.join(filter(None, [subtitle, stored['date']])),
    sections=sections,
    made={
      'command': stored['command'],
      'date': stored['date'],
      'devices': ', '.join(f'{n} × {kind}' for kind, n in devices.items()),
      **stored.get('versions', {}),
    },
    config=stored['config'],
  )


def _filled(
  path: pathlib.Path, part: Section, drawn: dict[str, Any]
) -> tuple[list[Figure], list[html.Table]]:
  """What of a section can be shown; adds its figures to those drawn."""
  figures = []
  for figure in part.figures:
    if figure.draw and (found := _read(path, figure.records)):
      drawn[figure.name] = _draw(path, figure, found)
    if figure.name in drawn or (path / f'{figure.name}.png').exists():
      figures.append(figure)
  tables = []
  for table in part.tables:
    if found := _read(path, table.records):
      pivot = table.pivot
      rows = (
        _of_interest(found) if pivot is None else records.pivot(found, **pivot)
      )
      tables.append(html.Table(rows, table.caption))
  return figures, tables


def _of_interest(rows: list[Row]) -> list[Row]:
  """Rows without columns that only say that a network is dense."""
  if any('sparsity' not in row or row['sparsity'] for row in rows):
    return rows
  left_out = ('sparsity', 'density', 'kept')
  return [
    {name: value for name, value in row.items() if name not in left_out}
    for row in rows
  ]


def _draw(path: pathlib.Path, figure: Figure, found: list[Row]) -> Any:
  try:
    if figure.draw not in plotting.__all__:
      raise ValueError(f'there is no {figure.draw!r} in report.plotting')
    return getattr(plotting, figure.draw)(found, **figure.options)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'cannot draw {figure.name} of {path}: {error}') from error


def _read(path: pathlib.Path, which: Records) -> list[Row]:
  """Records of a run; none for one that was stopped before."""
  found = []
  for file in sorted(path.glob(which.files)):
    if file.suffix == '.jsonl':
      rows = metrics.read_metrics(file)
    else:
      rows = json_files.read_json(file)
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
      raise UserError(
        f'{file} is not a list of records. Run the program again with --resume '
        'to write it anew.'
      )
    added = {}
    if which.settings:
      settings = folder.read_config(file.parent)['config']
      added = {name: settings.get(of) for name, of in which.settings.items()}
    found += [{**row, **added} for row in rows]
  return [
    row
    for row in found
    if all(name in row for name in which.having)
    and all(row.get(name) == value for name, value in which.where.items())
  ]
