"""The loop visits every step once, evaluates when due, and resumes exactly."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax.train import loop
from powerprop_jax.train.checkpoints.checkpoint import Checkpoints
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Splits
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale.preemption import Preempted

CONFIG = LoopConfig(
  num_steps=23, batch_size=2, eval_every=10, steps_per_dispatch=4
)
ARRAYS = Arrays(np.arange(30, dtype=np.float32), np.zeros(30, int))
SPLITS = Splits(ARRAYS, ARRAYS, ARRAYS, 1, 'numbers')


def advance(state, arrays, rows):
  """A state whose every bit depends on the rows and on their order."""

  def body(state, row):
    return jnp.sin(3 * state + arrays.images[row].sum()), state

  state, before = jax.lax.scan(body, state, rows)
  return state, {'loss': before.mean()}


def interrupt():
  raise KeyboardInterrupt


def preempt():
  signal.raise_signal(signal.SIGTERM)


def fit(
  path,
  calls=None,
  stop_at=None,
  stop=interrupt,
  resume=False,
  begin=None,
  writers=(),
):
  calls = [] if calls is None else calls

  def indices(start, count, batch_size, num_examples):
    if start == stop_at:
      stop()
    calls.append((start, count))
    return np.arange(start, start + count)[:, None] + np.arange(batch_size)

  return loop.fit(
    jnp.float32(0.5),
    advance,
    lambda state, arrays: {'accuracy': state},
    SPLITS,
    CONFIG,
    RunFolder(path, {}, program='test', resume=resume),
    indices=indices,
    begin=begin,
    writers=writers,
  )


def measured(path):
  lines = (path / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


class FitTest:
  def test_every_step_is_visited_once_and_no_dispatch_crosses_an_evaluation(
    self, tmp_path
  ):
    calls = []
    fit(tmp_path, calls=calls)
    assert calls == [
      *[(0, 4), (4, 4), (8, 2)],
      *[(10, 4), (14, 4), (18, 2)],
      (20, 3),
    ]

  def test_logs_and_saves_at_every_evaluation_and_at_the_end(self, tmp_path):
    state = fit(tmp_path)
    found = measured(tmp_path)
    assert [record['step'] for record in found] == [10, 20, 23]
    assert found[-1]['validation_accuracy'] == float(state)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    assert checkpoints.steps() == [10, 20, 23]
    restored = checkpoints.restore_latest(state)
    assert (restored.state, restored.step) == (state, 23)

  def test_writers_get_the_numbers_and_are_closed(self, tmp_path):
    writers = [small.ListWriter(), small.ListWriter()]
    fit(tmp_path / 'whole', writers=writers)
    expected = [
      (record.pop('step'), record) for record in measured(tmp_path / 'whole')
    ]
    assert [writer.written for writer in writers] == [expected] * 2
    assert all(writer.is_closed for writer in writers)
    stopped = small.ListWriter()
    with pytest.raises(KeyboardInterrupt):
      fit(tmp_path / 'part', stop_at=14, writers=[stopped])
    assert stopped.is_closed and stopped.written == expected[:1]

  @pytest.mark.parametrize(
    ('stop', 'stop_at', 'watched', 'saved'),
    [
      *((interrupt, at, False, at - at % 10) for at in (4, 10, 14, 20)),
      (preempt, 0, False, 4),
      (preempt, 4, False, 8),
      (preempt, 8, False, 10),
      (preempt, 20, False, 23),
      # What compares evaluations begins with one.
      *((preempt, at, True, min(at + 10, 23)) for at in (0, 10, 20)),
    ],
  )
  def test_run_that_is_stopped_continues_as_if_nothing_had_happened(
    self, tmp_path, stop, stop_at, watched, saved
  ):
    expected = fit(tmp_path / 'whole')
    begin = [].append if watched else None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, Preempted)) as caught:
      fit(tmp_path / 'parts', stop_at=stop_at, stop=stop, begin=begin)
    if stop is preempt:
      assert f'saved at step {saved} of 23' in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) == before
    found = Checkpoints(tmp_path / 'parts/checkpoints').steps()
    assert max(found, default=0) == saved
    calls = []
    state = fit(tmp_path / 'parts', calls=calls, resume=True, begin=begin)
    assert [start for start, _ in calls][:1] == [saved][: saved < 23]
    assert state == expected
    assert measured(tmp_path / 'parts') == measured(tmp_path / 'whole')

  def test_finished_run_is_returned_without_another_step(self, tmp_path):
    expected = fit(tmp_path)
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    calls = []
    assert fit(tmp_path, calls=calls, resume=True) == expected
    assert calls == []
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before
