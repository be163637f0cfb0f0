"""The programs of experiments/, called as from a command line."""

import importlib
import json

import pytest

from powerprop_jax.export import export
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.cli import main as cli


def module(name):
  """A program of experiments, as python -m finds it."""
  found = importlib.import_module(f'experiments.{name}')
  if hasattr(found, '__path__'):
    found = importlib.import_module(f'experiments.{name}.__main__')
  return found


def run(program, *args):
  """The exit status of a program, a module with main and settings."""
  presets = getattr(program, 'PRESETS', None) or {'default': program.Config()}
  return arguments.run(
    program.main,
    presets,
    prog=program.__name__.removeprefix('experiments.').partition('.')[0],
    description='',
    args=[str(arg) for arg in args],
  )


def powerprop(*args):
  """The exit status of the command."""
  return cli.main([str(arg) for arg in args])


def finished(program, args, scope='module'):
  """A fixture, shared by a module: the folder of a run that is complete."""

  @pytest.fixture(scope=scope)
  def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('finished') / 'run'
    assert run(program, *args, '--out', out) == 0
    return out

  return folder


def assert_written(folder, names):
  """Asserts that a run has files of its own, and those of every run."""
  always = 'config.json results.json report.html complete.json'
  for name in f'{always} {names}'.split():
    assert (folder / name).stat().st_size > 0, name


def assert_resumes_to_the_same(program, args, out, trained='combinations'):
  """Asserts that a complete run trains nothing again, below a folder."""
  before, found = times(out / trained), results(out)
  assert run(program, *args, '--out', out, '--resume') == 0
  assert times(out / trained) == before
  assert results(out) == found


def assert_reported_again(out):
  """Asserts that `powerprop report` writes the same page from the files."""
  before = contents(out)
  (out / 'report.html').unlink()
  assert powerprop('report', out) == 0
  assert contents(out) == before


def exported(run, path, *args):
  """What `powerprop export` writes of a run."""
  args = ('--format', 'npz', '--out', path, *args)
  assert powerprop('export', run, *args) == 0
  return export.read(path)


def results(out):
  """The records that a run has written into its folder."""
  return json.loads((out / 'results.json').read_text())


def contents(folder):
  """Everything below a folder: bytes of files, None for folders."""
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


def times(folder):
  """When each file of a folder was written."""
  files = (path for path in folder.rglob('*') if path.is_file())
  return {path: path.stat().st_mtime_ns for path in files}


def error(status, capsys):
  """What a call that was refused has printed: one line."""
  assert status == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  return line
