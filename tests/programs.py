"""The programs of experiments/, called as from a command line."""

import json

from powerprop_jax.train import command


def run(program, *args, static_alpha=False):
  """The exit status of a program, a module with main and PRESETS."""
  return command.run(
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
