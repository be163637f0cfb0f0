"""What the Markdown pages refer to exists."""

import functools
import pathlib
import pkgutil
import re

import layers_test
import pytest

import powerprop_jax as pp

_ROOT = pathlib.Path(pp.__file__).parents[1]
_PAGES = sorted(
  [*_ROOT.glob('*.md'), *_ROOT.glob('docs/**/*.md')]
  + [*_ROOT.glob('experiments/**/*.md')]
)
_CODE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)
_NAME = re.compile(r'\b(?:powerprop_jax|experiments)(?:\.\w+)+')
_FILE = re.compile(
  r'\b(?:powerprop_jax|experiments|tests|docs)/(?!_build/)[\w./]*\w'
)

pages = pytest.mark.parametrize(
  'page', _PAGES, ids=lambda page: str(page.relative_to(_ROOT))
)


@functools.cache
def _anchors(page):
  """Names of the headings of a page, as GitHub makes them."""
  text = _CODE.sub('', page.read_text()).lower()
  headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', h).replace(' ', '-') for h in headings}


@pages
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)]+)\)', _CODE.sub('', page.read_text())):
    if '://' in link:
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert not anchor or anchor in _anchors(target), link


@pages
def test_names_of_the_library_exist(page):
  # Changes may be of names that have moved since.
  if page.name == 'CHANGELOG.md':
    return
  text = page.read_text()
  for name in set(re.findall(r'\bpp((?:\.[A-Za-z]\w*)+)', text)):
    functools.reduce(getattr, name[1:].split('.'), pp)
  for name in set(_NAME.findall(text)):
    pkgutil.resolve_name(name)
  for path in set(_FILE.findall(text)):
    assert (_ROOT / path).exists(), path


def test_the_map_of_the_rooms_has_the_arrows_that_are_enforced():
  text = (_ROOT / 'CONTRIBUTING.md').read_text()
  rows = re.findall(r'^\| `(\w+)/` \|.*\| ([^|]*) \|$', text, re.MULTILINE)
  found = {room: set(re.findall(r'`(\w+)`', others)) for room, others in rows}
  assert found.pop('train') == set()  # all of them
  expected = dict(layers_test._ALLOWED)
  assert expected.pop('train') == set(expected)
  assert found == expected
