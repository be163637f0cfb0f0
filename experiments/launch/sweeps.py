r"""A sweep: one program, run for every combination of some settings.

A sweep is a JSON file with the fields of Sweep:

    {
      "program": "experiments.imagenet_resnet50",
      "out": "runs/imagenet_90",
      "args": ["--net.half", "bfloat16"],
      "vary": {
        "preset": ["rigl_90_erk", "rigl_90_erk_powerprop"],
        "key": [0, 1, 2]
      }
    }

    load: file ─▶ read ─▶ Sweep ─▶ runs ─▶ a Run for each combination

The program is one whose runs are folders (train/runs/folder.py), so that
--resume continues them, and that ends with status 75 when it was asked to make
room and can be continued (train/scale/preemption.py).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import shlex
import sys
from typing import Annotated, Any, NamedTuple

import tyro

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs.errors import UserError

# How the program is told which sweep.
SweepFile = Annotated[
  str, tyro.conf.Positional, tyro.conf.arg(metavar='SWEEP.json')
]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What to run.

  Attributes:
    program: the module, as after python -m.
    out: the folder that has the folders of all runs.
    vary: from an option, without its dashes, to the values that it takes in
      turn; a value that is a list is several arguments.
    args: arguments of every run.
  """

  program: str
  out: str
  vary: Mapping[str, Sequence[Any]]
  args: tuple[str, ...] = ()


class Run(NamedTuple):
  """One run of a sweep.

  Attributes:
    name: what tells it from the others; the name of its folder.
    folder: the folder.
    program: the module.
    args: its arguments, without where the results go.
  """

  name: str
  folder: pathlib.Path
  program: str
  args: tuple[str, ...]

  @property
  def command(self) -> tuple[str, ...]:
    """The command line, which starts the run or continues it."""
    place = ('--out', str(self.folder), '--resume')
    return (sys.executable, '-m', self.program, *self.args, *place)

  @property
  def log(self) -> pathlib.Path:
    """Where its output goes, beside its folder."""
    return self.folder.with_name(f'{self.name}.log')

  @property
  def is_complete(self) -> bool:
    """Whether this very run is done.

    False where the folder holds a complete run of other arguments: let the
    program judge, which refuses other settings, whether they matter.
    """
    if not (self.folder / 'complete.json').exists():
      return False
    words = shlex.split(run_folder.read_config(self.folder)['command'])
    # Version 0.1.0 wrote a file where python -m has three words.
    return list(self.command[3:]) in (words[3:], words[1:])


def read(path: str) -> Sweep:
  """The sweep of a JSON file."""
  stored = json_files.read_json(pathlib.Path(path).expanduser())
  if isinstance(stored, dict):
    _check_kinds(path, stored)
  return json_files.from_json(Sweep, stored)


def _check_kinds(path: str, stored: Row) -> None:
  is_text = lambda value: isinstance(value, str) and value
  for name in ('program', 'out'):
    if name in stored and not is_text(stored[name]):
      raise UserError(f'{path}: {name!r} must be text, got {stored[name]!r}.')
  args, vary = stored.get('args', []), stored.get('vary', {})
  if not isinstance(args, list) or not all(map(is_text, args)):
    raise UserError(f"{path}: 'args' must be a list of texts, got {args!r}.")
  is_several = lambda values: isinstance(values, list) and values
  if not isinstance(vary, dict) or not all(map(is_several, vary.values())):
    raise UserError(
      f"{path}: 'vary' must have a list of values, at least one, for each "
      f'option, got {vary!r}.'
    )


def runs(sweep: Sweep) -> list[Run]:
  """All combinations, the last option varying fastest.

  Their order and names follow from the sweep alone.

  Example:
    >>> sweep = Sweep('experiments.imagenet_resnet50', 'runs/a',
    ...               {'preset': ['dense', 'rigl_90_erk'], 'key': [0, 1]})
    >>> [run.name for run in runs(sweep)]
    ['dense_key_0', 'dense_key_1', 'rigl_90_erk_key_0', 'rigl_90_erk_key_1']
    >>> runs(sweep)[0].args
    ('--preset', 'dense', '--key', '0')
  """
  out = pathlib.Path(sweep.out).expanduser()
  found: dict[str, Run] = {}
  for values in itertools.product(*sweep.vary.values()):
    chosen = dict(zip(sweep.vary, map(_words, values), strict=True))
    name = _name(chosen)
    if name in found:
      raise UserError(
        f'two runs of the sweep would be called {name}. Give each option '
        'values that differ from each other.'
      )
    varied = [
      word for option in chosen for word in (f'--{option}', *chosen[option])
    ]
    args = (*sweep.args, *varied)
    found[name] = Run(name, out / name, sweep.program, args)
  return list(found.values())


def _words(value: Any) -> list[str]:
  return [str(word) for word in (value if isinstance(value, list) else [value])]


def _name(chosen: Mapping[str, Sequence[str]]) -> str:
  parts: list[str] = []
  for option, words in chosen.items():
    # A preset says enough by its own name.
    parts += [] if option == 'preset' else [option.rpartition('.')[2]]
    parts += words
  # What is safe in the name of a folder.
  name = re.sub(r'[^A-Za-z0-9.+_-]', '_', '_'.join(parts)).replace('-', '_')
  return name.lstrip('.') or 'run'


def load(path: str) -> list[Run]:
  """The runs of a JSON file, none of which its program refuses."""
  found = runs(read(path))
  for run in found:
    try:
      arguments.parse(_presets(run.program), run.command[3:], prog=run.program)
    except SystemExit:
      raise UserError(f'{run.name}: --help is no run.') from None
    except UserError as error:
      raise UserError(f'{run.name}: {error}') from error
  return found


def _presets(program: str) -> Mapping[str, Any]:
  try:
    module = importlib.import_module(program)
    main = f'{program}.__main__'  # what python -m runs of a package
    if hasattr(module, '__path__') and importlib.util.find_spec(main):
      module = importlib.import_module(main)
  except (ImportError, TypeError) as error:  # TypeError: of a relative name
    raise UserError(
      f'cannot find the program {program!r}: {error}. Start from the folder '
      'that has it, or install it.'
    ) from error
  presets: Mapping[str, Any] | None = getattr(module, 'PRESETS', None)
  if not presets:
    raise UserError(f'{program} is no program of this kind: it has no PRESETS.')
  return presets
