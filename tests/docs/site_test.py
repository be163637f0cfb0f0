"""The site builds without a warning, and a browser shows all of it."""

import contextlib
import functools
from html import parser
import http.server
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from urllib import parse

import pytest

pytest.importorskip('myst_nb', reason='needs the extra docs')

_ROOT = pathlib.Path(__file__).parents[2]
_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def _build(folder):
  """Builds a copy of docs/, since generated pages go beside the others."""
  ignored = shutil.ignore_patterns('_build', 'generated', '__pycache__')
  shutil.copytree(_ROOT / 'docs', folder / 'docs', ignore=ignored)
  for page in _ROOT.glob('*.md'):
    shutil.copy(page, folder)
  command = ['-W', '--keep-going', '-q', '-b', 'html', 'docs', 'site']
  run = subprocess.run(
    [sys.executable, '-m', 'sphinx', '-j', '2', *command],
    cwd=folder,
    # As for users, not with the devices and compiler flags of tests.
    env={**os.environ, 'PYTHONPATH': str(_ROOT), 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  return folder / 'site'


class _Page(parser.HTMLParser):
  """What a page links to, and the places that others may link to."""

  def __init__(self, path):
    super().__init__()
    self.links, self.ids = set(), set()
    self.feed(path.read_text(encoding='utf-8'))

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids |= {attrs.get('id')}
    self.links |= {attrs.get('href'), attrs.get('src')} - {None}


def _broken_links(site):
  pages = {path: _Page(path) for path in site.rglob('*.html')}
  broken = []
  for path, page in pages.items():
    for link in page.links:
      url = parse.urlsplit(link)
      if url.scheme or url.netloc:
        continue
      file = parse.unquote(url.path)
      target = (path.parent / file).resolve() if file else path
      ids = pages[target].ids if target in pages else set()
      anchor = parse.unquote(url.fragment)
      if not target.is_file() or (anchor and anchor not in ids):
        broken.append(f'{path.relative_to(site)}: {link}')
  return broken


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@contextlib.contextmanager
def _served(site):
  handler = functools.partial(_Quiet, directory=site)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


_LOOKS = """() => {
  const style = getComputedStyle(document.body);
  const grey = colour => colour.match(/\\d+/g).slice(0, 3).map(Number)
    .reduce((a, b) => a + b) / 3;
  return {
    paper: grey(style.backgroundColor), ink: grey(style.color),
    too_wide: document.documentElement.scrollWidth - innerWidth,
  };
}"""


def _faults(page, name):
  """What is wrong with how an open page looks, in both schemes and widths."""
  for scheme in ('light', 'dark'):
    page.emulate_media(color_scheme=scheme)
    for width in (400, 1280):
      page.set_viewport_size({'width': width, 'height': 900})
      looks = page.evaluate(_LOOKS)
      if looks['too_wide'] > 0:
        yield f'{name}: {looks["too_wide"]} pixels wider than {width}'
      light = looks['paper'] - looks['ink']
      if abs(light) < 100 or (light > 0) != (scheme == 'light'):
        yield f'{name}: {looks} in {scheme}'


@pytest.mark.slow
def test_the_site_builds_and_a_browser_shows_it(tmp_path):
  site = _build(tmp_path)
  assert _broken_links(site) == []

  sync_api = pytest.importorskip('playwright.sync_api')
  browser_path = next(filter(None, map(shutil.which, _BROWSERS)), None)
  if browser_path is None:
    pytest.skip(f'built and linked, but there is no browser: {_BROWSERS}')
  names = sorted(str(path.relative_to(site)) for path in site.rglob('*.html'))
  generated = [name for name in names if name.startswith('api/generated/')]
  names = [name for name in names if name not in generated] + generated[::20]
  faults = []
  with _served(site) as url, sync_api.sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=browser_path, args=['--no-sandbox']
    )
    page = browser.new_page()
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on(
      'console',
      lambda said: faults.append(said.text) if said.type == 'error' else None,
    )
    page.on(
      'request',
      lambda request: (
        faults.append(f'not offline: {request.url}')
        if not request.url.startswith((url, 'data:'))
        else None
      ),
    )
    for name in names:
      page.goto(url + name)
      faults.extend(_faults(page, name))

    page.goto(f'{url}start/all_of_it.html')
    assert page.locator('math').count() > 0  # formulas, without a script
    page.goto(f'{url}tutorials/prune_in_one_shot.html')
    assert page.locator('.cell_output :is(img, svg)').count() > 1
    page.goto(f'{url}search.html?q=rigl')
    page.wait_for_selector('#search-results li a')
    found = page.locator('#search-results li a')
    targets = found.evaluate_all('all => all.map(a => a.getAttribute("href"))')
    assert any('powerprop_jax.rigl.html' in target for target in targets)
    browser.close()
  assert not faults, '\n'.join(faults)
