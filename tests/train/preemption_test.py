"""Signals make a run save and stop; whoever starts it again loses nothing."""

import contextlib
import os
import signal
import sys
import threading
import time

import processes
import pytest
import stream_runs
from stream_runs import Config

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


class SignalWatchTest:
  @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
  def test_notices_and_puts_back_what_was(self, number):
    found = []
    before = signal.signal(number, lambda *_: found.append(number))
    try:
      with contextlib.suppress(KeyError), SignalWatch() as watch:
        assert not watch.is_due(1)
        os.kill(os.getpid(), number)
        assert watch.is_due(2) and watch.is_due(3)
        os.kill(os.getpid(), number)
        assert not found
        raise KeyError
      os.kill(os.getpid(), number)
      assert found == [number]
    finally:
      signal.signal(number, before)

  def test_other_threads_train_without(self):
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
  def test_saves_stops_and_continues(self, tmp_path):
    """With a worker process, which the scheduler signals as well."""
    config = Config(
      loop=LOOP, delay=0.1, num_workers=1, out=str(tmp_path / 'run')
    )
    with processes.started(
      stream_runs.__file__,
      *('--out', config.out, '--num-workers', '1', *LENGTHS),
      XLA_FLAGS=os.environ['XLA_FLAGS'],
    ) as process:
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
    assert stream_runs.steps_of(tmp_path / 'run') == [reached]
    state = stream_runs.run(config, stream_runs.open_run(config, resume=True))
    whole = Config(loop=LOOP, out=str(tmp_path / 'whole'))
    expected = stream_runs.run(whole, stream_runs.open_run(whole))
    stream_runs.assert_same(state, expected)
    assert stream_runs.lines(tmp_path / 'run') == stream_runs.lines(
      tmp_path / 'whole'
    )

  @pytest.mark.slow
  def test_all_hosts_stop_at_the_same_step(self, tmp_path):
    processes.free_port()
    arguments = (
      *(*processes.TWO_HOSTS, '--devices', '2', '--'),
      *(sys.executable, stream_runs.__file__, '--out', str(tmp_path)),
      *('--devices', '4', *LENGTHS),
    )
    with processes.started(*arguments) as process:
      for line in process.stdout:
        if line == '5\n':  # there are lines of gloo too
          break
      children = f'/proc/{process.pid}/task/{process.pid}/children'
      with open(children, encoding='utf-8') as file:
        one = int(file.read().split()[1])
      os.kill(one, signal.SIGUSR1)
      _, err = process.communicate(timeout=300)
    assert process.returncode == 75
    [saved] = stream_runs.steps_of(tmp_path)
    assert err.count('stopped by') == 2
    assert err.count(f'saved at step {saved} of 40') == 2
    with processes.started(*arguments, '--resume') as process:
      _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert stream_runs.steps_of(tmp_path)[-1] == 40
    losses = [x['step'] for x in stream_runs.lines(tmp_path) if 'loss' in x]
    assert losses == list(range(4, 41, 4))
