"""One page for a run: text, figures and tables in a file that opens offline.

Nothing on the page is loaded from anywhere else: images are embedded, styles
are inline, there is no script. Whatever text is passed in is escaped.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import os
import pathlib
from typing import Any

from powerprop_jax.files import tables, whole
from powerprop_jax.files.tables import Record, Row

# Longer tables are folded away behind their caption.
_MAX_OPEN_ROWS = 40

_PNG = b'\x89PNG\r\n\x1a\n'


@dataclasses.dataclass(frozen=True)
class Figure:
  """A PNG, as its path or its content, with what it shows in words."""

  image: str | os.PathLike[str] | bytes
  alt: str
  caption: str = ''

  def __post_init__(self) -> None:
    if not self.alt.strip():
      raise ValueError('alt must say in words what the figure shows, got none.')


@dataclasses.dataclass(frozen=True)
class Table:
  """Flat dicts of numbers, words, booleans and None, with a line above."""

  rows: Sequence[Record]
  caption: str = ''


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, paragraphs separated by empty lines, figures, then tables."""

  title: str
  text: str = ''
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()


def write_report(
  path: str | os.PathLike[str],
  *,
  title: str,
  sections: Sequence[Section],
  subtitle: str = '',
  made: Record | None = None,
  config: Record | None = None,
) -> pathlib.Path:
  """Writes a page that needs nothing but itself, in one step.

  How it was made, name by name, and the settings in config, which may be
  nested, are its last sections.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> path = write_report(folder / 'report.html', title='A run',
    ...                     sections=[Section('Result', 'It works.')])
    >>> '<p>It works.</p>' in path.read_text(encoding='utf-8')
    True
  """
  sections = list(sections)
  for title_of, heading, values in (
    ('How this was made', 'what', made),
    ('Settings', 'setting', config),
  ):
    if values is not None:
      rows = [
        {heading: name, 'value': _setting(value)}
        for name, value in flatten(values).items()
      ]
      sections.append(Section(title_of, tables=[Table(rows)]))
  parts = [f'<header><h1>{_text(title)}</h1>']
  if subtitle:
    parts.append(f'<p class="subtitle">{_text(subtitle)}</p>')
  if len(sections) > 2:
    parts.append(_contents(sections))
  parts.append('</header>\n<main>')
  parts += [_section(index, part) for index, part in enumerate(sections)]
  parts.append('</main>')
  body = '\n'.join(parts)
  page = _PAGE.format(title=_text(title), style=_STYLE, body=body)
  return whole.write_bytes(path, page.encode('utf-8'))


def flatten(config: Record, prefix: str = '') -> Row:
  """Nested settings as one level, names joined by dots.

  Example:
    >>> flatten({'alpha': 2.0, 'data': {'name': 'digits'}})
    {'alpha': 2.0, 'data.name': 'digits'}
  """
  flat: Row = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[f'{prefix}{name}'] = value
  return flat


def _setting(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return ', '.join(map(str, value)) or '(none)'
  return 'not set' if value is None else str(value)


def _contents(sections: Sequence[Section]) -> str:
  links = ' '.join(
    f'<a href="#section-{index}">{_text(section.title)}</a>'
    for index, section in enumerate(sections)
  )
  return f'<nav>{links}</nav>'


def _section(index: int, section: Section) -> str:
  paragraphs = [
    f'<p>{_text(paragraph)}</p>'
    for paragraph in section.text.split('\n\n')
    if paragraph.strip()
  ]
  return '\n'.join(
    [
      f'<section id="section-{index}">',
      f'<h2>{_text(section.title)}</h2>',
      *paragraphs,
      *map(_figure, section.figures),
      *map(_table, section.tables),
      '</section>',
    ]
  )


def _figure(figure: Figure) -> str:
  image = figure.image
  data = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
  if not data.startswith(_PNG):
    name = 'the given bytes' if isinstance(image, bytes) else str(image)
    raise ValueError(
      f'a figure must be a PNG image, {name} is not. Write it with '
      'report.plotting.save.'
    )
  source = f'data:image/png;base64,{base64.b64encode(data).decode("ascii")}'
  caption = ''
  if figure.caption:
    caption = f'<figcaption>{_text(figure.caption)}</figcaption>'
  alt = html.escape(figure.alt, quote=True)
  return f'<figure><img src="{source}" alt="{alt}">{caption}</figure>'


def _table(table: Table) -> str:
  folded = len(table.rows) > _MAX_OPEN_ROWS
  text = tables.html_table(table.rows, '' if folded else table.caption)
  body = f'<div class="wide">{text}</div>'
  if not folded:
    return body
  label = f'{table.caption or "Table"} ({len(table.rows):,} rows)'
  return f'<details><summary>{_text(label)}</summary>{body}</details>'


def _text(text: str) -> str:
  return html.escape(str(text), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root {
  --text: #1f2430; --quiet: #5b6472; --line: #e2e5ea; --page: #ffffff;
  --raised: #f6f7f9; --link: #1d4ed8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e8ec; --quiet: #a0a8b5; --line: #333a45; --page: #14171c;
    --raised: #1d2128; --link: #8ab4ff;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem;
  background: var(--page); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
}
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 {
  margin: 3rem 0 .75rem; padding-bottom: .3rem; font-size: 1.3rem;
  border-bottom: 1px solid var(--line);
}
p { margin: .75rem 0; max-width: 44rem; overflow-wrap: break-word; }
.subtitle { margin: 0; color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
figure { margin: 1.5rem 0; }
img {
  display: block; max-width: 100%; height: auto; padding: .5rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
}
figcaption, caption { color: var(--quiet); font-size: .9rem; }
figcaption { margin-top: .5rem; max-width: 44rem; }
caption { padding-bottom: .5rem; text-align: left; }
.wide { margin: 1.5rem 0; overflow-x: auto; }
table {
  border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums;
}
th, td {
  padding: .35rem .9rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
td:last-child:not(.number) { white-space: normal; min-width: 12rem; }
th { color: var(--quiet); font-weight: 600; background: var(--raised); }
tbody tr:hover { background: var(--raised); }
.number { text-align: right; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .3rem .55rem; }
}
@media print {
  nav { display: none; }
  section { break-inside: avoid; }
}
"""
