"""What the first pages tell a newcomer to type."""

import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

_START = pathlib.Path(__file__).parents[2] / 'docs/start'


def test_variants_of_jax_are_extras_that_it_has():
  text = (_START / 'install.md').read_text()
  known = importlib.metadata.metadata('jax').get_all('Provides-Extra')
  assert (named := set(re.findall(r'jax\[([\w-]+)\]', text)))
  assert named <= set(known)


def test_every_extra_is_explained():
  text = (_START / 'install.md').read_text()
  project = tomllib.loads((_START.parents[1] / 'pyproject.toml').read_text())
  for extra in project['project']['optional-dependencies']:
    assert f'`{extra}`' in text


@pytest.mark.slow
def test_commands_lead_to_a_sparse_network_in_one_file(tmp_path):
  text = (_START / 'first_steps.md').read_text()
  commands = re.findall(r'^powerprop (.*)$', text, re.MULTILINE)
  assert len(commands) == 3
  for command in commands:
    args = [sys.executable, '-m', 'powerprop_jax.train', *shlex.split(command)]
    subprocess.run(args, cwd=tmp_path, check=True, capture_output=True)
  assert (tmp_path / 'runs/first.safetensors').stat().st_size < 100_000
