"""One program for each figure, table or benchmark."""

from collections.abc import Callable, Mapping
import importlib
import sys
from typing import Any, NoReturn

from powerprop_jax.files import extras

# While Python looks for the program of python -m experiments.…, before it
# imports that; see sys.argv in Python's manual.
if sys.argv[:1] == ['-m']:
  extras.check_for_program()


def start(
  main: Callable[[Any], None],
  presets: Mapping[str, Any],
  *,
  static_alpha: bool | None = False,
) -> NoReturn:
  """Runs a program that was started by python -m; see arguments.run.

  What it is called, and the first line of its help, are those of the module
  that main is in.
  """
  # Not before the check above, which says in one line what is missing.
  from powerprop_jax.sparse import memory
  from powerprop_jax.train.cli import arguments

  memory.keep_memory()
  module = sys.modules[main.__module__]
  name = getattr(module.__spec__, 'name', module.__name__)
  # Processes that share the work look for functions by the names of their
  # modules, and have a __main__ of their own.
  main = getattr(importlib.import_module(name), main.__name__)
  status = arguments.run(
    main,
    presets,
    prog=f'python -m {name.removesuffix(".__main__")}',
    description=str(module.__doc__).split('\n', maxsplit=1)[0],
    static_alpha=static_alpha,
  )
  sys.exit(status)
