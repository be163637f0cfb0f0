"""The folder of one run: what was asked, what came out, and who may write here.

Every program takes --out DIR and owns that folder for one configuration:

    config.json      the settings, versions, date and command line
    metrics.jsonl    one line per measurement while training
    checkpoints/     the latest states, to continue from
    results.json     flat records, one per measured point
    *.png            figures, each as *.pdf and *.svg too
    report.html      all of it on one page
    complete.json    written last; its absence means that the run was stopped

A folder that holds anything else, or another configuration, is refused; nothing
that was not written by the same run is ever replaced.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
from importlib import metadata
import os
import pathlib
import platform
import shlex
import sys
import traceback
from typing import Any, TypeVar

import jax

from powerprop_jax.core.trees import Tree
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Record, Row
from powerprop_jax.train.runs import divergence
from powerprop_jax.train.runs.contents import Contents
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import preemption

_FORMAT = 'powerprop_jax run, version 1'
_PACKAGES = ('powerprop_jax', 'jax', 'dm-haiku', 'optax', 'numpy')
# What config.json must hold at least.
_FIELDS = {'program': str, 'config': dict, 'date': str, 'command': str}
C = TypeVar('C')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Where a run is kept and logged, which is no part of what it is."""

  # Folder for the results; made if missing.
  out: str = ''
  # Continue the interrupted run in that folder.
  resume: bool = False
  # Write TensorBoard files too (needs the extra 'tensorboard').
  tensorboard: bool = False
  # Log to Weights & Biases too (needs the extra 'wandb').
  wandb: bool = False


_NOT_SETTINGS = {field.name for field in dataclasses.fields(RunConfig)}


class RunFolder:
  """The folder of one run, opened for writing.

  Attributes:
    path: the folder.
    is_resumed: whether it already held this run.
  """

  def __init__(
    self,
    out: str | pathlib.Path,
    config: Any,
    *,
    program: str,
    resume: bool = False,
    is_part: bool = False,
    contents: Contents | None = None,
    may_differ: Collection[str] = (),
    hints: Mapping[str, str] = {},
  ):
    """Creates the folder, or opens the one of an interrupted run.

    A missing or empty folder becomes a new run, with or without resume, which
    is said if it was to be resumed. All checks come before the first write.

    Args:
      config: the settings, a dataclass; what RunConfig has of them is left out
        of the record and of the comparison.
      program: its name, e.g. 'train'; another cannot continue the run.
      is_part: the folder is of a part of a run that may not have come to it, so
        that there is nothing to say.
      contents: what `powerprop export`, `report` and their like need to know of
        the run.
      may_differ: names of settings that may be others than before, such as
        'loop.num_steps' of a run that is to go on beyond its end. The run is
        then not complete any more, and config.json says when it changed.
      hints: what else can be done where a setting differs, by its name.

    Raises:
      UserError: if the folder holds something else, holds a run and resume is
        False, holds a run of other settings, or cannot be written.
    """
    self.path = pathlib.Path(out).expanduser()
    settings = _settings(config)
    try:
      self.is_resumed = _holds_run(self.path)
      if self.is_resumed:
        stored = read_config(self.path)
        if not resume:
          raise UserError(
            f'{self.path} already holds a run of {stored["program"]}; pass '
            '--resume to continue it, or choose another --out.'
          )
        changes = self._changes(stored, program, config, may_differ, hints)
        if changes:
          (self.path / 'complete.json').unlink(missing_ok=True)
          earlier = stored.get('changes', [])
          stored |= {'config': settings, 'contents': contents or Contents()}
          change = {'date': _now(), 'command': _command()}
          stored['changes'] = [*earlier, change | {'settings': changes}]
          self.write_json('config.json', stored)
      else:
        self.path.mkdir(parents=True, exist_ok=True)
        stored = _describe(program, settings)
      # A run of version 0.1.0 lacks them too.
      if 'contents' not in stored:
        stored['contents'] = contents or Contents()
        self.write_json('config.json', stored)
    except OSError as error:
      raise UserError(
        f'cannot use {self.path} as the output folder: {error}. Choose another '
        '--out.'
      ) from error
    if resume and not self.is_resumed and not is_part:
      # Not on the standard output, which is for what the program finds.
      print(
        f'note: {self.path} holds no run to resume; this one starts anew.',
        file=sys.stderr,
      )

  def _changes(
    self,
    stored: Row,
    program: str,
    config: Any,
    may_differ: Collection[str],
    hints: Mapping[str, str],
  ) -> list[str]:
    """Settings that differ from those of the run, of those that may."""
    if stored['program'] != program:
      raise UserError(
        f'{self.path} holds a run of {stored["program"]}, not of {program}; '
        'choose another --out.'
      )
    old = _settings(stored['config'])
    if dataclasses.is_dataclass(config):
      with contextlib.suppress(ValueError):
        # Settings that there were not yet have the values that change nothing.
        old = _settings(json_files.from_json(type(config), stored['config']))
    changes = list(differences(old, _settings(config)))
    refused = {c.partition(':')[0]: c for c in changes}
    refused = {n: c for n, c in refused.items() if n not in may_differ}
    if refused:
      what_else = ''.join(f' {h}' for n, h in hints.items() if n in refused)
      raise UserError(
        f'cannot resume {self.path} with other settings: '
        f'{"; ".join(refused.values())}. Use the old settings, or choose '
        f'another --out.{what_else}'
      )
    return changes

  @property
  def metrics_path(self) -> pathlib.Path:
    """The file for metrics.MetricsWriter."""
    return self.path / 'metrics.jsonl'

  @property
  def checkpoints_path(self) -> pathlib.Path:
    """The folder for checkpoint.Checkpoints."""
    return self.path / 'checkpoints'

  def write_json(self, name: str, value: Any) -> pathlib.Path:
    """Writes a JSON file of this run, replacing its earlier version."""
    return json_files.write_json(self.path / name, value)

  def read_json(self, name: str) -> Any:
    """Reads a JSON file of this run."""
    return json_files.read_json(self.path / name)

  def write_results(self, records: Sequence[Record]) -> pathlib.Path:
    """Writes results.json, one flat record for each measured point."""
    flat = [json_files.to_json(record) for record in records]
    for record in flat:
      for name, value in record.items():
        if isinstance(value, (dict, list)):
          raise ValueError(
            f'results are flat records, but {name!r} is {value!r}. Write one '
            'record for each measured point.'
          )
    return self.write_json('results.json', flat)

  @property
  def is_complete(self) -> bool:
    """Whether the run got to its end."""
    return (self.path / 'complete.json').exists()

  def mark_complete(self) -> None:
    """Records that nothing is left to do; call it last."""
    self.write_json('complete.json', {'date': _now()})


def read_config(out: str | pathlib.Path) -> Row:
  """What config.json of a run says: 'program', 'config', 'date' and so on.

  Raises:
    UserError: if there is no such file, or it was not written by RunFolder.
  """
  path = pathlib.Path(out).expanduser() / 'config.json'
  if not path.exists():
    raise UserError(f'{path.parent} holds no run: {path} does not exist.')
  return _read(path)


def read_settings(kind: type[C], path: str | pathlib.Path, program: str) -> C:
  """The settings that a run of a program was given, to start another with.

  Args:
    kind: their dataclass. What is not recorded, where the run was kept and that
      it was continued, has its default.
    path: config.json, or a copy of it, or the folder of a run.

  Raises:
    UserError: if it is none, of another program or of another version, whose
      settings may mean something else; or if a setting is unknown.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    path = path / 'config.json'
  stored = _read(path)
  if stored['program'] != program:
    raise UserError(
      f'{path} holds the settings of {stored["program"]}, not of {program}.'
    )
  theirs = _record(stored.get('versions')).get('powerprop_jax')
  ours = _version('powerprop_jax')
  if theirs != ours:
    raise UserError(
      f'{path} was written by version {theirs} of powerprop_jax, and this is '
      f'{ours}, where a setting may mean something else. Give them as options; '
      f'the command was: {stored["command"]}'
    )
  return settings_of(kind, stored, path)


def settings_of(kind: type[C], stored: Row, path: str | pathlib.Path) -> C:
  """The settings in what read_config gave, as their dataclass."""
  try:
    return json_files.from_json(kind, stored['config'])
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error


def _record(value: Any) -> Row:
  return value if isinstance(value, dict) else {}


def _read(path: pathlib.Path) -> Row:
  stored = json_files.read_json(path)
  if (found := _record(stored).get('format')) != _FORMAT:
    raise UserError(
      f'{path} was not written by this version of powerprop_jax: its '
      f"'format' is {found!r}, not {_FORMAT!r}. Choose another folder or file."
    )
  for name, kind in _FIELDS.items():
    if not isinstance(stored.get(name), kind):
      raise UserError(
        f'{path} is not as it was written: {name!r} is missing or spoilt. '
        'Bring it back from a copy, or choose another folder.'
      )
  return stored


def _holds_run(path: pathlib.Path) -> bool:
  """Whether a folder holds a run; False for a missing or an empty one."""
  if path.exists() and not path.is_dir():
    raise UserError(f'{path} is a file, not a folder. Choose another --out.')
  if not path.exists():
    return False
  if (path / 'config.json').exists():
    return True
  # A run killed while it wrote its very first file leaves an unfinished one.
  names = sorted(
    entry.name
    for entry in path.iterdir()
    if not entry.name.startswith('.config.json.')
  )
  if names:
    raise UserError(
      f'{path} is not empty and holds no run (it has {", ".join(names[:3])}'
      f'{", …" if len(names) > 3 else ""}). Choose another --out.'
    )
  return False


def _settings(config: Any) -> Row:
  settings = json_files.to_json(config)
  return {k: v for k, v in settings.items() if k not in _NOT_SETTINGS}


def _describe(program: str, settings: Row) -> Row:
  return {
    'format': _FORMAT,
    'program': program,
    'config': settings,
    'date': _now(),
    'command': _command(),
    'versions': {
      'python': platform.python_version(),
      **{name: _version(name) for name in _PACKAGES},
    },
    'devices': [device.device_kind for device in jax.devices()],
  }


def _command() -> str:
  """The command line of this process, as one would type it."""
  spec = getattr(sys.modules.get('__main__'), '__spec__', None)
  if spec is None:
    program = [pathlib.Path(sys.argv[0]).name]
  else:
    program = ['python', '-m', spec.name.removesuffix('.__main__')]
  return shlex.join([*program, *sys.argv[1:]])


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def differences(old: Tree, new: Tree, name: str = '') -> Iterator[str]:
  """Every setting that differs, as 'name: old → new'."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in [*old, *(key for key in new if key not in old)]:
      path = f'{name}.{key}' if name else key
      missing = 'not set'
      yield from differences(old.get(key, missing), new.get(key, missing), path)
  elif old != new:
    yield f'{name}: {old!r} → {new!r}'


def run_main(main: Callable[..., None], *args: Any) -> int:
  """Runs a program and turns a user's mistake into one line.

  A ValueError raised by this library or by the program is the user's mistake:
  its message goes to the standard error, without a traceback. One that comes
  out of another library is a defect and keeps its traceback. A file that cannot
  be read or written, whoever tried, is named in one line too.

  Returns:
    The exit status: 0; 2 after a mistake; 130 after an interruption (Ctrl-C);
    75 after a signal on which the run saved and stopped, for the scheduler to
    start it again; 1 if all networks of the run diverged, or whoever reads the
    output went away.

  Example:
    >>> run_main(print, 'trained')
    trained
    0
  """
  try:
    try:
      main(*args)
    finally:
      sys.stdout.flush()
  except KeyboardInterrupt:
    message = 'interrupted; run the same command with --resume to continue.'
    print(message, file=sys.stderr)
    return 130
  except preemption.Preempted as stop:
    print(stop, file=sys.stderr)
    return preemption.EXIT_STATUS
  except divergence.Diverged as stop:
    print(stop, file=sys.stderr)
    return divergence.EXIT_STATUS
  except BrokenPipeError:
    # Whoever read the output has seen enough, as in `program --help | head`.
    # What is still buffered must not raise once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except ValueError as error:
    ours = ('powerprop_jax', _package(main))
    if not isinstance(error, UserError) and _raised_in(error) not in ours:
      raise
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  except OSError as error:
    if error.filename is None:
      raise
    # Of two names the second is where a finished file was to go.
    name = error.filename2 or error.filename
    print(f'error: cannot use {name}: {error.strerror}.', file=sys.stderr)
    return 2
  return 0


def _package(function: Callable[..., None]) -> str:
  """The package of a program, also where it runs as python -m package."""
  spec = getattr(sys.modules.get(function.__module__), '__spec__', None)
  return (spec.name if spec else function.__module__).partition('.')[0]


def _raised_in(error: Exception) -> str:
  """The package of the innermost frame of an error."""
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  spec = frame.f_globals.get('__spec__')
  name = spec.name if spec else frame.f_globals.get('__name__', '')
  return str(name).partition('.')[0]
