"""How far a loop is, is told in order and is not in the way."""

import io

import jax.numpy as jnp
import pytest

from powerprop_jax.train import progress as progress_lib


class Terminal(io.StringIO):
  def isatty(self):
    return True


class ProgressTest:
  @pytest.fixture
  def clock(self, monkeypatch):
    class Clock:
      now = 100.0

    monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: Clock.now)
    return Clock

  def test_plain_lines_come_at_intervals(self, clock):
    stream = io.StringIO()
    with progress_lib.Progress(
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
    with progress_lib.Progress('a', 10, unit='runs', stream=stream) as progress:
      clock.now += 8000
      progress.update(2)
    assert stream.getvalue() == ('a: 2/10 runs, 0.00025 runs/s, 8:53:20 left\n')

  def test_numbers_that_nobody_sees_are_not_waited_for(self, clock):
    read = []

    class Metrics(dict):
      def items(self):
        read.append(self['done'])
        return super().items()

    stream = Terminal()
    with progress_lib.Progress('a', 100, stream=stream) as progress:
      for done in range(1, 101):
        clock.now += 0.03
        progress.update(done, Metrics(done=done))
    assert read == [*range(4, 101, 4)]

  def test_disabled_or_nothing_done_says_nothing(self, clock):
    stream = io.StringIO()
    with progress_lib.Progress('a', 10, stream=stream):
      pass
    assert stream.getvalue() == ''
    for stream in (io.StringIO(), Terminal()):
      with progress_lib.Progress('', 2, stream=stream) as progress:
        clock.now += 100
        progress.update(1)
      assert stream.getvalue() == ''

  def test_terminal_shows_a_bar(self):
    stream = Terminal()
    with progress_lib.Progress('training [α]', 4, stream=stream) as progress:
      for done in range(5):
        progress.update(done, {'loss': 0.125})
    shown = stream.getvalue()
    assert 'training [α]' in shown
    assert '4/4' in shown
    assert 'loss 0.125' in shown
