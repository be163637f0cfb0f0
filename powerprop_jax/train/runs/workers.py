"""Independent pieces of work in processes of their own, one thread each.

A small network keeps one core busy; two of them side by side use two cores
better than two threads of one. JAX reads its settings once a process, so the
processes are started afresh, with the settings in their environment.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from typing import TypeVar

from powerprop_jax.train.scale import preemption

T = TypeVar('T')
R = TypeVar('R')

_INTERVAL = 1.0  # seconds

# What makes XLA compute with a single thread on a CPU.
_ONE_THREAD = {
  'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false',
  'NPROC': '1',
  'OMP_NUM_THREADS': '1',
}


def run(
  work: Callable[[T], R],
  items: Sequence[T],
  num_workers: int,
  watch: Callable[[], None],
) -> Iterator[tuple[T, R]]:
  """Gives (item, result) of all work, num_workers at a time, as it is done.

  When the iterator is closed, or this process is interrupted or killed, what is
  unfinished is abandoned.

  Args:
    work: a function at the top level of a module; it and what it takes and
      gives must be picklable. If it raises, so does this.
    watch: called each second while waiting, e.g. to show progress.

  Raises:
    Preempted: after SIGTERM or SIGUSR1, when every process that has a watch of
      its own has saved what it was doing.
  """
  pool = futures.ProcessPoolExecutor(
    num_workers,
    mp_context=multiprocessing.get_context('spawn'),
    initializer=follow_parent,
  )
  pending: dict[futures.Future[R], T] = {}
  try:
    with preemption.SignalWatch() as signals:
      with one_thread():
        do = functools.partial(_end_if_preempted, work)
        pending = {pool.submit(do, item): item for item in items}
      while pending:
        done, _ = futures.wait(
          pending, _INTERVAL, return_when=futures.FIRST_COMPLETED
        )
        watch()
        if signals.is_due(0):
          for process in multiprocessing.active_children():
            process.terminate()
          for process in multiprocessing.active_children():
            process.join()
          raise preemption.Preempted()
        for future in done:
          yield pending.pop(future), future.result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    if pending:
      for process in multiprocessing.active_children():
        process.kill()


def _end_if_preempted(work: Callable[[T], R], item: T) -> R:
  try:
    return work(item)
  except preemption.Preempted:
    # This process was asked to end, not to go on with another item.
    os._exit(preemption.EXIT_STATUS)


def follow_parent() -> None:
  """Makes a worker end with the process that started it, and only then."""
  # Ctrl-C reaches every process of a terminal; the first one ends the others.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def end() -> None:
    # If it was killed, nobody ends the workers, and they would go on writing
    # into folders that may be in use again.
    parent.join()
    os._exit(1)

  threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
  """The environment for processes that are started meanwhile."""
  before = {n: os.environ[n] for n in _ONE_THREAD if n in os.environ}
  flags = f'{before.get("XLA_FLAGS", "")} {_ONE_THREAD["XLA_FLAGS"]}'
  os.environ.update(_ONE_THREAD | {'XLA_FLAGS': flags})
  try:
    yield
  finally:
    for name in _ONE_THREAD:
      os.environ.pop(name)
    os.environ.update(before)
