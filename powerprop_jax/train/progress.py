"""How far a loop is: a bar on a terminal, now and then a line elsewhere.

For loops of your own; those of the library use it too.

    with progress.Progress('training', num_steps) as show:
      for step in range(num_steps):
        ...
        show.update(step + 1, {'loss': loss})
"""

import datetime
import sys
import time
from typing import IO, Any

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Record

# Seconds between two changes of the bar.
_BLINK = 0.1


class Progress:
  """How far a task is, its speed, the time left, and the latest numbers.

  A context manager. What is shown is read off the devices; what is not, a few
  hundred updates a second perhaps, is not waited for.

  Args:
    description: what is done; nothing is shown without one.
    total: units to do.
    unit: what they are called.
    start: how many are done already; they do not count for the speed.
    interval: seconds between two lines, where there is no terminal.
    stream: where to; None is the standard error.

  Example:
    >>> with Progress('training', 2, interval=0, stream=sys.stdout) as show:
    ...   show.update(2, {'loss': 0.25})  # doctest: +ELLIPSIS
    training: 2/2 steps, ... steps/s, took 0:00:00, loss 0.25
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
    self._task = description, total, unit, start
    self._stream = (stream or sys.stderr) if description else None
    self._bar: Any = None
    self._interval = interval
    self._began = self._reported = time.monotonic()
    # What is yet to be shown: units done, when, and numbers.
    self._latest: tuple[int, float, Record] | None = None

  def __enter__(self) -> 'Progress':
    if self._stream is not None and self._stream.isatty():
      description, total, _, start = self._task
      self._interval = _BLINK
      self._bar = _bar(self._stream)
      self._bar.add_task(description, total=total, completed=start)
      self._bar.start()
    return self

  def update(self, done: int, metrics: Record | None = None) -> None:
    """Says how many units are done, and numbers of metrics, perhaps arrays."""
    now = time.monotonic()
    self._latest = done, now, metrics or {}
    if now - self._reported >= self._interval:
      self._show()
      self._reported = now

  def _show(self) -> None:
    if self._stream is None or self._latest is None:
      return
    done, now, metrics = self._latest
    text = self._line(done, now - self._began, metrics)
    if self._bar is None:
      print(text, file=self._stream, flush=True)
    else:
      (task,) = self._bar.task_ids
      self._bar.update(task, completed=done, description=text)
    self._latest = None

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

  def __exit__(self, *exc_info: object) -> None:
    self._show()
    if self._bar is not None:
      self._bar.stop()


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
