r"""The runs of a sweep as jobs of submitit, on Slurm or on this machine.

    pip install 'powerprop_jax[launch]'
    python -m experiments.launch.submitit_jobs SWEEP.json \
        --parameters timeout_min=1440 gpus_per_node=8 slurm_partition=gpu
    python -m experiments.launch.submitit_jobs SWEEP.json --cluster local --wait

A job runs the command line of a run in a process of its own. When its time is
up, or the machine is taken away, submitit tells the job, the job tells the run,
which saves, and submitit queues the job again. Runs that are complete are left
out. What submitit writes, and the output of the runs, lies in OUT/submitit/.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Literal

import tyro

from experiments.launch import sweeps
from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import preemption

_POLL = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class Config:
  """The runs of a sweep as jobs of submitit."""

  # What to run; see experiments/launch/sweeps.py.
  sweep: sweeps.SweepFile = tyro.MISSING
  # Where: 'local' is this machine, all runs at once.
  cluster: Literal['slurm', 'local'] = 'slurm'
  # Parameters of submitit, as name=value.
  parameters: tuple[str, ...] = ('timeout_min=1440',)
  # Wait for the jobs, and end with status 1 if one of them fails.
  wait: bool = False


class Job:
  """What a job does: it runs a command line, until that need not be continued.

  Args:
    command: the command line, which continues what it has begun.
  """

  def __init__(self, command: Sequence[str]):
    self.command = tuple(command)
    self._process: subprocess.Popen[bytes] | None = None

  def __call__(self) -> int:
    """Runs the command, again whenever it was stopped and can be continued.

    Returns:
      0.

    Raises:
      RuntimeError: if it fails.
    """
    while True:
      # Submitit's own signal may be sent to all processes of a job.
      ignore = functools.partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
      self._process = subprocess.Popen(self.command, preexec_fn=ignore)
      status = self._wait()
      if status == 0:
        return 0
      if status != preemption.EXIT_STATUS:
        raise RuntimeError(f'status {status} of {" ".join(self.command)}')

  def checkpoint(self) -> Any:
    """Lets the command save; called by submitit, in a handler of signals.

    Returns:
      What submitit is to queue.
    """
    import submitit

    if self._process is not None:
      self._process.terminate()
      self._wait()
    return submitit.helpers.DelayedSubmission(Job(self.command))

  def _wait(self) -> int:
    # A handler that interrupts one wait may begin another: hold no lock.
    process = self._process
    assert process is not None
    ended = threading.Thread(target=process.wait, daemon=True)
    ended.start()
    while ended.is_alive():
      time.sleep(_POLL)
    return int(process.returncode)


def main(config: Config) -> int:
  """Submits the runs that are not complete.

  Args:
    config: the settings.

  Returns:
    The exit status: 1 if a job was waited for and failed.
  """
  chosen = sweeps.load(config.sweep)
  left = [run for run in chosen if not run.is_complete]
  print(f'{len(chosen) - len(left)} of {len(chosen)} runs are complete.')
  if not left:
    return 0
  executor = _executor(config, left[0].folder.with_name('submitit'))
  jobs = executor.submit_array([Job(run.command) for run in left])
  for run, job in zip(left, jobs, strict=True):
    print(f'{run.name}: job {job.job_id}', flush=True)
  if not config.wait:
    return 0
  failed = [
    (run, job)
    for run, job in zip(left, jobs, strict=True)
    if job.exception() is not None
  ]
  for run, job in failed:
    print(f'error: {run.name} failed. See {job.paths.stderr}.', file=sys.stderr)
  return 1 if failed else 0


def _executor(config: Config, folder: pathlib.Path) -> Any:
  try:
    import submitit
  except ImportError as error:
    raise UserError(
      'this launcher needs submitit; install it with: pip install '
      "'powerprop_jax[launch]'"
    ) from error
  parameters: Row = {}
  for text in config.parameters:
    name, equals, value = text.partition('=')
    if not equals:
      raise UserError(f'--parameters are name=value, got {text!r}.')
    parameters[name] = int(value) if value.isdigit() else value
  try:
    executor = submitit.AutoExecutor(folder, cluster=config.cluster)
    executor.update_parameters(**parameters)
  except (NameError, RuntimeError, TypeError, ValueError, OSError) as error:
    raise UserError(f'submitit cannot do this: {error}') from error
  return executor


def run(args: Sequence[str] | None = None) -> int:
  """The program.

  Args:
    args: the command line; None is that of this process.

  Returns:
    The exit status.
  """
  return sweeps.run_launcher('submitit_jobs', main, Config(), __doc__, args)


if __name__ == '__main__':
  sys.exit(run())
