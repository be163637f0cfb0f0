"""What to say where the packages of programs and figures are not installed.

`pip install powerprop_jax` brings what the library needs; programs and figures
need the extra 'train' besides.
"""

from importlib import util
import sys

# What programs need from the start, or in the end without a word of their own.
# What one thing alone needs is asked for where that is done.
_OF_PROGRAMS = ('matplotlib', 'orbax', 'rich', 'tyro')


def lack(*packages: str) -> str:
  """Which packages are missing, and what to install; '' where none is.

  Example:
    >>> lack('json')
    ''
    >>> print(lack('json', 'no_such_package'))
    no_such_package is not installed. Programs and figures need more packages
    than the library: pip install 'powerprop_jax[train]'
  """
  missing = [package for package in packages if not _is_installed(package)]
  if not missing:
    return ''
  return (
    f'{", ".join(missing)} {"is" if len(missing) == 1 else "are"} not '
    'installed. Programs and figures need more packages than the library: pip '
    "install 'powerprop_jax[train]'"
  )


def check_for_program() -> None:
  """Ends this process, in one line and with status 2, if a program cannot run.

  For what Python imports before the program itself, which would end in a
  traceback.
  """
  if message := lack(*_OF_PROGRAMS):
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def _is_installed(package: str) -> bool:
  try:
    return util.find_spec(package) is not None
  except ImportError:
    return False
