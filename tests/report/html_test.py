import base64
from html import parser
import itertools
import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

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


def _full_page(**kwargs):
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
  return html.render('A run', sections, config=config, **kwargs)


class RenderTest(parameterized.TestCase):
  def test_page_parses_and_loads_nothing(self):
    page = _full_page(subtitle='digits')
    for _, attributes in _Reader(page).tags:
      for name in ('src', 'href', 'action', 'data', 'srcset', 'poster'):
        self.assertRegex(
          attributes.get(name, '#'), r'^(#|data:image/png;base64,)'
        )
    for word in ('http:', 'https:', '<script', '@import', 'url('):
      self.assertNotIn(word, page)

  def test_everything_given_is_escaped(self):
    evil = '<script>"&\'</script>'
    page = html.render(
      evil,
      [
        html.Section(
          evil,
          evil,
          [html.Figure(_PNG, evil, evil)],
          [html.Table([{evil: evil}], evil)],
        ),
        html.Section(evil),
        html.Section('', tables=[html.Table([{'a': evil}] * 100, evil)]),
      ],
      subtitle=evil,
      config={evil: evil},
    )
    self.assertNotIn('<script', page)
    reader = _Reader(page)
    self.assertEqual(reader.all('img')[0]['alt'], evil)
    self.assertGreater(reader.text.count(evil), 10)

  def test_figures_are_embedded_with_their_words(self):
    reader = _Reader(_full_page())
    (image,) = reader.all('img')
    self.assertEqual(image['alt'], 'a "pixel"')
    content = image['src'].removeprefix('data:image/png;base64,')
    self.assertEqual(base64.b64decode(content), _PNG)
    self.assertIn('Caption.', reader.text)

  def test_numbers_are_right_aligned_and_words_are_not(self):
    page = html.render(
      '', [html.Section('', tables=[html.Table([{'n': 1.0, 'leaf': 'w'}])])]
    )
    cells = _Reader(page).all('td')
    self.assertEqual(cells, [{'class': 'number'}, {}])

  def test_tables_show_all_keys_and_dashes_for_what_is_missing(self):
    text = _Reader(_full_page()).text
    start = text.index('Numbers')
    self.assertEqual(
      text[start + 1 : start + 10],
      ['alpha', 'leaf', 'kept weights', '1.0', 'a/w', '-', '1.5', '-', '2,000'],
    )

  def test_config_is_a_flat_table(self):
    text = _Reader(_full_page()).text
    for name, value in (
      ('alpha', '1.0, 2.0'),
      ('data.name', 'digits'),
      ('data.dir', 'not set'),
    ):
      self.assertIn((name, value), list(itertools.pairwise(text)))

  def test_paragraphs_are_separated_by_empty_lines(self):
    self.assertLen(_Reader(_full_page()).all('p'), 2)

  def test_a_long_table_is_folded(self):
    rows = [{'step': step} for step in range(100)]
    page = html.render('', [html.Section('', tables=[html.Table(rows, 'All')])])
    reader = _Reader(page)
    self.assertLen(reader.all('details'), 1)
    self.assertIn('All (100 rows)', reader.text)

  def test_links_lead_to_the_sections(self):
    reader = _Reader(_full_page())
    targets = {attributes['id'] for attributes in reader.all('section')}
    links = {attributes['href'][1:] for attributes in reader.all('a')}
    self.assertEqual(targets, links)

  def test_page_follows_the_colours_of_the_reader(self):
    self.assertIn('prefers-color-scheme: dark', _full_page())

  def test_a_figure_without_words_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'alt'):
      html.Figure(_PNG, ' ')

  def test_a_figure_that_is_no_png_is_refused(self):
    section = html.Section('', figures=[html.Figure(b'GIF89a', 'a picture')])
    with self.assertRaisesRegex(ValueError, 'PNG'):
      html.render('', [section])


class WriteReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def test_report_is_written_with_figures_from_files(self):
    (self.folder / 'a.png').write_bytes(_PNG)
    figure = html.Figure(self.folder / 'a.png', 'α')
    path = html.write_report(
      self.folder / 'report.html',
      title='α',
      sections=[html.Section('', figures=[figure])],
    )
    self.assertLen(_Reader(path.read_text('utf-8')).all('img'), 1)
    self.assertCountEqual(os.listdir(self.folder), ['a.png', 'report.html'])

  def test_a_failure_leaves_the_old_report_alone(self):
    path = self.folder / 'report.html'
    path.write_text('old')
    missing = html.Figure(self.folder / 'missing.png', 'nothing')
    with self.assertRaises(FileNotFoundError):
      html.write_report(
        path, title='', sections=[html.Section('', figures=[missing])]
      )
    self.assertEqual(path.read_text(), 'old')
    self.assertEqual(os.listdir(self.folder), ['report.html'])


if __name__ == '__main__':
  absltest.main()
