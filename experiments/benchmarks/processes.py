"""Processes with compiler settings of their own."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import multiprocessing
import os
from typing import Any, Literal

from powerprop_jax.train.scale import fusing

# Compiler settings: those JAX comes with, or those of our programs for an α
# that is a Python number or an array (train/scale/fusing.py).
Flags = Literal['none', 'static', 'traced']


@contextlib.contextmanager
def process_with(
  flags: Flags,
  initializer: Callable[..., object] | None = None,
  initargs: tuple[Any, ...] = (),
) -> Iterator[futures.Executor]:
  """A process with compiler settings of its own, which ends with the context.

  XLA reads its flags once a process, and those that make powerprop fast make a
  dense step slower: a baseline must not be compiled with them. What XLA_FLAGS
  says here is left out. The process starts with initializer(*initargs).
  """
  before = os.environ.get('XLA_FLAGS')
  os.environ['XLA_FLAGS'] = ''
  if flags != 'none':
    fusing.set_cpu_flags(os.environ, static_alpha=flags == 'static')
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(
    1, mp_context=context, initializer=initializer, initargs=initargs
  ) as pool:
    try:
      pool.submit(os.getpid).result()  # starts it while the flags are set
    finally:
      os.environ.pop('XLA_FLAGS')
      if before is not None:
        os.environ['XLA_FLAGS'] = before
    yield pool
