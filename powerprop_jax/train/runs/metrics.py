"""The record of a run: measurements as JSON lines, in metrics.jsonl.

It is a writer like those of writers.py, which are for watching; reports and
runs that are continued read this one.
"""

import json
import os
import pathlib

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
    self._path.parent.mkdir(parents=True, exist_ok=True)
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
