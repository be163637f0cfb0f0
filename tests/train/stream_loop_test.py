"""A run on a stream is the same however often it is interrupted."""

import json
import os
import signal

import image_files
import numpy as np
import processes
import pytest
import small
import stream_runs
from stream_runs import Config

from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import preemption
from powerprop_jax.train.scale.stream_loop import StreamLoopConfig


def open_run(path, resume=False):
  return RunFolder(path, {}, program='test', resume=resume)


def loop(**settings):
  lengths = {'num_steps': 24, 'log_every': 4, 'eval_every': 8, 'save_every': 6}
  return StreamLoopConfig(**{**lengths, 'max_skipped': 3, **settings})


def interrupted(path, config, at, **settings):
  """Runs until the step at which a signal comes, and goes on from there."""
  *_, compiled_step = stream_runs.compiled(config.devices)
  done = 0

  def step(*arguments):
    nonlocal done
    done += 1
    if done == at:
      signal.raise_signal(signal.SIGUSR1)
    return compiled_step(*arguments)

  before = signal.getsignal(signal.SIGUSR1)
  with pytest.raises(preemption.Preempted, match=f'saved at step {at} of 24'):
    stream_runs.run(config, open_run(path), step=step, **settings)
  assert signal.getsignal(signal.SIGUSR1) == before
  assert stream_runs.steps_of(path)[-1] == at
  return stream_runs.run(config, open_run(path, resume=True), **settings)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that was never interrupted, with steps that are not finite."""
  folder = tmp_path_factory.mktemp('whole')
  config = Config(loop=loop(), bad=(3, 10, 11))
  state = stream_runs.run(config, open_run(folder))
  assert int(state.num_skipped) == 3
  return config, state, stream_runs.lines(folder)


class LogTest:
  def test_means_scores_and_checkpoints_come_when_they_are_due(self, tmp_path):
    seen = []

    def evaluate(state):
      seen.append(int(state.train.step))
      return {'validation_accuracy': 0.5}

    writer = small.ListWriter()
    state = stream_runs.run(
      Config(loop=loop(num_steps=19)),
      open_run(tmp_path),
      evaluate=evaluate,
      writers=[writer],
    )
    assert (int(state.train.step), int(state.num_skipped)) == (19, 0)
    assert seen == [8, 16, 19]
    assert stream_runs.steps_of(tmp_path) == [12, 18, 19]
    lines = stream_runs.lines(tmp_path)
    found = [{'step': step, **values} for step, values in writer.written]
    for values in found:
      values.pop('images_per_second', None)
    assert found == lines
    assert writer.is_closed
    means = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in means] == [4, 8, 12, 16, 19]
    scores = [line for line in lines if 'validation_accuracy' in line]
    assert [line['step'] for line in scores] == [8, 16, 19]
    assert means[-1]['loss'] < means[0]['loss']
    assert all(line['skipped_steps'] == 0 for line in means)

  def test_means_are_those_of_the_steps(self, tmp_path):
    *_, compiled_step = stream_runs.compiled(0)
    losses = []

    def step(*arguments):
      state, found = compiled_step(*arguments)
      losses.append(float(found['loss']))
      return state, found

    config = Config(loop=loop(max_skipped=5), bad=(2, 9, 10, 11, 12))
    stream_runs.run(config, open_run(tmp_path), step=step)
    text = (tmp_path / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    means = [line for line in lines if 'skipped_steps' in line]
    assert all(line['images_per_second'] > 0 for line in means)
    assert [line['skipped_steps'] for line in means] == [1, 1, 5, 5, 5, 5]
    assert 'loss' not in means[2]
    for line in [*means[:2], *means[3:]]:
      rows = losses[line['step'] - 4 : line['step']]
      expected = np.mean([x for x in rows if np.isfinite(x)])
      assert line['loss'] == pytest.approx(expected, rel=1e-12)


class ResumeTest:
  # The 6th is saved anyway, the 8th is to be evaluated, the 10th is skipped.
  @pytest.mark.parametrize('at', [1, 6, 8, 10, 19, 24])
  @pytest.mark.slow
  def test_numbers_are_those_of_a_run_in_one_go(self, tmp_path, whole, at):
    config, state, lines = whole
    stream_runs.assert_same(interrupted(tmp_path, config, at), state)
    assert stream_runs.lines(tmp_path) == lines

  def test_a_complete_run_stays_as_it_is(self, tmp_path, whole):
    config, state, lines = whole
    for resume in (False, True):
      found = stream_runs.run(config, open_run(tmp_path, resume))
      stream_runs.assert_same(found, state)
      assert stream_runs.lines(tmp_path) == lines

  def test_images_and_what_was_skipped_of_them(self, tmp_path, capsys):
    images = image_files.make_set(tmp_path / 'data', image_files.damaged())
    settings = {'batches': image_files.training(images)}
    config = Config(loop=loop())
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    state = stream_runs.run(config, open_run(whole), **settings)
    warned = capsys.readouterr().err.splitlines()
    stream_runs.assert_same(interrupted(parts, config, 7, **settings), state)
    lines = stream_runs.lines(whole)
    assert stream_runs.lines(parts) == lines
    named = [line['skipped_image'] for line in lines if 'defect' in line]
    assert sorted(named) == ['2.jpg', '3.jpg', '9.jpg']
    means = [line for line in lines if 'loss' in line]
    assert means[-1]['skipped_images'] == 3
    assert sorted(line.split()[1] for line in warned) == sorted(named)
    assert all(line.startswith('warning: ') for line in warned)

  def test_other_data_is_refused(self, tmp_path):
    config = Config(loop=loop())
    with pytest.raises(preemption.Preempted):
      stream_runs.run(config, open_run(tmp_path), evaluate=stop)
    batches = stream_runs.make_batches()._replace(identity={'data': 'others'})
    with pytest.raises(UserError, match="its data is 'colours'"):
      stream_runs.run(config, open_run(tmp_path, True), batches=batches)

  @pytest.mark.slow
  def test_fewer_devices(self, tmp_path):
    config = Config(loop=loop(), devices=8)
    with pytest.raises(preemption.Preempted):
      stream_runs.run(config, open_run(tmp_path), evaluate=stop)
    assert stream_runs.steps_of(tmp_path)[-1] == 9
    config = Config(loop=loop(), devices=4)
    state = stream_runs.run(config, open_run(tmp_path, resume=True))
    assert len(state.train.phi['hidden']['w'].sharding.device_set) == 4
    alone = stream_runs.run(Config(loop=loop()), open_run(tmp_path / 'alone'))
    stream_runs.assert_near(state.train, alone.train)
    losses, others = map(stream_runs.losses, (tmp_path, tmp_path / 'alone'))
    assert losses == pytest.approx(others, abs=1e-5)


def stop(state):
  """An evaluation during which the run is asked to make room."""
  if int(state.train.step) == 8:
    signal.raise_signal(signal.SIGTERM)
  return {}


class NotFiniteTest:
  def test_stops_and_keeps_the_last_good_checkpoint(self, tmp_path, capsys):
    config = Config(loop=loop(save_every=1), bad=(3, 4, 12, 13, 14))
    main = lambda: stream_runs.run(config, open_run(tmp_path))
    assert run_folder.run_main(main) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert '3 steps in a row, the last one being step 14' in line
    assert '--resume continues from the checkpoint of step 11' in line
    assert stream_runs.steps_of(tmp_path) == [9, 10, 11]
    # With data that can be used it goes on from there.
    resumed = stream_runs.run(
      Config(loop=config.loop, bad=(3, 4)), open_run(tmp_path, resume=True)
    )
    assert (int(resumed.train.step), int(resumed.num_skipped)) == (22, 2)

  def test_nothing_saved_is_said(self, tmp_path):
    config = Config(loop=loop(), bad=(1, 2, 3))
    with pytest.raises(UserError, match='continues from the beginning'):
      stream_runs.run(config, open_run(tmp_path))

  def test_infinite_weights_at_the_end_are_not_saved(self, tmp_path, capsys):
    config = Config(loop=loop())
    step = stream_runs.overflowing(24)
    main = lambda: stream_runs.run(config, open_run(tmp_path), step=step)
    assert run_folder.run_main(main) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert 'weights were not finite in step 24. --resume continues' in line
    assert 'from the checkpoint of step 18' in line
    assert stream_runs.steps_of(tmp_path) == [6, 12, 18]
    assert 'validation_step' not in stream_runs.lines(tmp_path)[-1]
    # The same numbers as if it had not happened.
    state = stream_runs.run(config, open_run(tmp_path, resume=True))
    expected = stream_runs.run(config, open_run(tmp_path / 'whole'))
    stream_runs.assert_same(state, expected)

  def test_nor_are_they_after_a_signal(self, tmp_path):
    overflowing = stream_runs.overflowing(20)

    def step(state, images, labels):
      if int(state.train.step) == 20:
        signal.raise_signal(signal.SIGTERM)
      return overflowing(state, images, labels)

    with pytest.raises(preemption.Preempted, match='saved at step 18 of 24'):
      stream_runs.run(Config(loop=loop()), open_run(tmp_path), step=step)
    assert stream_runs.steps_of(tmp_path) == [6, 12, 18]


def test_data_that_ends_is_named(tmp_path):
  batches = stream_runs.make_batches(num_batches=5)
  with pytest.raises(UserError, match='ended after 5 batches, 24 are needed'):
    stream_runs.run(Config(), open_run(tmp_path), batches=batches)


@pytest.mark.slow
class FullDiskTest:
  """From the evaluation at step 8 until another one files are limited."""

  def run(self, *args):
    command = (stream_runs.__file__, '--full-from', 8, *args)
    flags = os.environ['XLA_FLAGS']
    with processes.started(*command, XLA_FLAGS=flags) as process:
      _, err = process.communicate(timeout=300)
    return process.returncode, err.splitlines()

  def test_goes_on_and_tries_again(self, tmp_path):
    status, said = self.run('--full-to', 24, '--out', tmp_path)
    assert status == 0
    line, *others = said
    assert line.startswith('warning: cannot save the checkpoint of step 12: ')
    assert 'File too large. The next one tries again' in line
    assert 'latest complete one is of step 6.' in line
    # That of step 18 may have been written after the limit was lifted.
    assert all('cannot save the checkpoint of step 18' in x for x in others)
    saved = stream_runs.steps_of(tmp_path)
    assert saved == ([6, 24] if others else [6, 18, 24])

  def test_stops_at_the_end_with_what_there_was(self, tmp_path):
    status, said = self.run('--out', tmp_path)
    assert status == 2
    *warnings, error = said
    assert len(warnings) >= 3
    assert all(line.startswith('warning: cannot save') for line in warnings)
    assert error.startswith('error: cannot save the checkpoint of step 24')
    assert 'File too large. The one of step 6 is complete.' in error
    assert {p.name for p in (tmp_path / 'checkpoints').iterdir()} == {'6'}
    # With room, the same command ends as it would have.
    config = Config(full_from=8, out=str(tmp_path))
    state = stream_runs.run(config, stream_runs.open_run(config, resume=True))
    expected = stream_runs.run(Config(), open_run(tmp_path / 'whole'))
    stream_runs.assert_same(state, expected)
