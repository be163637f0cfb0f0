r"""Starts the runs of a sweep with submitit, by Slurm or on this machine.

    pip install 'powerprop_jax[launch]'
    python -m experiments.launch SWEEP.json --cluster slurm \
        --parameters timeout_min=1440 gpus_per_node=8 slurm_partition=gpu
    python -m experiments.launch SWEEP.json --cluster local --at-once 2
    python -m experiments.launch SWEEP.json --cluster local --gpus 0 1 2 3

A job runs the command line of a run (see sweeps.py) in a process of its own;
what that prints goes to OUT/NAME.log, what submitit writes to OUT/submitit/.
When the time of a job is up, or its machine is taken away, the run saves and
submitit queues the job again. The same command again leaves out what is
complete and continues the rest.

On this machine the launcher stays until all runs are done. SIGTERM or SIGUSR1
makes it ask them to save and end, and end itself with status 75, for a
scheduler to start it again; Ctrl-C too, with status 130. Should it be killed,
its runs go on. A log is locked while its run goes on, so that a run that is
started again waits for itself. Status 1 says that a run failed.

Runs on several hosts: nodes=4 among the parameters, and "--hosts.coordinator",
"cluster" among the arguments of the sweep.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import functools
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any, Literal

import tyro

from experiments.launch import sweeps
from experiments.launch.sweeps import Run
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs import errors, workers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import preemption

_POLL = 0.1  # seconds
# Where submitit would end a job of two minutes: a day, or a year.
_MINUTES = {'slurm': 1440, 'local': 525_600}


@dataclasses.dataclass(frozen=True)
class Config:
  """The runs of a sweep as jobs of submitit."""

  # What to run; see experiments/launch/sweeps.py.
  sweep: sweeps.SweepFile = tyro.MISSING
  # By Slurm, or on this machine.
  cluster: Literal['slurm', 'local'] = 'slurm'
  # Runs at a time. Default: as many as Slurm likes, or one on this machine,
  # where each of several computes with one thread.
  at_once: int | None = None
  # The GPUs of this machine, each for one run at a time, instead of --at-once.
  gpus: tuple[int, ...] = ()
  # Parameters of submitit, as name=value.
  parameters: tuple[str, ...] = ()
  # Wait for the jobs of Slurm, and end with status 1 if one of them fails.
  wait: bool = False


class Job:
  """What a job does: its run, until that need not be continued.

  The log of the run is locked until the last process that writes there ends.
  """

  def __init__(self, run: Run):
    self.run = run
    self._process: subprocess.Popen[bytes] | None = None

  def __call__(self) -> int:
    """Runs the command, again whenever it was stopped and can be continued."""
    # Submitit's own signal may be sent to all processes of a job.
    ignore = functools.partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
    again = preemption.EXIT_STATUS
    with _locked(self._own_log()) as log:
      # Whoever had the lock may have done it.
      status = 0 if self.run.is_complete else again
      while status == again:
        self._process = subprocess.Popen(
          self.run.command,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          preexec_fn=ignore,
          # Ctrl-C reaches the launcher, which tells the jobs.
          start_new_session=True,
        )
        try:
          status = self._wait()
        except KeyboardInterrupt:
          self._process.terminate()
          raise
    if status:
      raise RuntimeError(f'status {status} of {self.run.command}')
    return status

  def checkpoint(self) -> Any:
    """Lets the command save, and gives submitit what it is to queue."""
    import submitit

    if self._process is not None:
      self._process.terminate()
      self._wait()
    return submitit.helpers.DelayedSubmission(Job(self.run))

  def _own_log(self) -> pathlib.Path:
    """That of the first of several hosts, or of another one."""
    import submitit

    rank = submitit.JobEnvironment().global_rank
    log = self.run.log
    return log.with_name(f'{log.stem}_{rank}.log') if rank else log

  def _wait(self) -> int:
    # A handler that interrupts one wait may begin another: hold no lock.
    process = self._process
    assert process is not None
    ended = threading.Thread(target=process.wait, daemon=True)
    ended.start()
    while ended.is_alive():
      time.sleep(_POLL)
    return int(process.returncode)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """A file to append to, when no other process has it open like this."""
  with path.open('ab') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield file


def main(config: Config) -> int:
  """Submits the runs that are not complete; the exit status, see above."""
  _check(config)
  chosen = sweeps.load(config.sweep)
  left = [run for run in chosen if not run.is_complete]
  print(f'{len(chosen) - len(left)} of {len(chosen)} runs are complete.')
  if not left:
    return 0
  folder = left[0].folder.with_name('submitit')
  parameters = _parameters(config)
  if config.cluster == 'local':
    return _run_here(config, left, folder, parameters)
  if config.at_once:
    parameters['slurm_array_parallelism'] = config.at_once
  executor = _executor(config.cluster, folder, parameters)
  jobs = executor.submit_array([Job(run) for run in left])
  for run, job in zip(left, jobs, strict=True):
    print(f'{run.name}: job {job.job_id}', flush=True)
  ended = zip(left, jobs, strict=True) if config.wait else ()
  return max([_outcome(run, job) for run, job in ended], default=0)


def _run_here(
  config: Config,
  left: Sequence[Run],
  folder: pathlib.Path,
  parameters: Row,
) -> int:
  """Keeps as many runs under way as there is room for, until all are done."""
  places: list[Row] = [
    {'gpus_per_node': 1, 'visible_gpus': (gpu,)} for gpu in config.gpus
  ] or [{}] * (config.at_once or 1)
  shares_cores = not config.gpus and len(places) > 1
  queue, status = list(left), 0
  under_way: list[tuple[Run, Any, Row]] = []
  with preemption.SignalWatch() as watch:
    try:
      while queue or under_way:
        while queue and places:
          run, place = queue.pop(0), places.pop(0)
          executor = _executor('local', folder, {**parameters, **place})
          with (
            workers.one_thread() if shares_cores else contextlib.nullcontext()
          ):
            job = executor.submit(Job(run))
          under_way.append((run, job, place))
          print(f'{run.name}: job {job.job_id}', flush=True)
        time.sleep(_POLL)
        if watch.is_due(0):
          _stop(under_way)
          return preemption.EXIT_STATUS
        for item in [item for item in under_way if item[1].done()]:
          under_way.remove(item)
          places.append(item[2])
          status = max(status, _outcome(*item[:2]))
    except KeyboardInterrupt:
      _stop(under_way)
      raise
  return status


def _stop(under_way: Sequence[tuple[Run, Any, Row]]) -> None:
  """Asks the runs to save and to end, and waits for them."""
  for _, job, _ in under_way:
    job.cancel()
  for run, job, _ in under_way:
    job.wait()
    with _locked(run.log):
      print(f'{run.name}: stopped, to be continued', flush=True)


def _outcome(run: Run, job: Any) -> int:
  """Waits for a job, says how it ended, and gives 1 if it failed."""
  if job.exception() is None:
    print(f'{run.name}: done', flush=True)
    return 0
  print(
    f'error: {run.name} failed: {last_line(run.log)} See {run.log}.',
    file=sys.stderr,
  )
  return 1


def last_line(path: pathlib.Path) -> str:
  """The last line of a log that says anything; '' if there is none."""
  lines = path.read_text(errors='replace').splitlines() if path.exists() else []
  return next((line.strip() for line in reversed(lines) if line.strip()), '')


def _check(config: Config) -> None:
  errors.check_positive(config, 'at_once')
  if config.gpus and (config.cluster != 'local' or config.at_once):
    raise UserError(
      '--gpus are those of this machine, each for one run at a time: choose '
      '--cluster local, without --at-once.'
    )
  if (
    len(set(config.gpus)) < len(config.gpus) or min(config.gpus, default=0) < 0
  ):
    raise UserError(
      f'--gpus must differ from each other, from 0 on, got {config.gpus}.'
    )


def _parameters(config: Config) -> Row:
  found: Row = {'timeout_min': _MINUTES[config.cluster]}
  for text in config.parameters:
    name, equals, value = text.partition('=')
    if not equals:
      raise UserError(f'--parameters are name=value, got {text!r}.')
    found[name] = int(value) if value.isdigit() else value
  return found


def _executor(cluster: str, folder: pathlib.Path, parameters: Row) -> Any:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot write to {folder}: {error}. Choose another 'out' for the sweep."
    ) from error
  try:
    import submitit
  except ImportError as error:
    raise UserError(
      'this launcher needs submitit; install it with: pip install '
      "'powerprop_jax[launch]'"
    ) from error
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(**parameters)
  except (NameError, RuntimeError, TypeError, ValueError, OSError) as error:
    raise UserError(f'submitit cannot do this: {error}') from error
  return executor


def run(args: Sequence[str] | None = None) -> int:
  """The exit status of the program with a command line, or this one."""
  statuses: list[int] = []
  status = arguments.run(
    lambda config: statuses.append(main(config)),
    {'default': Config()},
    prog='python -m experiments.launch',
    description=str(__doc__).split('\n', maxsplit=1)[0],
    args=args,
  )
  return status or statuses[0]


if __name__ == '__main__':
  sys.exit(run())
