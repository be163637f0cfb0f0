r"""Runs of a sweep on this machine, so many processes at a time.

    python -m experiments.launch.processes SWEEP.json --workers 2
    python -m experiments.launch.processes SWEEP.json --gpus 0 1 2 3

What a run prints goes to OUT/NAME.log. A run that ends with status 75, since it
was asked to make room, is queued again; one that fails is reported at the end
with the last line of its log, after the others, and the exit status is 1.

Ctrl-C, SIGTERM or SIGUSR1 asks the runs that are under way to save and to end,
and ends with status 75 (130 after Ctrl-C), for a scheduler to start the same
command again: complete runs are left out, the others go on where they were.
Once more, and they are killed.

A log is locked while its run goes on. Should the launcher be killed, its runs
go on; another one waits for them, instead of writing into the same folders.
"""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import IO, NamedTuple

import tyro

from experiments.common import combinations
from experiments.launch import sweeps
from experiments.launch.sweeps import Run
from powerprop_jax.train.runs import workers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import preemption

_POLL = 0.1  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Config:
  """Runs of a sweep on this machine."""

  # What to run; see experiments/launch/sweeps.py.
  sweep: sweeps.SweepFile = tyro.MISSING
  # Runs at a time; with several, each computes with one thread.
  workers: int = 1
  # The GPUs of this machine, each for one run at a time, instead of workers.
  gpus: tuple[int, ...] = ()
  # How often a run is queued again that was asked to make room.
  requeues: int = 100


class Outcome(NamedTuple):
  """What became of a run.

  Attributes:
    run: the run.
    status: its exit status; 0 for one that was complete before, 128 + n after
      signal n, None if it was not begun or may be continued.
    line: the last line of its log, where it failed.
  """

  run: Run
  status: int | None
  line: str = ''


def main(config: Config) -> int:
  """Starts the runs, waits for them, and says what became of them.

  Args:
    config: the settings.

  Returns:
    The exit status, see above.
  """
  _check(config)
  launcher = Launcher(sweeps.load(config.sweep), config)
  with launcher.noticing_signals():
    outcomes = launcher.run_all()
  failed = [outcome for outcome in outcomes if outcome.status]
  done = sum(outcome.status == 0 for outcome in outcomes)
  print(f'{done} of {len(outcomes)} runs are complete.', flush=True)
  for run, status, line in failed:
    print(
      f'error: {run.name} failed with status {status}: {line} See {run.log}.',
      file=sys.stderr,
    )
  if launcher.signal is not None:
    is_interrupt = launcher.signal == signal.SIGINT
    return 130 if is_interrupt else preemption.EXIT_STATUS
  return 1 if failed or done < len(outcomes) else 0


def _check(config: Config) -> None:
  combinations.check_workers(config.workers)
  if config.gpus and config.workers > 1:
    raise UserError(
      f'--workers {config.workers} has no effect with --gpus, each of which '
      'has one run at a time. Leave one of them away.'
    )
  if config.requeues < 0:
    raise UserError(f'--requeues must be at least 0, got {config.requeues}.')
  if (
    len(set(config.gpus)) < len(config.gpus) or min(config.gpus, default=0) < 0
  ):
    raise UserError(
      f'--gpus must differ from each other, from 0 on, got {config.gpus}.'
    )


class _UnderWay(NamedTuple):
  """A run that goes on: its process, and the GPU that it has."""

  run: Run
  process: subprocess.Popen[bytes]
  gpu: int | None


class Launcher:
  """Runs in processes of their own.

  Args:
    chosen: the runs.
    config: the settings.

  Attributes:
    signal: the one after which no more runs are started; None before.
  """

  def __init__(self, chosen: Sequence[Run], config: Config):
    self.signal: int | None = None
    self._chosen = list(chosen)
    self._requeues = config.requeues
    self._queue = collections.deque(self._chosen)
    self._gpus: list[int | None] = [*config.gpus] or [None] * config.workers
    self._single = not config.gpus and config.workers > 1
    self._under_way: list[_UnderWay] = []
    self._waits_for: set[str] = set()
    self._stopped: collections.Counter[str] = collections.Counter()
    self._outcomes: dict[str, Outcome] = {}

  def run_all(self) -> list[Outcome]:
    """What became of each run, in their order, when none is left."""
    try:
      while self._under_way or (self._queue and self.signal is None):
        self._start()
        time.sleep(_POLL)
        self._collect()
    except BaseException:
      self._send(signal.SIGKILL)
      raise
    return [
      self._outcomes.get(run.name, Outcome(run, None)) for run in self._chosen
    ]

  @contextlib.contextmanager
  def noticing_signals(self) -> Iterator[None]:
    """Stops, instead of ending at once, after a signal that comes meanwhile."""
    before = {n: signal.signal(n, self._stop) for n in _SIGNALS}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _stop(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._send(signal.SIGTERM if self.signal is None else signal.SIGKILL)
    self.signal = self.signal or number

  def _send(self, number: int) -> None:
    for _, process, _ in self._under_way:
      # To the workers of a run only what they cannot survive: it ends them.
      send = os.killpg if number == signal.SIGKILL else os.kill
      with contextlib.suppress(ProcessLookupError):
        send(process.pid, number)

  def _start(self) -> None:
    """Starts as many runs as there is room for."""
    for _ in range(len(self._queue)):
      if not self._gpus or self.signal is not None:
        return
      run = self._queue.popleft()
      log = _locked(run.log)
      if log is None:
        if run.name not in self._waits_for:
          self._waits_for.add(run.name)
          print(f'{run.name}: waiting, as another launcher has it', flush=True)
        self._queue.append(run)
        continue
      with log:
        if run.is_complete:
          self._end(Outcome(run, 0), 'complete')
          continue
        self._open(run, log, self._gpus.pop(0))

  def _open(self, run: Run, log: IO[bytes], gpu: int | None) -> None:
    # The log stays locked until the last process that writes to it has ended.
    with workers.one_thread() if self._single else contextlib.nullcontext():
      environment = dict(os.environ)
      if gpu is not None:
        environment['CUDA_VISIBLE_DEVICES'] = str(gpu)
      process = subprocess.Popen(
        run.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        # Ctrl-C reaches this process only, which tells the runs.
        start_new_session=True,
      )
    self._under_way.append(_UnderWay(run, process, gpu))
    if self.signal is not None:  # it came too early to be passed on
      process.terminate()
    print(f'{run.name}: started', flush=True)

  def _collect(self) -> None:
    """Takes in what has ended."""
    for item in list(self._under_way):
      status = item.process.poll()
      if status is None:
        continue
      self._under_way.remove(item)
      self._gpus.append(item.gpu)
      self._judge(item.run, 128 - status if status < 0 else status)

  def _judge(self, run: Run, status: int) -> None:
    if status == 0:
      self._end(Outcome(run, 0), 'done')
    elif self.signal is not None and status in _ASKED:
      print(f'{run.name}: stopped, to be continued', flush=True)
    elif (
      status == preemption.EXIT_STATUS
      and self._stopped[run.name] < self._requeues
    ):
      self._stopped[run.name] += 1
      self._queue.append(run)
      print(f'{run.name}: stopped by a signal, queued again', flush=True)
    else:
      words = f'failed with status {status}'
      self._end(Outcome(run, status, last_line(run.log)), words)

  def _end(self, outcome: Outcome, words: str) -> None:
    self._outcomes[outcome.run.name] = outcome
    count = f'{len(self._outcomes)} of {len(self._chosen)}'
    print(f'{outcome.run.name}: {words} ({count})', flush=True)


# How runs end that were asked to, those that save and those that do not.
_ASKED = (
  preemption.EXIT_STATUS,
  128 + signal.SIGTERM,
  128 + signal.SIGKILL,
)


def _locked(path: pathlib.Path) -> IO[bytes] | None:
  """The file, to append to; None if another process has it open like this."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('ab')
  except OSError as error:
    raise UserError(
      f"cannot write to {path}: {error}. Choose another 'out' for the sweep."
    ) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  return file


def last_line(path: pathlib.Path) -> str:
  """The last line of a log that says anything; '' if there is none."""
  if not path.exists():
    return ''
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - 10_000))
    text = file.read().decode(errors='replace')
  lines = [' '.join(line.split()) for line in text.splitlines()]
  return next((line for line in reversed(lines) if line), '')


def run(args: Sequence[str] | None = None) -> int:
  """The program.

  Args:
    args: the command line; None is that of this process.

  Returns:
    The exit status.
  """
  return sweeps.run_launcher('processes', main, Config(), __doc__, args)


if __name__ == '__main__':
  sys.exit(run())
