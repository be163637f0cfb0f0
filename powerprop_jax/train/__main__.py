"""Where `powerprop` starts, also as python -m powerprop_jax.train."""

import sys

from powerprop_jax.files import extras


def main() -> int:
  """Runs the command, or says what it lacks.

  Returns:
    The exit status; see cli.main.
  """
  extras.check_for_program()
  from powerprop_jax.sparse import memory
  from powerprop_jax.train.cli import main as cli

  memory.keep_memory()
  return cli.main()


if __name__ == '__main__':
  sys.exit(main())
