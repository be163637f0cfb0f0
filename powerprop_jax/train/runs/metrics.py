"""What a run reports while it goes: JSON lines, progress, TensorBoard.

metrics.jsonl is the record; the other two are for watching.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import IO, Any

from powerprop_jax.files import json_files, whole
from powerprop_jax.files.tables import Record, Row
from powerprop_jax.train.runs.errors import UserError


class MetricsWriter:
  """Appends measurements to a file, one JSON object a line.

  Each line is complete on disk when write returns, as far as a killed process
  is concerned. Use it as a context manager, or call close.
  """

  def __init__(self, path: str | os.PathLike[str], *, start: int = 0):
    """Opens the file, at the step from which a resumed run continues.

    Lines of later steps than start are dropped: the resumed run writes them
    again. So is a last line that was cut off. Write the measurements of a step
    before saving the checkpoint of that step, and none are lost.
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

  def write(self, step: int, metrics: Record) -> None:
    """Appends what was measured after so many training steps."""
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
  """What MetricsWriter wrote, without a last line that was cut off.

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


def _line(record: Record) -> str:
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
    stream: IO[str] | None = None,
  ):
    """Starts the clock; nothing is shown without a description.

    Args:
      start: how many are done already; they do not count for the speed.
      interval: seconds between two lines, where there is no terminal.
    """
    self._task = description, total, unit, start
    self._interval = interval
    self._stream = (stream or sys.stderr) if description else None
    self._began = self._reported = time.monotonic()
    self._text = ''
    self._bar: Any = None

  def __enter__(self) -> 'Progress':
    if self._stream is not None and self._stream.isatty():
      description, total, _, start = self._task
      self._bar = _bar(self._stream)
      self._bar.add_task(description, total=total, completed=start)
      self._bar.start()
    return self

  def update(self, done: int, metrics: Record | None = None) -> None:
    """Reports how many units are done, and numbers of metrics."""
    now = time.monotonic()
    self._text = self._line(done, now - self._began, metrics or {})
    if self._bar is not None:
      self._bar.update(
        self._bar.task_ids[0], completed=done, description=self._text
      )
    elif now - self._reported >= self._interval:
      self._print()
      self._reported = now

  def _line(self, done: int, seconds: float, metrics: Record) -> str:
    description, total, unit, start = self._task
    parts = [f'{description}: {done:,}/{total:,} {unit}']
    if seconds > 0 and done > start:
      speed = (done - start) / seconds
      digits = ',.0f' if speed >= 10 else '.2g'
      left = datetime.timedelta(seconds=round((total - done) / speed))
      took = datetime.timedelta(seconds=round(seconds))
      parts += [f'{speed:{digits}} {unit}/s']
      parts += [f'{left} left' if done < total else f'took {took}']
    parts += [
      f'{name} {value:.4g}'
      for name, value in json_files.to_json(metrics).items()
      if isinstance(value, (int, float))
    ]
    return ', '.join(parts)

  def _print(self) -> None:
    if self._stream is not None and self._text:
      print(self._text, file=self._stream, flush=True)
    self._text = ''

  def __exit__(self, *exc_info: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    else:
      self._print()


def _bar(stream: IO[str]) -> Any:
  import rich.console
  import rich.progress
  import rich.table

  return rich.progress.Progress(
    rich.progress.BarColumn(bar_width=20),
    rich.progress.TextColumn(
      '{task.description}',
      markup=False,
      table_column=rich.table.Column(no_wrap=True, overflow='crop'),
    ),
    console=rich.console.Console(file=stream),
  )


def check_tensorboard(enabled: bool) -> None:
  """Refuses to write for TensorBoard without its package; call it early."""
  if enabled and importlib.util.find_spec('tensorboardX') is None:
    raise UserError(
      'TensorBoard files are written with tensorboardX; install it with: pip '
      "install 'powerprop_jax[tensorboard]', or leave --tensorboard out."
    )


@contextlib.contextmanager
def tensorboard_writer(
  run: str | os.PathLike[str], start: int, enabled: bool
) -> Iterator[Callable[[int, Record], None]]:
  """What writes (step, numbers) for TensorBoard, in the folder of a run.

  The curves of several networks are told apart by 'alpha' and 'key', as
  'loss/alpha_2_key_0'. TensorBoard hides what an interrupted run wrote after
  the step of the start. Not enabled, nothing is written.
  """
  check_tensorboard(enabled)
  if not enabled:
    yield lambda step, metrics: None
    return
  import tensorboardX

  with tensorboardX.SummaryWriter(
    os.fspath(pathlib.Path(run) / 'tensorboard'),
    purge_step=start + 1 if start else None,
  ) as summary:

    def write(step: int, metrics: Record) -> None:
      values = dict(json_files.to_json(metrics))
      names = [name for name in ('alpha', 'key') if name in values]
      network = '_'.join(f'{name}_{values.pop(name):g}' for name in names)
      for name, value in values.items():
        if isinstance(value, (int, float)):
          tag = f'{name}/{network}' if network else name
          summary.add_scalar(tag, value, step)

    yield write
