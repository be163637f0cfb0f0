"""`powerprop completion`: a script with which a shell completes the command.

    source <(powerprop completion bash)       in ~/.bashrc, likewise for zsh
    powerprop completion fish | source        in ~/.config/fish/config.fish

The script knows the commands, their options and the values of those that have
a few. It starts no Python, so that completing is as quick as the shell.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import shlex
import types
import typing
from typing import Annotated, Any, Literal, get_args

import tyro

from powerprop_jax import nets
from powerprop_jax.train.data import sources

Shell = Literal['bash', 'zsh', 'fish']
# The values of options; see options_of.
Options = dict[str, tuple[str, ...] | None]

# Options of powerprop itself.
_ABOUT = ('--help', '--version')
# Values that the type of a setting does not tell.
_VALUES = {'--net': nets.NAMES, '--data.name': sources.KNOWN_NAMES}


@dataclasses.dataclass(frozen=True)
class CompletionConfig:
  """Prints a script for bash, zsh or fish that completes this command."""

  # The shell.
  shell: Annotated[Shell, tyro.conf.Positional] = tyro.MISSING


def options_of(settings: Any, prefix: str = '') -> Options:
  """Options of a command by the dataclass of its settings, and their values.

  Returns:
    {option: values}: none if there are too many to list, None if it takes none.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...   method: Literal['set', 'rigl'] = 'set'
    ...   key: int = 0
    ...   resume: bool = False
    >>> options_of(Config)  # doctest: +NORMALIZE_WHITESPACE
    {'--method': ('set', 'rigl'), '--key': (), '--resume': None,
     '--no-resume': None}
  """
  found: Options = {}
  hints = typing.get_type_hints(settings, include_extras=True)
  for name, hint in hints.items():
    if typing.get_origin(hint) is Annotated:
      hint, *marks = get_args(hint)
      if tyro.conf.Positional in marks:
        continue
    name = name.replace('_', '-')
    option = f'--{prefix}{name}'
    if dataclasses.is_dataclass(hint):
      found |= options_of(hint, f'{prefix}{name}.')
    elif hint is bool:
      found |= {option: None, f'--{prefix}no-{name}': None}
    else:
      found[option] = _VALUES.get(option, tuple(_choices(hint)))
  return found


def _choices(hint: Any) -> Iterator[str]:
  """Names that a type allows."""
  if typing.get_origin(hint) is Literal:
    yield from (str(choice) for choice in get_args(hint))
  elif typing.get_origin(hint) in (typing.Union, types.UnionType):
    for part in get_args(hint):
      yield from _choices(part)


def script(shell: Shell, options: Mapping[str, Options]) -> str:
  """What the shell is to read, by the options of each command."""
  if shell == 'fish':
    return '\n'.join(_fish(options)) + '\n'
  top = ' '.join([*options, *_ABOUT])
  return _SCRIPTS[shell].format(top=top, cases='\n'.join(_cases(options)))


def _words(command: str) -> tuple[str, ...]:
  """Words that a command takes besides options."""
  words = {
    'completion': get_args(Shell),
    'data': ('get', *sources.DOWNLOADABLE),
  }
  return words.get(command, ())


def _cases(options: Mapping[str, Options]) -> Iterator[str]:
  """Of each command and the word before the words that may follow."""
  for command, known in options.items():
    for option, values in known.items():
      if values is not None:
        yield f"    '{command} {option}') found='{' '.join(values)}' ;;"
  for command, known in options.items():
    words = ' '.join([*_words(command), *known, '--help'])
    yield f"    '{command} '*) found='{words}' ;;"


# A word that nothing known begins with is completed as a file.
_SCRIPTS = {
  'bash': """\
_powerprop() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  [[ $before == = ]] && before=${{COMP_WORDS[COMP_CWORD-2]}}
  [[ $cur == = ]] && cur=
  local found=
  case "${{COMP_WORDS[1]}} $before" in
{cases}
  esac
  ((COMP_CWORD == 1)) && found='{top}'
  COMPREPLY=($(compgen -W "$found" -- "$cur"))
}}
complete -o default -F _powerprop powerprop
""",
  'zsh': """\
_powerprop() {{
  local found=
  case "${{words[2]}} ${{words[CURRENT-1]}}" in
{cases}
  esac
  ((CURRENT == 2)) && found='{top}'
  compadd -- ${{=found}} || _files
}}
(($+functions[compdef])) || {{ autoload -Uz compinit && compinit; }}
compdef _powerprop powerprop
""",
}


def _fish(options: Mapping[str, Options]) -> Iterator[str]:
  """Lines for fish, one for each thing that it may complete."""
  line = 'complete -c powerprop'
  names = shlex.quote(' '.join(options))
  yield f'{line} -n __fish_use_subcommand -f -a {names}'
  for option in _ABOUT:
    yield f'{line} -n __fish_use_subcommand -l {option.removeprefix("--")}'
  for command, known in options.items():
    within = f"{line} -n '__fish_seen_subcommand_from {command}'"
    if words := _words(command):
      yield f"{within} -f -a '{' '.join(words)}'"
    for option, values in known.items():
      takes = '' if values is None else ' -r'
      takes += f" -f -a '{' '.join(values)}'" if values else ''
      yield f'{within} -l {option.removeprefix("--")}{takes}'
