"""Command lines from dataclasses: defaults, presets, help and one-line errors.

A program is a frozen dataclass of settings and a main(config). Its command line
is derived by tyro; the comments beside the fields are the help.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import io
import re
import sys
from typing import TypeVar

import tyro

from powerprop_jax.train import run_folder
from powerprop_jax.train.errors import UserError

C = TypeVar('C')


def run(
  main: Callable[[C], None],
  presets: Mapping[str, C],
  *,
  prog: str,
  description: str,
  args: Sequence[str] | None = None,
) -> int:
  """Parses a command line, runs the program, and reports mistakes in one line.

  Args:
    main: the program.
    presets: settings by name; the first is the default, and '--preset NAME'
      chooses another one to start from.
    prog: how the program is called, for the help.
    description: what it does, for the help.
    args: the command line; None is that of this process.

  Returns:
    The exit status: 0; 2 after a user's mistake; 130 after an interruption.
  """
  given = list(sys.argv[1:] if args is None else args)

  def parse_and_run() -> None:
    main(parse(presets, given, prog=prog, description=description))

  return run_folder.run_main(parse_and_run)


def parse(
  presets: Mapping[str, C],
  args: Sequence[str],
  *,
  prog: str = 'program',
  description: str = '',
) -> C:
  """Settings from a command line.

  Args:
    presets: settings by name; the first is the default.
    args: the command line, without the name of the program.
    prog: how the program is called, for the help.
    description: what it does, for the help.

  Returns:
    The chosen preset with the given settings changed.

  Raises:
    UserError: if an option is unknown or its value cannot be read.
    SystemExit: with status 0, after '--help'.
  """
  name, rest = _take_preset(presets, list(args))
  default = presets[name]
  if len(presets) > 1:
    choices = ', '.join(presets)
    description += (
      f'\n\n--preset NAME starts from other defaults, those shown below being '
      f'of {name!r}. Presets: {choices}.'
    )
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      return tyro.cli(
        type(default),
        default=default,
        args=rest,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
      )
  except SystemExit as stop:
    if not stop.code:
      raise
    raise UserError(
      f'{_one_line(errors.getvalue())} See {prog} --help.'
    ) from None


def _take_preset(
  presets: Mapping[str, C], args: list[str]
) -> tuple[str, list[str]]:
  """The preset's name and the arguments without it."""
  name = next(iter(presets))
  rest = []
  while args:
    arg = args.pop(0)
    if arg == '--preset' or arg.startswith('--preset='):
      _, equals, name = arg.partition('=')
      if not equals:
        name = args.pop(0) if args else ''
      if name not in presets:
        raise UserError(
          f'unknown preset {name!r}; there are: {", ".join(presets)}.'
        )
    else:
      rest.append(arg)
  return name, rest


def _one_line(text: str) -> str:
  """A message of tyro without its frame."""
  plain = re.sub(r'\x1b\[[0-9;]*m', '', text)
  lines = [
    line.strip('│╭╰╮╯─ ')
    for line in plain.splitlines()
    if line.strip('─│╭╰╮╯ ')
  ]
  kept = [line for line in lines if line != 'Parsing error']
  return ' '.join(kept)
