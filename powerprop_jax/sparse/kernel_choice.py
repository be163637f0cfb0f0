"""Which kernel a sparse product takes: a rule of its density.

No clock is looked at, so that a program that is written again, after a stop or
elsewhere, is the same. The densities are those at which a kernel and a dense
product took the same time, forward and backward, on the machine of
docs/results/benchmarks.md; tuning.py times whole functions.
"""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
from typing import NamedTuple, get_args

import jax

from powerprop_jax.sparse import native
from powerprop_jax.sparse.linear import Kernel

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# The density up to which a kernel is faster than a dense product.
_DENSEST: dict[Kernel, float] = {'native': 0.3, 'loops': 0.02, 'dense': 1.0}
# Multiplications of the dense product below which a layer may as well be dense.
_WORTH_IT = 300_000


class Task(NamedTuple):
  """What decides how long a product or a convolution takes."""

  num_in: int  # The matrix is [num_in, num_out].
  num_out: int
  num_connections: int
  num_vectors: (
    int  # Multiplied at once; of a convolution, places of its kernel.
  )
  dtype: str = 'float32'  # Of the vectors.
  is_convolution: bool = False

  @property
  def density(self) -> float:
    """Share of the entries that exist."""
    return self.num_connections / max(self.num_in * self.num_out, 1)

  @property
  def work(self) -> int:
    """Multiplications with a dense matrix."""
    return self.num_in * self.num_out * self.num_vectors


_RECORD: contextvars.ContextVar[dict[str, Task] | None] = (
  contextvars.ContextVar('_RECORD', default=None)
)
_ALLOWED: contextvars.ContextVar[Sequence[Kernel]] = contextvars.ContextVar(
  '_ALLOWED', default=KERNELS
)


@contextlib.contextmanager
def use(*kernels: Kernel) -> Iterator[None]:
  """Lets programs that are traced in this context choose among these kernels.

  use('loops', 'dense') makes a program that other machines can run.

  Example:
    >>> with use('loops'):
    ...   choose(Task(4096, 4096, 170_000, 128))
    'loops'
  """
  unknown = [kernel for kernel in kernels if kernel not in KERNELS]
  if unknown or not kernels:
    raise ValueError(
      f'kernels must be some of {", ".join(KERNELS)}, got '
      f'{", ".join(map(repr, unknown)) or "none"}.'
    )
  token = _ALLOWED.set(kernels)
  try:
    yield
  finally:
    _ALLOWED.reset(token)


def choose(task: Task, *, name: str = '') -> Kernel:
  """The kernel for a task, of those that are allowed here and can compute it.

  The name of the weight, 'module/name', is for those who record.
  """
  record = _RECORD.get()
  if record is not None:
    if name:
      record[name] = task
    return 'dense'
  kernels = _candidates(task)
  for kernel in kernels:
    if task.density <= _DENSEST[kernel]:
      return kernel
  return 'dense' if 'dense' in kernels else kernels[0]


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Task]]:
  """Finds out what the layers of a network compute.

  Whatever is traced in this context adds to the dictionary what each layer
  would have to choose a kernel for, by the name that it gives.
  """
  found: dict[str, Task] = {}
  token = _RECORD.set(found)
  try:
    yield found
  finally:
    _RECORD.reset(token)


def pays(task: Task) -> bool:
  """Whether a layer without its zeros is faster than one that has them.

  Never on other backends than CPUs, nor where there is little to compute.
  """
  sparse = {*_candidates(task)} - {'dense'}
  return task.work >= _WORTH_IT and any(
    task.density <= _DENSEST[kernel] for kernel in sparse
  )


def _candidates(task: Task) -> Sequence[Kernel]:
  """From the fastest on, for few connections."""
  kernels = {*_ALLOWED.get()}
  if task.is_convolution:
    kernels.discard('loops')
  if task.dtype == 'float64' or not native.is_available():
    kernels.discard('native')
  if jax.default_backend() != 'cpu':
    kernels.discard('native')
    # A loop is for who asks for it.
    kernels -= {'loops'} if 'dense' in kernels else set()
  return [k for k in KERNELS if k in kernels] or ['dense']
