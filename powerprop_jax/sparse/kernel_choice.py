"""Which kernel a sparse product takes: the one that was fastest here.

The first program with a product of some shape, batch and number of connections
times all kernels on a random matrix like it, forward and backward, when it is
traced. The times are kept in a file beside the compiled kernels (see
native/cache.py), so that the next program, and a run that is resumed, choose
the same; kernels whose source is another are timed anew. Products of less than
a million operations, and other processors than CPUs, are not worth it: there a
rule decides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import functools
import inspect
import json
import math
import statistics
import time
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.sparse import convolution as sparse_convolution
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import linear, native, plain_convolution
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.linear import Kernel
from powerprop_jax.sparse.native import cache
from powerprop_jax.sparse.plain_convolution import Window

# Multiplications of the dense product below which nothing is measured.
_WORTH_MEASURING = 1_000_000
# Above this density small products are dense.
_DENSE_ABOVE = 0.25
_ROUNDS = 5
_SECONDS_PER_CALL = 0.5
_SECONDS_PER_ROUND = 0.005
# A sparse layer must be this much faster than one that is held dense.
_MARGIN = 0.95
_HELD_DENSE = 'held dense'

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# (x, values or weight) -> y.
_Apply: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
_Run: TypeAlias = Callable[[], Any]


class _Trial(NamedTuple):
  """What is timed for a task: layers, and the shapes that they are timed on."""

  by_kernel: Mapping[str, _Apply]
  held_dense: _Apply
  x: tuple[int, ...]
  y: tuple[int, ...]
  weight: tuple[int, ...]


class Product(NamedTuple):
  """What decides how long a product takes."""

  num_in: int  # The matrix is [num_in, num_out].
  num_out: int
  num_connections: int
  num_vectors: int  # Multiplied at once.
  dtype: str = 'float32'  # Of the vectors.

  @property
  def work(self) -> int:
    """Multiplications with a dense matrix."""
    return self.num_in * self.num_out * self.num_vectors

  def trial(self, index: Index) -> _Trial:
    """Layers with these connections."""
    by_kernel: dict[str, _Apply] = {
      kernel: functools.partial(linear.product, index=index, kernel=kernel)
      for kernel in KERNELS
    }
    x, y = ((self.num_vectors, n) for n in (self.num_in, self.num_out))
    return _Trial(by_kernel, jnp.matmul, x, y, (self.num_in, self.num_out))


class Convolution(NamedTuple):
  """What decides how long a convolution takes; there are no loops for it."""

  images: tuple[int, ...]  # [N, H, W, C]
  num_out: int  # Channels that come out.
  num_connections: int
  window: Window
  dtype: str = 'float32'  # Of the images.

  @property
  def num_in(self) -> int:
    """Entries of the kernel for each channel that comes out."""
    return self.window.height * self.window.width * self.images[-1]

  @property
  def work(self) -> int:
    """Multiplications with a dense kernel."""
    out_shape = self.window.out_shape(self.images, self.num_out)
    return self.num_in * math.prod(out_shape)

  def trial(self, index: Index) -> _Trial:
    """Layers with these connections."""
    window, num_out = self.window, self.num_out
    shape = (window.height, window.width, self.images[-1], num_out)

    def convolve(x: jax.Array, weight: jax.Array) -> jax.Array:
      return plain_convolution.convolve(x, weight, window)

    by_kernel: dict[str, _Apply] = {
      'native': lambda x, values: sparse_convolution.convolve(
        x, values, index, window
      ),
      'dense': lambda x, values: convolve(
        x, linear.dense(values, index).reshape(shape)
      ),
    }
    y = window.out_shape(self.images, num_out)
    return _Trial(by_kernel, convolve, self.images, y, shape)


Task: TypeAlias = Product | Convolution

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
    ...   choose(Product(4096, 4096, 170_000, 128))
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
  """The fastest kernel of those that are allowed here and can compute the task.

  The name of the weight, 'module/name', says that it may as well be held dense:
  see recorded.
  """
  record = _RECORD.get()
  if record is not None:
    if name:
      record[name] = task
    return 'dense'
  kernels = _candidates(task)
  if len(kernels) == 1:
    return kernels[0]
  if jax.default_backend() != 'cpu':
    return 'dense' if 'dense' in kernels else kernels[0]
  if task.work < _WORTH_MEASURING:
    dense = task.num_connections > _DENSE_ABOVE * task.num_in * task.num_out
    return 'dense' if dense and 'dense' in kernels else kernels[0]
  seconds = times(task)
  return min(kernels, key=lambda kernel: seconds[kernel])


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Task]]:
  """Finds out what the layers of a network compute, without measuring it.

  Whatever is traced in this context adds to the dictionary what each layer
  would have to choose a kernel for, by the name that it gives.
  """
  found: dict[str, Task] = {}
  token = _RECORD.set(found)
  try:
    yield found
  finally:
    _RECORD.reset(token)


def pays(task: Task, *, backward: bool = True) -> bool:
  """Whether a layer without its zeros is faster than one that has them.

  The best kernel must take less than 0.95 of the time of a weight that is held
  dense, gradients included with backward. Never on other backends than CPUs,
  nor where there is too little to be measured.
  """
  if jax.default_backend() != 'cpu' or task.work < _WORTH_MEASURING:
    return False
  seconds = times(task, backward=backward)
  best = min(seconds[kernel] for kernel in _candidates(task))
  return best < _MARGIN * seconds[_HELD_DENSE]


def times(task: Task, *, backward: bool = True) -> Mapping[str, float]:
  """Median seconds of every kernel that can compute it, and 'held dense'.

  With backward, gradients included. Measured once on a machine, where files can
  be kept: native/cache.py.
  """
  return _times(_bucket(task), native.is_available(), backward)


def _candidates(task: Task) -> tuple[Kernel, ...]:
  kernels = {*_ALLOWED.get()}
  if isinstance(task, Convolution):
    kernels.discard('loops')
  if (
    jax.default_backend() != 'cpu'
    or task.dtype == 'float64'
    or not native.is_available()
  ):
    kernels.discard('native')
  found = tuple(kernel for kernel in KERNELS if kernel in kernels)
  return found or ('dense',)


def _bucket(task: Task) -> Task:
  """The same with a rounded density: two steps for each factor of two."""
  size = task.num_in * task.num_out
  density = max(task.num_connections, 1) / size
  rounded = round(2 ** (round(2 * math.log2(density)) / 2) * size)
  found: Task = task._replace(num_connections=min(max(rounded, 1), size))
  return found


@functools.cache
def _times(
  task: Task, with_native: bool, backward: bool
) -> Mapping[str, float]:
  # A file for each, so that programs that measure at once lose nothing.
  ways = 'forward and backward' if backward else 'forward'
  measured = (
    f'{native.machine()} jax {jax.__version__} source {_source_digest()} '
    f'{task} {ways}'
  )
  name = f'kernel_times_{cache.digest(measured.encode())}.json'
  kernels = {*KERNELS} - (set() if with_native else {'native'})
  if isinstance(task, Convolution):
    kernels.discard('loops')
  known = _read(name, measured)
  if not {*kernels, _HELD_DENSE} <= set(known):
    # What is being traced must not see this.
    with jax.ensure_compile_time_eval():
      known = _measure(_runs(task, sorted(kernels), backward))
    text = json.dumps({'measured': measured, 'seconds': known}, indent=1)
    with contextlib.suppress(OSError):  # It only saves time.
      cache.write(name, text.encode())
  return known


@functools.cache
def _source_digest() -> str:
  """Of the kernels; '' where a package comes without its source."""
  modules = (plain_convolution, sparse_convolution, sparse_index, linear)
  try:
    texts = [inspect.getsource(module).encode() for module in modules]
    return cache.digest(native.source(), *texts)
  except OSError:
    return ''


def _runs(
  task: Task, kernels: Sequence[str], backward: bool
) -> dict[str, _Run]:
  """A call of each kernel, perhaps with gradients, and 'held dense'."""
  random = np.random.default_rng(0)
  matrix = task.num_in, task.num_out
  chosen = random.choice(math.prod(matrix), task.num_connections, replace=False)
  trial = task.trial(sparse_index.from_positions(np.sort(chosen), matrix))
  x, dy, values, weight = (
    jnp.asarray(random.standard_normal(shape), task.dtype)
    for shape in (trial.x, trial.y, task.num_connections, trial.weight)
  )

  def run(apply: _Apply, weight: jax.Array) -> _Run:
    def both_ways(x: jax.Array, weight: jax.Array, dy: jax.Array) -> Any:
      y, pull_back = jax.vjp(apply, x, weight)
      return y, pull_back(dy)

    if backward:
      return functools.partial(jax.jit(both_ways), x, weight, dy)
    return functools.partial(jax.jit(apply), x, weight)

  found = {kernel: run(trial.by_kernel[kernel], values) for kernel in kernels}
  return {**found, _HELD_DENSE: run(trial.held_dense, weight)}


def _measure(runs: Mapping[str, _Run]) -> dict[str, float]:
  """Median seconds of a call, in interleaved rounds of several."""
  for run in runs.values():
    jax.block_until_ready(run())  # compiles
  num_calls = {
    name: max(1, round(_SECONDS_PER_ROUND / _seconds(run, 1)))
    for name, run in runs.items()
  }
  found: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(_ROUNDS):
    for name, run in runs.items():
      # One long call says enough.
      if not found[name] or found[name][0] < _SECONDS_PER_CALL:
        found[name].append(_seconds(run, num_calls[name]))
  return {name: statistics.median(times) for name, times in found.items()}


def _seconds(run: _Run, num_calls: int) -> float:
  """Seconds of a call, on average."""
  start = time.perf_counter()
  for _ in range(num_calls):
    jax.block_until_ready(run())
  return (time.perf_counter() - start) / num_calls


def _read(name: str, measured: str) -> dict[str, float]:
  """What was kept; nothing if it is damaged, or of something else."""
  try:
    found = json.loads(cache.read(name))
    seconds = {kernel: float(s) for kernel, s in found['seconds'].items()}
    known = found['measured'] == measured
  except Exception:  # Damage may be of any kind.
    return {}
  return seconds if known and all(s > 0 for s in seconds.values()) else {}
