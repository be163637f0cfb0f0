"""Training on a stream: dispatch, log, evaluate, save, survive.

For data sets that are read while training goes on. loop.py is for those that
fit in memory. That loop evaluates, logs and saves at once, and may stop where
it likes; here each comes when it is due, metrics are read two steps late, a
stream has a position, and hosts must agree. What both share is what they call.

    step = jax.jit(guard.guarded(step.make_step(net, tx)), donate_argnums=0)
    state = stream_loop.fit(
      guard.create(state), step=step, stream=device_stream, evaluate=evaluate,
      config=config, folder=folder)

A step of the loop is a batch of the stream, whether the guard skipped it or
not. Whatever ends the run, a signal, a kill or a full disk, the same command
with --resume continues from the last checkpoint, which holds the position in
the data, and gives the numbers of a run that was never interrupted.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Record, Row
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.images.stream import DeviceStream
from powerprop_jax.train.runs import errors, metrics
from powerprop_jax.train.runs import writers as writers_lib
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.runs.writers import Writer
from powerprop_jax.train.scale import guard, preemption
from powerprop_jax.train.scale.guard import GuardedState, GuardedStep

Evaluate = Callable[[GuardedState], dict[str, float]]

# Steps whose metrics are not waited for. More would let batches pile up on the
# devices, fewer would let the devices wait for the host.
_AHEAD = 2

# The same on all devices and hosts.
_all_finite = jax.jit(trees.all_finite)


@dataclasses.dataclass(frozen=True)
class StreamLoopConfig:
  """How long to train, and how often to log, evaluate and save."""

  # Training steps, or batches, in all.
  num_steps: int = 32_000
  # Steps between two lines in metrics.jsonl, means over the steps between.
  log_every: int = 100
  # Steps between two evaluations; there is one at the end too.
  eval_every: int = 1_000
  # Steps between two checkpoints; there is one at the end too.
  save_every: int = 1_000
  # Steps in a row that may be skipped, because loss or update is not finite,
  # before the run stops.
  max_skipped: int = 10

  def __post_init__(self) -> None:
    names = (field.name for field in dataclasses.fields(self))
    errors.check_positive(self, *names, prefix='')


def fit(
  state: GuardedState,
  *,
  step: GuardedStep,
  stream: DeviceStream,
  evaluate: Evaluate,
  config: StreamLoopConfig,
  folder: RunFolder,
  template: Tree = None,
  description: str = 'training',
  writers: Sequence[Writer] = (),
) -> GuardedState:
  """Trains from the state, or from the folder's last checkpoint, to the end.

  With several hosts every one of them calls it, with a folder that all of them
  see; the first one writes metrics.jsonl and into the writers.

  Args:
    state: the state at step 0, from guard.create; it is donated.
    step: jitted, (state, images, labels) -> (state, metrics), from
      guard.guarded; metrics are scalars.
    stream: batches, at the first one; closed at the end.
    evaluate: state -> scores to log, numbers on the host.
    template: what to restore a checkpoint to, from sharding.template, for
      another mesh than that of state; None is the state itself.
    description: what is being trained, for the progress; '' for no progress.
    writers: what gets the numbers of each line beside metrics.jsonl, see
      runs/writers.py; closed at the end.

  Raises:
    Preempted: after SIGTERM or SIGUSR1, when the state is saved; see
      folder.run_main, which makes exit status 75 of it.
    UserError: if config.max_skipped steps in a row were not finite, the weights
      at the end are not, the stream ends early, or the checkpoint is of other
      data or another state.
    SaveError: if the last checkpoint cannot be written; with several hosts, if
      any cannot.

  Note:
    A checkpoint that cannot be written, such as on a full disk, is reported,
    and the next one tries again, while training goes on: what a run has in
    memory is worth more than a place in a queue. Earlier ones stay. Hosts
    cannot tell the others that they failed, so that several of them stop.
    No checkpoint is written in a row of skipped steps, but at the end and after
    a signal, and none at all of weights that are not finite: the last ones
    before it would be pushed out by states that may be beyond repair.
    A signal during an evaluation takes effect after it.
  """
  with contextlib.ExitStack() as stack:
    watch = stack.enter_context(preemption.SignalWatch())
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(folder.checkpoints_path)
    )
    stack.enter_context(stream)
    done, metadata = 0, None
    restored = checkpoints.restore_latest(
      state if template is None else template
    )
    if restored is not None:
      state, done, metadata = restored
      stream.restore(metadata['position'])
    is_first = jax.process_index() == 0
    log = stack.enter_context(
      StreamLog(
        folder.metrics_path if is_first else None,
        done,
        writers if is_first else (),
      )
    )
    progress = stack.enter_context(
      progress_lib.Progress(
        description if is_first else '', config.num_steps, start=done
      )
    )
    run = _Run(step, stream, evaluate, config, checkpoints, log, progress)
    if metadata is not None:
      log.restore(metadata['log'])
      if metadata['is_to_evaluate']:
        run.evaluate(done, state)
    while done < config.num_steps:
      state, done = run.advance(state, done), done + 1
      run.do_what_is_due(done, state, watch.is_due(done))
    run.save_last(done, state)
  return state


class _Taken(NamedTuple):
  """A step under way: its number, metrics, and unusable files met so far."""

  number: int
  metrics: dict[str, jax.Array]
  num_files: int


@dataclasses.dataclass
class _Run:
  """What happens after each step."""

  step: GuardedStep
  stream: DeviceStream
  evaluate_state: Evaluate
  config: StreamLoopConfig
  checkpoints: checkpoint.Checkpoints
  log: 'StreamLog'
  progress: progress_lib.Progress
  under_way: collections.deque[_Taken] = dataclasses.field(
    default_factory=collections.deque
  )
  num_in_a_row: int = 0

  def advance(self, state: GuardedState, done: int) -> GuardedState:
    """The state after the next batch, which may still be on its way."""
    try:
      batch: Tree = next(self.stream)
    except StopIteration:
      raise UserError(
        f'the data ended after {done} batches, {self.config.num_steps} are '
        'needed. Train on batches that repeat, or choose fewer steps.'
      ) from None
    state, values = self.step(state, *batch)
    for value in values.values():
      value.copy_to_host_async()
    num_files = self.log.add_files(self.stream.stream.skipped)
    self.under_way.append(_Taken(done + 1, values, num_files))
    return state

  def do_what_is_due(
    self, done: int, state: GuardedState, is_stopped: bool
  ) -> None:
    """Logs, evaluates and saves what is due after a step."""
    is_last = done == self.config.num_steps
    evaluates = is_last or done % self.config.eval_every == 0
    saves = is_last or done % self.config.save_every == 0
    self._read(0 if is_stopped or evaluates or saves else _AHEAD)
    # Several hosts come to the same answer.
    is_bad = (
      (is_stopped or is_last)
      and self.num_in_a_row > 0
      and not _all_finite(state.train.phi)
    )
    if is_stopped:
      if not is_bad:
        # An evaluation may take longer than the scheduler waits.
        self._save(done, state, is_to_evaluate=evaluates)
      raise preemption.Preempted(self._saved(), self.config.num_steps)
    if is_bad:
      self._stop(done)
    if evaluates:
      self.evaluate(done, state)
    if saves and (is_last or not self.num_in_a_row):
      self._save(done, state)

  def _read(self, num_left: int) -> None:
    """Takes in the metrics of all steps under way but the last ones."""
    while len(self.under_way) > num_left:
      number, on_device, num_files = self.under_way.popleft()
      values = {name: np.asarray(x).item() for name, x in on_device.items()}
      self.log.add(values)
      self.num_in_a_row = values['num_in_a_row']
      if self.num_in_a_row >= self.config.max_skipped:
        self._stop(number)
      if number % self.config.log_every and number < self.config.num_steps:
        continue
      batch_size = self.stream.stream.batches.share.total
      self.progress.update(
        number, self.log.write_means(number, batch_size, num_files)
      )
      self._check_checkpoint()

  def _stop(self, number: int) -> None:
    saved = self._saved()
    where = f'the checkpoint of step {saved}' if saved else 'the beginning'
    steps = f'step {number}'
    if self.num_in_a_row > 1:
      steps = f'{self.num_in_a_row} steps in a row, the last one being {steps}'
    raise UserError(
      f'loss, gradients or weights were not finite in {steps}. --resume '
      f'continues from {where}. Should it end the same way, start again with a '
      'smaller learning rate or a longer warm-up.'
    )

  def evaluate(self, done: int, state: GuardedState) -> None:
    """Scores a state, outside the time of training."""
    began = time.monotonic()
    scores = self.evaluate_state(state)
    self.log.write(done, scores)
    self.log.leave_out(time.monotonic() - began)
    self.progress.update(done, scores)

  def _save(
    self, done: int, state: GuardedState, is_to_evaluate: bool = False
  ) -> None:
    metadata = {
      'position': self.stream.position(),
      'log': self.log.metadata(),
      'is_to_evaluate': is_to_evaluate,
    }
    save = lambda: self.checkpoints.save(done, state, metadata)
    if self._try(save) not in (None, done):
      # The failure was of the save before, which ended in the meantime.
      self._try(save)

  def _saved(self) -> int:
    """Step of the latest checkpoint on disk, which is waited for."""
    self._try(self.checkpoints.wait)
    return max(self.checkpoints.steps(), default=0)

  def _check_checkpoint(self) -> None:
    # Hosts would stop at different steps.
    if jax.process_count() == 1:
      self._try(self.checkpoints.check)

  def _try(self, action: Callable[[], None]) -> int | None:
    """Reports a checkpoint that cannot be written, and gives its step."""
    try:
      action()
    except checkpoint.SaveError as error:
      if jax.process_count() > 1:
        raise
      latest = max(self.checkpoints.steps(), default=0)
      print(
        f'warning: cannot save the checkpoint of step {error.step}: '
        f'{error.reason}. The next one tries again; the latest complete one is '
        f'of step {latest}. Make room for them.',
        file=sys.stderr,
      )
      return error.step
    return None

  def save_last(self, done: int, state: GuardedState) -> None:
    """Makes sure that the end is on disk."""
    if self._saved() < done:
      self._save(done, state)
      self.checkpoints.wait()


class StreamLog:
  """The lines of one run, and what to continue them with.

  A line of means over the steps since the one before:

      {"step": 200, "loss": 6.9, "accuracy": 0.001, "skipped_steps": 0,
       "skipped_images": 1, "images_per_second": 812.3}

  A line for each image file that was found to be no image, once:

      {"step": 200, "skipped_image": "n02105855_2933.JPEG", "defect": "…"}

  And the scores of evaluations. A log that is restored writes the lines that it
  would have written, images per second aside. A line that cannot be written, as
  on a full disk, is kept and tried again with the next one, as long as there
  are not many.

  Args:
    path: of metrics.jsonl; None writes nothing, for all hosts but the first.
    start: steps that are done; lines of later ones are dropped.
    writers: what gets the numbers of each line too; closed at the end.

  Example:
    >>> with StreamLog(None, 0) as log:
    ...   log.add({'loss': 2.0, 'num_skipped': 0, 'num_in_a_row': 0})
    ...   log.add({'loss': 4.0, 'num_skipped': 0, 'num_in_a_row': 0})
    ...   log.add({'loss': np.nan, 'num_skipped': 1, 'num_in_a_row': 1})
    ...   log.write_means(3, batch_size=256, num_files=0)['loss']
    3.0
  """

  def __init__(
    self,
    path: str | os.PathLike[str] | None,
    start: int,
    writers: Sequence[Writer] = (),
  ):
    self._writers = writers
    self._writer = (
      None if path is None else metrics.MetricsWriter(path, start=start)
    )
    self._has_failed = False
    self._sums: dict[str, float] = {}
    self._num_made = 0
    self._num_skipped = 0
    # All unusable files by name, the first of which were written already.
    self._files: dict[str, str] = {}
    self._num_written = 0
    # When the first step of those counted ended, and how many there were since.
    self._began: float | None = None
    self._num_timed = 0

  def add(self, values: Mapping[str, float]) -> None:
    """Takes in the metrics of one guarded step; skipped ones are in no mean."""
    if self._began is None:
      self._began = time.monotonic()
    else:
      self._num_timed += 1
    self._num_skipped = int(values['num_skipped'])
    if values['num_in_a_row']:
      return
    self._num_made += 1
    for name, value in values.items():
      if name not in guard.COUNTS:
        self._sums[name] = self._sums.get(name, 0.0) + value

  def add_files(self, files: Mapping[str, str]) -> int:
    """Takes in defects of files by name; how many files there are so far."""
    for name, defect in files.items():
      self._files.setdefault(name, defect)
    return len(self._files)

  def write_means(self, step: int, batch_size: int, num_files: int) -> Row:
    """Writes a line of means, and one for each file not named before.

    A batch is that of all hosts; num_files were met by then, see add_files.

    Returns:
      What was written: no means where all steps were skipped.
    """
    record: Row = {
      name: value / self._num_made for name, value in self._sums.items()
    }
    record['skipped_steps'] = self._num_skipped
    record['skipped_images'] = num_files
    if self._began is not None and self._num_timed:
      seconds = max(time.monotonic() - self._began, 1e-9)
      record['images_per_second'] = self._num_timed * batch_size / seconds
    self.write(step, record)
    for name in list(self._files)[self._num_written : num_files]:
      print(
        f'warning: {name} is no image that can be read, and another takes its '
        f'place: {self._files[name]}',
        file=sys.stderr,
      )
      self.write(step, {'skipped_image': name, 'defect': self._files[name]})
    self._num_written = max(self._num_written, num_files)
    self._sums, self._num_made = {}, 0
    self._began, self._num_timed = time.monotonic(), 0
    return record

  def leave_out(self, seconds: float) -> None:
    """Does not count time as that of training."""
    if self._began is not None:
      self._began += seconds

  def write(self, step: int, record: Record) -> None:
    """Writes any line, of names to numbers and strings."""
    if values := writers_lib.numbers(record):
      for writer in self._writers:
        writer.write(step, values)
    if self._writer is None:
      return
    try:
      self._writer.write(step, record)
      self._has_failed = False
    except OSError as error:
      if not self._has_failed:
        print(f'warning: cannot write metrics: {error}.', file=sys.stderr)
      self._has_failed = True

  def metadata(self) -> Row:
    """What restore needs, for the metadata of a checkpoint."""
    return {
      # A copy: it is written in the background.
      'sums': dict(self._sums),
      'num_made': self._num_made,
      'num_skipped': self._num_skipped,
      'files': list(self._files.items()),
      'num_written': self._num_written,
    }

  def restore(self, metadata: Record) -> None:
    """Goes on where the log was that gave the metadata."""
    # JSON has no NaN.
    self._sums = {
      name: math.nan if value is None else value
      for name, value in metadata['sums'].items()
    }
    self._num_made = metadata['num_made']
    self._num_skipped = metadata['num_skipped']
    self._files = dict(metadata['files'])
    self._num_written = metadata['num_written']

  def __enter__(self) -> 'StreamLog':
    return self

  def __exit__(self, *exc_info: object) -> None:
    for writer in self._writers:
      writer.close()
    if self._writer is None:
      return
    try:
      self._writer.close()
    except OSError as error:
      print(f'warning: cannot write metrics: {error}.', file=sys.stderr)
