"""A program with short runs of a small network, for tests of launchers."""

import dataclasses
import pathlib
import signal
import sys
import time

import stream_runs

from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs.folder import RunFolder

_LOOP = stream_runs.Config().loop


@dataclasses.dataclass(frozen=True)
class Config:
  """A run of a small network with RigL around powerprop."""

  out: str = ''
  resume: bool = False
  # Training steps in all.
  num_steps: int = 24
  # Steps whose loss is not finite.
  bad: tuple[int, ...] = ()
  # The step in which the process sends SIGTERM to itself; 0 for none.
  signal_at: int = 0
  # Seconds that a step takes longer than it needs.
  delay: float = 0.0


PRESETS = {
  'good': Config(),
  'bad': Config(bad=(3, 4, 5, 6)),
  'preempted': Config(signal_at=9),
}


def main(config):
  # How it is interrupted is not what it is.
  settings = dataclasses.replace(config, signal_at=0, delay=0.0)
  folder = RunFolder(
    config.out, settings, program='launch_program', resume=config.resume
  )
  *_, compiled = stream_runs.compiled(0)

  def step(state, images, labels):
    number = int(state.train.step) + 1
    print(f'step {number}', flush=True)
    time.sleep(config.delay)
    if number == config.signal_at:
      signal.raise_signal(signal.SIGTERM)
    return compiled(state, images, labels)

  loop = dataclasses.replace(_LOOP, num_steps=config.num_steps)
  settings = stream_runs.Config(loop=loop, bad=config.bad)
  stream_runs.run(settings, folder, step=step)
  folder.mark_complete()


def run(args=None):
  return arguments.run(
    main, PRESETS, prog=pathlib.Path(__file__).stem, description='', args=args
  )


if __name__ == '__main__':
  sys.exit(run())
