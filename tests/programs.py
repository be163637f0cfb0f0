"""The programs of experiments/, called as from a command line."""

import json

from powerprop_jax.files import json_files
from powerprop_jax.train.cli import arguments


def run(program, *args, static_alpha=False):
  """The exit status of a program, a module with main and PRESETS."""
  return arguments.run(
    program.main,
    program.PRESETS,
    prog=program.__name__.rpartition('.')[2],
    description='',
    args=[str(arg) for arg in args],
    static_alpha=static_alpha,
  )


def results(out):
  """The records that a run has written into its folder."""
  return json.loads((out / 'results.json').read_text())


def contents(folder):
  """What is in each file of a folder."""
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def times(folder):
  """When each file of a folder was written."""
  files = (path for path in folder.rglob('*') if path.is_file())
  return {path: path.stat().st_mtime_ns for path in files}


def error(status, capsys):
  """What a call that was refused has printed: one line."""
  assert status == 2
  printed = capsys.readouterr().err
  assert printed.startswith('error: ')
  assert printed.count('\n') == 1
  return printed


def refuses(run, args, named, out, capsys):
  """Asserts that a program refuses args in one line, before it writes."""
  assert named in error(run(*args.split(), '--out', out), capsys)
  assert not out.exists()


def survives_its_record(config):
  """Whether settings are the same when they are read from a JSON file."""
  stored = json.loads(json.dumps(json_files.to_json(config)))
  return json_files.from_json(type(config), stored) == config
