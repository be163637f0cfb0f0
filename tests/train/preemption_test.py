"""Signals make a run save and stop; whoever starts it again loses nothing."""

import os
import signal
import sys
import threading
import time

import processes
import pytest
import stream_runs
from stream_runs import Config

from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.scale.preemption import SignalWatch
from powerprop_jax.train.scale.stream_loop import StreamLoopConfig

LOOP = StreamLoopConfig(
  num_steps=40, log_every=4, eval_every=8, save_every=30, max_skipped=3
)
LENGTHS = (
  *('--loop.num-steps', '40', '--loop.log-every', '4'),
  *('--loop.eval-every', '8', '--loop.save-every', '30'),
  *('--loop.max-skipped', '3', '--delay', '0.1'),
)


def test_other_threads_train_without():
  found = []

  def work():
    with SignalWatch() as watch:
      found.append((signal.getsignal(signal.SIGTERM), watch.is_due(1)))

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [(before, False)]


class ProcessTest:
  @pytest.mark.slow
  def test_saves_and_stops_with_its_workers(self, tmp_path):
    # A scheduler signals all of them.
    args = ('--out', tmp_path, '--num-workers', '1', *LENGTHS)
    with processes.started(stream_runs.__file__, *args) as process:
      for line in process.stdout:
        if int(line) == 10:
          break
      os.killpg(process.pid, signal.SIGTERM)
      out, err = process.communicate(timeout=120)
    assert process.returncode == 75
    reached = [10, *map(int, out.split())][-1]
    assert err == (
      f'stopped by a signal, saved at step {reached} of 40; run the same '
      'command with --resume to continue.\n'
    )
    with pytest.raises(ProcessLookupError):
      for _ in range(300):
        os.killpg(process.pid, 0)  # until no worker is left
        time.sleep(0.1)
    assert 10 <= reached < 20
    assert stream_runs.steps_of(tmp_path) == [reached]

  @pytest.mark.slow
  def test_all_hosts_stop_at_the_same_step_and_train_as_one(self, tmp_path):
    processes.free_port()
    flags = {'XLA_FLAGS': os.environ['XLA_FLAGS']}
    arguments = (
      *(*processes.TWO_HOSTS, '--devices', '2', '--'),
      *(sys.executable, stream_runs.__file__, '--out', str(tmp_path)),
      *('--devices', '4', '--signal-at', '5', *LENGTHS),
    )
    with processes.started(*arguments, **flags) as process:
      _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    [saved] = stream_runs.steps_of(tmp_path)
    assert err.count('stopped by') == 2
    assert err.count(f'saved at step {saved} of 40') == 2
    processes.run(*arguments, '--resume', **flags)
    one = Config(loop=LOOP, devices=4, out=str(tmp_path / 'one'))
    state = stream_runs.run(one, stream_runs.open_run(one))
    folder = tmp_path / 'checkpoints'
    found, step, _ = checkpoint.Checkpoints(folder).restore_latest(state)
    assert step == 40
    stream_runs.assert_near(found.train, state.train)
    losses, others = map(stream_runs.losses, (tmp_path, one.out))
    assert list(losses) == list(range(4, 41, 4))
    assert losses == pytest.approx(others, abs=1e-5)
