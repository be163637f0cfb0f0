"""What a run on a stream writes to metrics.jsonl, and what to continue it with.

A line of means over the steps since the one before:

    {"step": 200, "loss": 6.9, "accuracy": 0.001, "skipped_steps": 0,
     "skipped_images": 1, "images_per_second": 812.3}

A line for each image file that was found to be no image, once:

    {"step": 200, "skipped_image": "n02105855_2933.JPEG", "defect": "…"}

And the scores of evaluations. A log that is restored writes the lines that it
would have written, images per second aside.
"""

from collections.abc import Mapping
import math
import os
import sys
import time

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.scale import guard


class StreamLog:
  """The lines of one run.

  A line that cannot be written, as on a full disk, is kept and tried again with
  the next one, as long as there are not many.

  Args:
    path: of metrics.jsonl; None writes nothing, for all hosts but the first.
    start: steps that are done; lines of later ones are dropped.

  Example:
    >>> with StreamLog(None, 0) as log:
    ...   log.add({'loss': 2.0, 'num_skipped': 0, 'num_in_a_row': 0})
    ...   log.add({'loss': 4.0, 'num_skipped': 0, 'num_in_a_row': 0})
    ...   log.add({'loss': np.nan, 'num_skipped': 1, 'num_in_a_row': 1})
    ...   log.write_means(3, batch_size=256, num_files=0)['loss']
    3.0
  """

  def __init__(self, path: str | os.PathLike[str] | None, start: int):
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
    if self._writer is None:
      return
    try:
      self._writer.close()
    except OSError as error:
      print(f'warning: cannot write metrics: {error}.', file=sys.stderr)
