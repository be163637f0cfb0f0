"""What benchmarks share: steps that go on, processes of their own, a check."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
import contextlib
import multiprocessing
import os
from typing import Any, Literal

from powerprop_jax.core.trees import Tree
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import fusing

# Compiler settings: those JAX comes with, or those of our programs for an α
# that is a Python number or an array (train/scale/fusing.py).
Flags = Literal['none', 'static', 'traced']


def check_known(config: Any, option: str, known: Collection[str]) -> None:
  """Refuses names in a setting that are not among those known."""
  for name in getattr(config, option):
    if name not in known:
      raise UserError(
        f'--{option} has no {name!r}; there are: {", ".join(known)}.'
      )


def going_on(
  step: Callable[..., tuple[Tree, Any]],
  create: Callable[[], Tree],
  batches: Sequence[tuple[Any, ...]],
) -> timing.Program:
  """A program that takes a step for each batch, from where it got to before.

  step(state, *batch) gives the next state, and what else it computes. The first
  state is made in the first run.
  """
  state = None

  def run() -> tuple[Tree, Any]:
    nonlocal state
    if state is None:
      state = create()
    for batch in batches:
      state, found = step(state, *batch)
    return state, found

  return run


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
