"""Command lines from dataclasses: defaults, presets, help and one-line errors.

A program is a frozen dataclass of settings and a main(config). Its command line
is derived by tyro; the comments beside the fields are the help.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
import functools
import io
import os
import re
import sys
from typing import Annotated, Any, TypeVar

import tyro

from powerprop_jax import nets
from powerprop_jax.core import names
from powerprop_jax.report import plotting
from powerprop_jax.train.runs import folder, writers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import fusing

C = TypeVar('C')

# A setting that names a network.
Net = Annotated[
  str,
  tyro.conf.arg(
    help=f'The network: {", ".join(nets.NAMES)}. powerprop nets says what '
    'they are.'
  ),
]

# Presets that a message names.
_MOST = 20


def run(
  main: Callable[[C], None],
  presets: Mapping[str, C],
  *,
  args: Sequence[str] | None = None,
  static_alpha: bool | None = False,
  draws: bool | None = None,
  **about: Any,
) -> int:
  """Parses a command line, runs the program, and reports mistakes in one line.

  Args:
    presets: settings by name; the first is the default, and '--preset NAME'
      chooses another one to start from.
    static_alpha: whether the program trains with an α that is a Python number,
      for the compiler's settings; sweeps do not. None leaves these alone.
    draws: whether '--figures WIDTH' draws figures for a paper, see
      plotting.paper. Default: where there is a folder to resume.
    **about: prog, description, reads_config and others, see parse.

  Returns:
    The exit status; see folder.run_main.
  """
  if static_alpha is not None:
    fusing.set_cpu_flags(os.environ, static_alpha=static_alpha)
  given = list(sys.argv[1:] if args is None else args)

  if draws is None:
    draws = hasattr(next(iter(presets.values())), 'resume')
  if draws:
    about['description'] = about.get('description', '') + (
      '\n\nWith --figures WIDTH figures are drawn for a paper: as wide as a '
      'column or a page, or so many inches, and without titles.'
    )

  @functools.wraps(main)
  def parse_and_run() -> None:
    width, rest = _take('--figures', given) if draws else (None, given)
    config = parse(presets, rest, **about)
    writers.check(config)
    with contextlib.nullcontext() if width is None else _paper(width):
      main(config)

  return folder.run_main(parse_and_run)


def parse(
  presets: Mapping[str, C],
  args: Sequence[str],
  *,
  prog: str = 'program',
  description: str = '',
  reads_config: bool | None = None,
  others: Callable[[C, list[str]], None] | None = None,
) -> C:
  """A preset with what a command line changes; see run.

  Args:
    prog: what the program is called. The last word is its name in config.json.
    description: what it does, for its help.
    reads_config: whether '--config FILE' starts from the settings of an earlier
      run. Default: where there is a folder to resume.
    others: says why options that the program does not have are refused, from
      its settings and these. Default: they are unknown.

  Raises:
    UserError: if an option is unknown or its value cannot be read.
    SystemExit: with status 0, after '--help'.
  """
  name, rest = _take_preset(presets, list(args))
  default = presets[name]
  if reads_config is None:
    reads_config = hasattr(default, 'resume')
  if reads_config:
    file, rest = _take('--config', rest)
    if file is not None:
      program = prog.split()[-1].rpartition('.')[2]
      default = folder.read_settings(type(default), file, program)
    description += (
      '\n\nWith --config FILE it starts from the settings of a run, which are '
      'in its config.json; other options change some of them, and what it '
      'lacks has its default.'
    )
  if len(presets) > 1:
    description += (
      '\n\nWith --preset NAME it starts from other defaults; those shown below '
      f'are of {name!r}. Presets: {_listed(presets)}.'
    )
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      found: Any = tyro.cli(
        type(default),
        default=default,
        args=rest,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        return_unknown_args=others is not None,  # type: ignore[call-overload]
      )
  except SystemExit as stop:
    if not stop.code:
      raise
    message = _with_hint(_one_line(errors.getvalue()))
    raise UserError(f'{message} See {prog} --help.') from None
  if others is not None:
    found, unknown = found
    if unknown:
      others(found, unknown)
  return found


def _paper(width: str) -> contextlib.AbstractContextManager[None]:
  with contextlib.suppress(ValueError):
    return plotting.paper(float(width))
  return plotting.paper(width)  # type: ignore[arg-type]


def _take_preset(
  presets: Mapping[str, C], args: list[str]
) -> tuple[str, list[str]]:
  """The preset's name and the arguments without it."""
  name, rest = _take('--preset', args)
  if name is None:
    return next(iter(presets)), rest
  if name not in presets:
    near = names.closest(name, presets, 4)
    hint = f' Near it: {", ".join(near)}.' if near else ''
    raise UserError(
      f'unknown preset {name!r}; there are: {_listed(presets)}.{hint}'
    )
  return name, rest


def _take(option: str, args: Sequence[str]) -> tuple[str | None, list[str]]:
  """The last value of an option, or None, and the arguments without it.

  Example:
    >>> _take('--preset', ['--key', '1', '--preset=tiny'])
    ('tiny', ['--key', '1'])
  """
  value, rest, left = None, [], list(args)
  while left:
    arg = left.pop(0)
    if arg == option:
      if not left:
        raise UserError(f'{option} needs a value.')
      value = left.pop(0)
    elif arg.startswith(f'{option}='):
      value = arg.partition('=')[2]
    else:
      rest.append(arg)
  return value, rest


def _listed(presets: Collection[str]) -> str:
  """Their names, or the first ones where they are too many to read."""
  first = list(presets)[: len(presets) if len(presets) <= _MOST else _MOST // 2]
  more = len(presets) - len(first)
  return ', '.join(first) + (f' and {more} more' if more else '')


def _with_hint(message: str) -> str:
  """A message of tyro about a choice, with the nearest one that there is.

  Example:
    >>> text = "invalid choice 'rgil' for argument '--method'. Expected one of"
    >>> _with_hint(f"{text} ('set', 'rigl').")
    "invalid choice 'rgil' for argument '--method'. Expected one of ('set',
    'rigl'). Did you mean 'rigl'?"
  """
  found = re.match(r"invalid choice '(.*?)'.* one of \((.*)\)", message)
  if not found:
    return message
  return message + names.hint(found[1], re.findall("'(.*?)'", found[2]))


def _one_line(text: str) -> str:
  """What a message of tyro says, without its frame, title and references."""
  kept = []
  # The first line is the title; what is framed depends on the terminal.
  for line in re.sub(r'\x1b\[[0-9;]*m', '', text).splitlines()[1:]:
    words = line.strip('─│╰╯- ') and line.strip('│ ')
    if words.startswith(('For full helptext', 'Argument helptext')):
      break
    kept.append(words)
  line = ' '.join(filter(None, kept)).rstrip('.') + '.'
  return re.sub(r'(?<![.:]) (Perhaps you meant|Unrecognized)', r'. \1', line)
