"""What a run reports is complete, in order, and not in the way."""

import io
import sys

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

  def test_missing_file_is_named(self, path):
    with pytest.raises(UserError, match='cannot read the metrics'):
      metrics.read_metrics(path)


class Terminal(io.StringIO):
  def isatty(self):
    return True


class ProgressTest:
  @pytest.fixture
  def clock(self, monkeypatch):
    class Clock:
      now = 100.0

    monkeypatch.setattr(metrics.time, 'monotonic', lambda: Clock.now)
    return Clock

  def test_plain_lines_come_at_intervals(self, clock):
    stream = io.StringIO()
    with metrics.Progress(
      'training', 1000, start=200, interval=10, stream=stream
    ) as progress:
      for done in range(250, 1001, 50):
        clock.now += 4
        progress.update(
          done, {'loss': jnp.float32(0.25), 'alpha': None, 'set': 'test'}
        )
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
      'training: 350/1,000 steps, 12 steps/s, 0:00:52 left, loss 0.25'
    )
    assert lines[-1] == (
      'training: 1,000/1,000 steps, 12 steps/s, took 0:01:04, loss 0.25'
    )
    assert len(lines) == 6
    assert len(set(lines)) == 6

  def test_slow_tasks_have_digits_after_the_point(self, clock):
    stream = io.StringIO()
    with metrics.Progress('a', 10, unit='runs', stream=stream) as progress:
      clock.now += 8000
      progress.update(2)
    assert stream.getvalue() == ('a: 2/10 runs, 0.00025 runs/s, 8:53:20 left\n')

  def test_disabled_or_nothing_done_says_nothing(self, clock):
    stream = io.StringIO()
    with metrics.Progress('a', 10, stream=stream):
      pass
    assert stream.getvalue() == ''
    for stream in (io.StringIO(), Terminal()):
      with metrics.Progress('', 2, stream=stream) as progress:
        clock.now += 100
        progress.update(1)
      assert stream.getvalue() == ''

  def test_terminal_shows_a_bar(self):
    stream = Terminal()
    with metrics.Progress('training [α]', 4, stream=stream) as progress:
      for done in range(5):
        progress.update(done, {'loss': 0.125})
    shown = stream.getvalue()
    assert 'training [α]' in shown
    assert '4/4' in shown
    assert 'loss 0.125' in shown


class TensorBoardTest:
  def test_numbers_are_written(self, tmp_path):
    pytest.importorskip('tensorboardX', reason='needs the tensorboard extra')
    with metrics.tensorboard_writer(tmp_path, 0, True) as write:
      write(1, {'loss': jnp.float32(0.5), 'split': 'test'})
      write(1, {'alpha': 1.5, 'key': 0, 'loss': 0.5, 'bad': np.nan})
    (events,) = (tmp_path / 'tensorboard').glob('events*')
    content = events.read_bytes()
    assert b'loss' in content
    assert b'loss/alpha_1.5_key_0' in content
    assert b'split' not in content
    assert b'bad' not in content

  def test_disabled_writes_nothing_and_needs_nothing(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    with metrics.tensorboard_writer(tmp_path, 0, False) as write:
      write(1, {'loss': 0.5})
    assert not any(tmp_path.iterdir())
