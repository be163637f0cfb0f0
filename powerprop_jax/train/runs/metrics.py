"""What a run reports while it goes: JSON lines, progress, TensorBoard.

metrics.jsonl is the record; the other two are for watching.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import sys
import time
from typing import IO, Any

from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs import json_files
from powerprop_jax.train.runs.errors import UserError

_BAR_WIDTH = 20


class MetricsWriter:
  """Appends measurements to a file, one JSON object a line.

  Each line is complete on disk when write returns, as far as a killed process
  is concerned. Use it as a context manager, or call close.
  """

  def __init__(self, path: str | os.PathLike[str], *, start: int = 0):
    """Opens the file, at the point from which a resumed run continues.

    Lines of later steps than start are dropped: the resumed run writes them
    again. So is a last line that was cut off. Write the measurements of a step
    before saving the checkpoint of that step, and none are lost.

    Args:
      path: the file; made if it is missing, its folder must exist.
      start: steps that are done already; 0 starts with an empty file.

    Raises:
      UserError: if a line other than the last is not a measurement.
    """
    self._path = pathlib.Path(path)
    self._drop_after(start)
    self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115

  def _drop_after(self, start: int) -> None:
    if not self._path.exists():
      return
    kept = [
      record
      for record in read_metrics(self._path)
      if start > 0 and record['step'] <= start
    ]
    lines = ''.join(_line(record) for record in kept).encode()
    if lines != self._path.read_bytes():
      whole.write_bytes(self._path, lines)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one measurement.

    Args:
      step: number of training steps done.
      metrics: from names to numbers, strings, booleans or None; NaN becomes
        null. A sweep adds names such as 'alpha' and 'key' and writes one line
        for each of its runs.
    """
    self._file.write(_line({'step': step, **metrics}))
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
  """Reads what MetricsWriter wrote.

  Args:
    path: the file.

  Returns:
    The records in the order of writing, each with 'step'; without a last line
    that was cut off.

  Raises:
    UserError: if the file is missing, or a line but the last is no record.
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise UserError(f'cannot read the metrics in {path}: {error}') from error
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      int(record['step'])
    except (ValueError, TypeError, LookupError) as error:
      if number == len(lines):
        break
      raise UserError(
        f'line {number} of {path} is not a measurement. Repair or remove it, '
        'or choose another --out.'
      ) from error
    if line.endswith(b'\n'):
      records.append(record)
  return records


def _line(record: Mapping[str, Any]) -> str:
  text = json.dumps(
    json_files.to_json(record), allow_nan=False, ensure_ascii=False
  )
  return text + '\n'


class Progress:
  """How far a task is: a bar on a terminal, now and then a line elsewhere.

  Use it as a context manager:

      with Progress('training', num_steps, start=step) as progress:
        ...
        progress.update(step, {'loss': loss})
  """

  def __init__(
    self,
    description: str,
    total: int,
    *,
    unit: str = 'steps',
    start: int = 0,
    interval: float = 10.0,
    enabled: bool = True,
    stream: IO[str] | None = None,
  ):
    """Starts the clock.

    Args:
      description: what is being done.
      total: how many units there are to do.
      unit: what they are.
      start: how many are done already; they do not count for the speed.
      interval: seconds between two lines, where there is no terminal.
      enabled: False says nothing at all.
      stream: where to write; None is the standard error.
    """
    self._description = description
    self._total = total
    self._unit = unit
    self._start = start
    self._interval = interval
    self._enabled = enabled
    self._stream = sys.stderr if stream is None else stream
    self._bar: Any = None
    self._began = self._reported = time.monotonic()
    self._unreported = ''

  def __enter__(self) -> 'Progress':
    self._began = self._reported = time.monotonic()
    if self._enabled and self._stream.isatty():
      self._bar = _bar(self._stream)
      self._bar.add_task(
        self._description, total=self._total, completed=self._start, details=''
      )
      self._bar.start()
    return self

  def update(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
    """Reports progress.

    Args:
      done: how many units are done, those before the start included.
      metrics: latest measurements to show; what is not a number is left out.
    """
    if not self._enabled:
      return
    now = time.monotonic()
    details = self._details(done, now, metrics or {})
    if self._bar is not None:
      # rich would shorten the bar and the numbers before it.
      room = self._bar.console.width - len(self._description)
      room -= _BAR_WIDTH + 2 * len(str(self._total)) + 5
      self._bar.update(
        self._bar.task_ids[0],
        completed=done,
        details=details[: max(room, 0)],
      )
      return
    line = f'{self._description}: {done:,}/{self._total:,} {self._unit}'
    self._unreported = f'{line}, {details}' if details else line
    if now - self._reported >= self._interval:
      self._print()
      self._reported = now

  def _details(self, done: int, now: float, metrics: Mapping[str, Any]) -> str:
    seconds = now - self._began
    parts = []
    if seconds > 0 and done > self._start:
      speed = (done - self._start) / seconds
      parts.append(
        f'{speed:,.0f} {self._unit}/s'
        if speed >= 10
        else f'{speed:.2g} {self._unit}/s'
      )
      if done < self._total:
        parts.append(f'{_duration((self._total - done) / speed)} left')
      else:
        parts.append(f'took {_duration(seconds)}')
    parts += [
      f'{name} {value:.4g}'
      for name, value in json_files.to_json(metrics).items()
      if isinstance(value, (int, float))
    ]
    return ', '.join(parts)

  def _print(self) -> None:
    print(self._unreported, file=self._stream, flush=True)
    self._unreported = ''

  def __exit__(self, *exc_info: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._unreported:
      self._print()


def _bar(stream: IO[str]) -> Any:
  import rich.console
  import rich.progress

  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(bar_width=_BAR_WIDTH),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[details]}', markup=False),
    console=rich.console.Console(file=stream),
  )


def _duration(seconds: float) -> str:
  """A duration for people: 4.2 s, 42 s, 3 min 20 s, 2 h 5 min."""
  if seconds < 9.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def check_tensorboard(enabled: bool) -> None:
  """Refuses to write for TensorBoard without its package; call it early.

  Args:
    enabled: whether to write anything.

  Raises:
    UserError: saying what to install.
  """
  if not enabled:
    return
  try:
    import tensorboardX  # noqa: F401
  except ImportError as error:
    raise UserError(
      'TensorBoard files are written with tensorboardX; install it with: pip '
      "install 'powerprop_jax[tensorboard]', or leave --tensorboard out."
    ) from error


class TensorBoardWriter:
  """Writes measurements for TensorBoard; see tensorboard_writer."""

  def __init__(self, folder: str | os.PathLike[str] | None, *, start: int = 0):
    """Opens a folder of event files.

    Args:
      folder: where the event files go, made if it is missing; None writes
        nothing.
      start: steps that are done already; TensorBoard hides what an interrupted
        run wrote for later steps.

    Raises:
      UserError: if tensorboardX is needed and not installed.
    """
    self._writer: Any = None
    if folder is None:
      return
    check_tensorboard(True)
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=start + 1 if start else None
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the numbers of one measurement.

    Args:
      step: number of training steps done.
      metrics: from names to values; only numbers are written. The curves of a
        sweep are told apart by 'alpha' and 'key', as 'loss/alpha_2_key_0'.
    """
    if self._writer is None:
      return
    values = dict(json_files.to_json(metrics))
    lane = '_'.join(
      f'{name}_{values.pop(name):g}'
      for name in ('alpha', 'key')
      if name in values
    )
    for name, value in values.items():
      if isinstance(value, (int, float)):
        tag = f'{name}/{lane}' if lane else name
        self._writer.add_scalar(tag, value, step)

  def close(self) -> None:
    """Writes out what is left and closes the files."""
    if self._writer is not None:
      self._writer.close()

  def __enter__(self) -> 'TensorBoardWriter':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def tensorboard_writer(
  run: str | os.PathLike[str], start: int, enabled: bool
) -> TensorBoardWriter:
  """TensorBoard files of a run, or a writer that does nothing.

  Args:
    run: the folder of the run; the files go into its folder 'tensorboard'.
    start: steps that are done already.
    enabled: whether to write anything; needs the extra [tensorboard].

  Returns:
    A context manager with write(step, metrics).

  Raises:
    UserError: if it is enabled and tensorboardX is not installed.
  """
  folder = pathlib.Path(run) / 'tensorboard' if enabled else None
  return TensorBoardWriter(folder, start=start)
