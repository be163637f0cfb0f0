"""A scheduler that wants the machine back, and a run that comes back later.

Schedulers send SIGTERM, or what they were asked to send, some time before they
kill. The run saves at the next step and ends with a status that says: start me
again. Under Slurm, two minutes before the time is up:

    #SBATCH --requeue --signal=USR1@120
    srun python program.py --out run --resume
    [ $? -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
"""

from collections.abc import Callable
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: a temporary failure, try again.
EXIT_STATUS = os.EX_TEMPFAIL

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):  # noqa: N818
  """The run was asked to make room, and has saved what it could.

  folder.run_main turns it into one line and EXIT_STATUS. The step is that of
  the latest checkpoint; 0 if there is none, None if several processes have one
  each.

  Example:
    >>> print(Preempted(500, 1000))
    stopped by a signal, saved at step 500 of 1,000; run the same command with
    --resume to continue.
  """

  def __init__(self, step: int | None = None, num_steps: int = 0):
    if step is None:
      where = ''
    elif step:
      where = f', saved at step {step:,} of {num_steps:,}'
    else:
      where = f', before a step was saved, {num_steps:,} in all'
    super().__init__(
      f'stopped by a signal{where}; run the same command with --resume to '
      'continue.'
    )


class SignalWatch:
  """Notices SIGTERM and SIGUSR1 while it is entered, and restores what was.

  With several hosts, a signal to any of them is noticed by all at one step. JAX
  has its own handler of SIGTERM then, which stays; SIGUSR1 is handed on to it.

  Outside the main thread of Python, where no handler can be installed, it
  notices nothing, except with several hosts.

  Example:
    >>> with SignalWatch() as watch:
    ...   before = watch.is_due(1)
    ...   signal.raise_signal(signal.SIGTERM)
    ...   before, watch.is_due(2)
    (False, True)
  """

  def __init__(self) -> None:
    self._is_caught = False
    self._before: dict[int, Callable[..., object] | int | None] = {}

  def is_due(self, step: int) -> bool:
    """Whether to stop after this step: true once a signal has come.

    Several hosts must all ask after each step, and soon learn it at the same.
    """
    if jax.process_count() > 1:
      return bool(multihost_utils.reached_preemption_sync_point(step))
    return self._is_caught

  def __enter__(self) -> 'SignalWatch':
    numbers = _SIGNALS[jax.process_count() > 1 :]
    if threading.current_thread() is threading.main_thread():
      self._before = {n: signal.signal(n, self._catch) for n in numbers}
    return self

  def _catch(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._is_caught = True
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._before.items():
      # None is a handler that was not installed from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
