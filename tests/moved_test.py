"""What moved since 0.1.0 is found, and says where it is now."""

import importlib
import operator
import subprocess
import sys

import pytest

import powerprop_jax as pp
from powerprop_jax import _moved


def test_the_top_holds_what_people_use():
  assert len(pp.__all__) <= 64
  assert not set(pp.__all__) & set(_moved._ROOMS)


@pytest.mark.parametrize('name', _moved._ROOMS)
def test_names_that_moved_say_where_they_are(name):
  with pytest.warns(DeprecationWarning) as warned:
    found = getattr(pp, name)
  (message,) = {str(warning.message) for warning in warned}
  old, _, new = message.removesuffix('.').partition(' is now ')
  assert old == f'pp.{name}'
  assert warned[0].filename == __file__
  assert found is operator.attrgetter(new.partition('.')[2])(pp)


@pytest.mark.parametrize('name', _moved._MODULES)
def test_modules_that_moved_are_the_new_ones(name):
  old = f'powerprop_jax.{name}'
  sys.modules.pop(old, None)
  with pytest.warns(DeprecationWarning, match=f'{old} is now powerprop_jax'):
    found = importlib.import_module(old)
  assert found.__name__ == f'powerprop_jax.{_moved._MODULES[name]}'
  assert found is sys.modules[found.__name__]


def test_a_program_that_moved_runs():
  done = subprocess.run(
    [sys.executable, '-m', 'powerprop_jax.train.distributed', '--help'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert '--count' in done.stdout


def test_what_never_was_is_no_attribute():
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    pp.nothing  # noqa: B018
