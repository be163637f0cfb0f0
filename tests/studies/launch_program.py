"""A program whose runs count steps, for tests of the launcher."""

import dataclasses
import pathlib
import signal
import sys
import time

from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import preemption


@dataclasses.dataclass(frozen=True)
class Config:
  """A run that does nothing but count."""

  out: str = ''
  resume: bool = False
  num_steps: int = 24
  bad: int = 0  # the step that fails; 0 for none
  signal_at: int = 0  # that in which it sends SIGTERM to itself; 0 for none
  delay: float = 0.0  # seconds that a step takes


PRESETS = {
  'good': Config(),
  'bad': Config(bad=3),
  'preempted': Config(signal_at=9),
}


def main(config):
  # How it is interrupted is not what it is.
  settings = dataclasses.replace(config, signal_at=0, delay=0.0)
  folder = RunFolder(
    config.out, settings, program='launch_program', resume=config.resume
  )
  file = folder.path / 'step'
  done = int(file.read_text()) if file.exists() else 0
  with preemption.SignalWatch() as watch:
    for step in range(done + 1, config.num_steps + 1):
      print(f'step {step}', flush=True)
      time.sleep(config.delay)
      if step == config.bad:
        raise UserError(f'step {step} is bad.')
      if step == config.signal_at:
        signal.raise_signal(signal.SIGTERM)
      if watch.is_due(step):
        file.write_text(str(step))
        raise preemption.Preempted(step, config.num_steps)
  folder.mark_complete()


if __name__ == '__main__':
  sys.exit(
    arguments.run(
      main, PRESETS, prog=pathlib.Path(__file__).stem, description=''
    )
  )
