"""Work is done in other processes, each told to use one thread."""

import os
import pathlib
import signal
import time

import processes
import pytest

from powerprop_jax.train.runs import workers
from powerprop_jax.train.scale import preemption


def settings(name):
  return os.getpid(), os.environ.get(name, '')


def fail(text):
  raise ValueError(text)


def test_every_item_is_done_elsewhere_with_one_thread():
  before = dict(os.environ)
  names = ['XLA_FLAGS', 'NPROC', 'OMP_NUM_THREADS', 'XLA_FLAGS']
  looks = []
  found = list(workers.run(settings, names, 2, lambda: looks.append(1)))
  assert sorted(name for name, _ in found) == sorted(names)
  for name, (process, value) in found:
    assert process != os.getpid()
    one = '--xla_cpu_multi_thread_eigen=false' if name == 'XLA_FLAGS' else '1'
    assert value.endswith(one)
  assert looks
  assert dict(os.environ) == before


def test_failure_of_an_item_is_raised_here():
  with pytest.raises(ValueError, match='no such thing'):
    list(workers.run(fail, ['no such thing'], 1, lambda: None))


def write_until_stopped(path):
  while True:
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(0.05)


def save_when_asked(path):
  with preemption.SignalWatch() as watch:
    pathlib.Path(path).write_text('begun')
    _wait_until(lambda: watch.is_due(1))
  pathlib.Path(path).write_text('saved')
  raise preemption.Preempted(1, 2)


PROGRAM = """
import sys, workers_test
from powerprop_jax.train.runs import folder, workers

def main():
  work, *items = sys.argv[1:]
  work = getattr(workers_test, work)
  list(workers.run(work, items, 1, lambda: None))

if __name__ == '__main__':
  sys.exit(folder.run_main(main))
"""


def start(tmp_path, work, *names):
  """A program that does the work for files, one after another."""
  (tmp_path / 'program.py').write_text(PROGRAM)
  files = [tmp_path / name for name in names]
  return processes.started(tmp_path / 'program.py', work, *files)


@pytest.mark.slow
def test_signal_makes_workers_save_and_begin_nothing_else(tmp_path):
  with start(tmp_path, 'save_when_asked', 'one', 'two') as parent:
    _wait_until((tmp_path / 'one').exists)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
  assert parent.returncode == preemption.EXIT_STATUS
  assert err == (
    'stopped by a signal; run the same command with --resume to continue.\n'
  )
  assert (tmp_path / 'one').read_text() == 'saved'
  assert not (tmp_path / 'two').exists()


def test_workers_end_when_their_parent_is_killed(tmp_path):
  written = tmp_path / 'pid'
  with start(tmp_path, 'write_until_stopped', 'pid') as parent:
    _wait_until(written.exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(0.5)
    written.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not written.exists()


def _wait_until(condition):
  for _ in range(600):
    if condition():
      return
    time.sleep(0.1)
  raise AssertionError('nothing happened for a minute')
