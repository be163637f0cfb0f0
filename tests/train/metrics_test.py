"""The record of a run is complete and in order."""

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.train.runs import metrics
from powerprop_jax.train.runs.errors import UserError


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


def write(path, steps, start=0):
  with metrics.MetricsWriter(path, start=start) as writer:
    for step in steps:
      writer.write(step, {'loss': 1 / (step + 1)})


def steps_in(path):
  return [record['step'] for record in metrics.read_metrics(path)]


class MetricsWriterTest:
  def test_records_come_back(self, path):
    with metrics.MetricsWriter(path) as writer:
      writer.write(0, {'alpha': np.float32(2), 'loss': jnp.float32(0.5)})
      writer.write(np.int64(10), {'loss': float('nan'), 'split': 'tést'})
      # Lines are there before the file is closed.
      assert metrics.read_metrics(path) == [
        {'step': 0, 'alpha': 2.0, 'loss': 0.5},
        {'step': 10, 'loss': None, 'split': 'tést'},
      ]

  def test_resumed_file_equals_an_uninterrupted_one(self, path, tmp_path):
    whole = tmp_path / 'whole.jsonl'
    steps = [0, 10, 10, 20, 20, 30, 40]
    write(whole, steps)
    for length in range(whole.stat().st_size):
      # A line that is cut, if only its end, does not count.
      path.write_bytes(whole.read_bytes()[:length])
      found = steps_in(path)
      assert found == steps[: len(found)]
      done = max((s for s in found if s <= 20 and s != found[-1]), default=0)
      write(path, [s for s in steps if s > done or not done], start=done)
      assert path.read_bytes() == whole.read_bytes()
    # No start is a new file.
    write(path, [0])
    assert steps_in(path) == [0]

  @pytest.mark.parametrize('line', ['{"st', '{"loss": 1}', '[]', '7', 'null'])
  def test_bad_line_in_the_middle_is_refused_and_kept(self, path, line):
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    with pytest.raises(UserError, match=r'line 2 of .* is not a measurement'):
      metrics.MetricsWriter(path, start=1)
    assert path.read_text() == content

  def test_the_folder_is_made(self, tmp_path):
    path = tmp_path / 'runs/mine/metrics.jsonl'
    with metrics.MetricsWriter(path) as writer:
      writer.write(1, {'loss': 0.5})
    assert metrics.read_metrics(path) == [{'step': 1, 'loss': 0.5}]

  def test_missing_file_is_named(self, path):
    with pytest.raises(UserError, match='cannot read the metrics'):
      metrics.read_metrics(path)
