import base64
from html import parser
import itertools
import os
import tempfile

import pytest

from powerprop_jax.report import html

# The smallest PNG: one transparent pixel.
_PNG = base64.b64decode(
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA'
  '60e6kgAAAABJRU5ErkJggg=='
)
_VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}


class _Reader(parser.HTMLParser):
  """Checks that tags nest, and collects attributes and text."""

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.text = [], [], []
    self.feed(page)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    if data.strip():
      self.text.append(data.strip())

  def all(self, tag):
    return [attributes for found, attributes in self.tags if found == tag]


def _written(title, sections, **options):
  with tempfile.NamedTemporaryFile(suffix='.html') as file:
    options |= {'title': title, 'sections': sections}
    return html.write_report(file.name, **options).read_text('utf-8')


@pytest.fixture(scope='module')
def page():
  rows = [{'alpha': 1.0, 'leaf': 'a/w'}, {'alpha': 1.5, 'kept_weights': 2000}]
  sections = [
    html.Section(
      'Result',
      'First & foremost.\n\nSecond <b>paragraph</b>.',
      [html.Figure(_PNG, 'a "pixel"', 'Caption.')],
      [html.Table(rows, 'Numbers')],
    ),
    html.Section('Empty'),
  ]
  config = {'alpha': [1.0, 2.0], 'data': {'name': 'digits', 'dir': None}}
  return _written('A run', sections, config=config)


def _table(rows, caption=''):
  section = html.Section('', tables=[html.Table(rows, caption)])
  return _Reader(_written('', [section]))


def test_page_parses_loads_nothing_and_follows_the_colours_of_the_reader(page):
  for _, attributes in _Reader(page).tags:
    for name in ('src', 'href', 'action', 'data', 'srcset', 'poster'):
      loaded = attributes.get(name, '#')
      assert loaded.startswith(('#', 'data:image/png;base64,'))
  for word in ('http:', 'https:', '<script', '@import', 'url('):
    assert word not in page
  assert 'prefers-color-scheme: dark' in page


def test_everything_given_is_escaped():
  evil = '<script>"&\'</script>'
  figure = html.Figure(_PNG, evil, evil)
  tables = [html.Table([{evil: evil}] * size, evil) for size in (1, 100)]
  sections = [html.Section(evil, evil, [figure], tables), html.Section(evil)]
  page = _written(evil, sections, subtitle=evil, config={evil: evil})
  assert '<script' not in page
  reader = _Reader(page)
  assert reader.all('img')[0]['alt'] == evil
  assert reader.text.count(evil) > 10


def test_figures_and_paragraphs(page):
  reader = _Reader(page)
  (image,) = reader.all('img')
  content = base64.b64encode(_PNG).decode()
  expected = {'alt': 'a "pixel"', 'src': f'data:image/png;base64,{content}'}
  assert image == expected
  assert 'Caption.' in reader.text
  assert len(reader.all('p')) == 2


def test_tables_show_all_keys_and_dashes_for_what_is_missing(page):
  text = _Reader(page).text
  start = text.index('Numbers')
  assert text[start + 1 : start + 10] == [
    *('alpha', 'leaf', 'kept weights'),
    *('1.0', 'a/w', '-', '1.5', '-', '2,000'),
  ]
  cells = _table([{'n': 1.0, 'leaf': 'w'}]).all('td')
  assert cells == [{'class': 'number'}, {}]


def test_a_long_table_is_folded():
  reader = _table([{'step': step} for step in range(100)], 'All')
  assert len(reader.all('details')) == 1
  assert 'All (100 rows)' in reader.text


def test_config_is_a_flat_table_and_links_lead_to_the_sections(page):
  reader = _Reader(page)
  expected = {'alpha': '1.0, 2.0', 'data.name': 'digits', 'data.dir': 'not set'}
  assert set(expected.items()) <= set(itertools.pairwise(reader.text))
  targets = {attributes['id'] for attributes in reader.all('section')}
  assert targets == {link['href'][1:] for link in reader.all('a')}


def test_figures_without_words_or_that_are_no_png_are_refused():
  with pytest.raises(ValueError, match='alt'):
    html.Figure(_PNG, ' ')
  section = html.Section('', figures=[html.Figure(b'GIF89a', 'a picture')])
  with pytest.raises(ValueError, match='PNG'):
    _written('', [section])


def test_report_is_written_in_one_step_with_figures_from_files(tmp_path):
  (tmp_path / 'a.png').write_bytes(_PNG)
  write = lambda name: html.write_report(
    tmp_path / 'report.html',
    title='α',
    sections=[html.Section('', figures=[html.Figure(tmp_path / name, 'α')])],
  )
  path = write('a.png')
  before = path.read_text('utf-8')
  assert len(_Reader(before).all('img')) == 1
  with pytest.raises(FileNotFoundError):
    write('missing.png')
  assert path.read_text('utf-8') == before
  assert sorted(os.listdir(tmp_path)) == ['a.png', 'report.html']
