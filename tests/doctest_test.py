"""Examples in docstrings, the README and docs give what they say."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import pytest

import powerprop_jax as pp

_MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(pp.__path__, 'powerprop_jax.')
  if not module.name.endswith('__main__')
)
_ROOT = pathlib.Path(pp.__file__).parents[1]
# Each is one program, its blocks in order.
_PAGES = [_ROOT / 'README.md'] + [
  pytest.param(page, marks=pytest.mark.slow)
  for page in sorted(_ROOT.glob('docs/**/*.md'))
  if '```python' in page.read_text()
]
_TYPES = (
  *('Cycle', 'Masks', 'PowerState', 'Rewind', 'Rewiring', 'Select'),
  *('SparseState', 'Topology'),
)
_GLOBALS = {'jax': jax, 'jnp': jnp, 'np': np, 'optax': optax, 'pp': pp}


@pytest.mark.parametrize('name', _MODULES)
def test_examples_of_module(name):
  module = importlib.import_module(name)
  names = _GLOBALS
  if name.startswith('powerprop_jax.continual'):
    names = {**names, 'packed': packing.packed()}
  results = doctest.testmod(
    module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE
  )
  assert results.failed == 0


@pytest.mark.parametrize('name', pp.__all__)
def test_every_public_name_is_documented_with_an_example(name):
  thing = getattr(pp, name)
  if name in _TYPES or inspect.ismodule(thing):
    return
  assert thing.__doc__, f'{name} has no docstring'
  assert '>>>' in thing.__doc__, f'{name} has no example'


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.stem)
@pytest.mark.slow
def test_python_blocks_of_a_page_run_and_print_what_they_state(page):
  blocks = page.read_text().split('```python\n')[1:]
  scope: dict[str, object] = {}
  for block in blocks:
    code = block.split('```')[0]
    printed: dict[int, str] = {}

    def record(*values, printed=printed):
      line = sys._getframe(1).f_lineno
      printed[line] = ' '.join(map(str, values))

    scope['print'] = record
    with jax.numpy_rank_promotion('allow'):  # as for readers
      exec(compile(code, page.name, 'exec'), scope)
    for number, line in enumerate(code.splitlines(), 1):
      call, comment, stated = line.rpartition('  # ')
      if comment and call.startswith('print('):
        assert printed[number] == stated
