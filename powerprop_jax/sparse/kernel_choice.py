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
from typing import Any, NamedTuple, cast, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.sparse import (
  convolution as sparse_convolution,
)
from powerprop_jax.sparse import (
  index as sparse_index,
)
from powerprop_jax.sparse import (
  linear,
  native,
  plain_convolution,
)
from powerprop_jax.sparse.convolution import Window
from powerprop_jax.sparse.linear import Kernel
from powerprop_jax.sparse.native import cache

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

Run = Callable[[], Any]

_KERNELS: tuple[Kernel, ...] = get_args(Kernel)
_RECORD: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
  '_RECORD', default=None
)
_ALLOWED: contextvars.ContextVar[tuple[Kernel, ...] | None] = (
  contextvars.ContextVar('_ALLOWED', default=None)
)


class Product(NamedTuple):
  """What decides how long a product takes.

  Attributes:
    num_in: length of the vectors.
    num_out: length of their products.
    num_connections: of the matrix.
    num_vectors: that are multiplied at once.
    dtype: name of the dtype of the vectors.
  """

  num_in: int
  num_out: int
  num_connections: int
  num_vectors: int
  dtype: str = 'float32'

  @property
  def num_entries(self) -> int:
    """Connections that the matrix could have."""
    return self.num_in * self.num_out

  @property
  def work(self) -> int:
    """Multiplications with a dense matrix."""
    return self.num_entries * self.num_vectors

  def runs(self, kernels: Sequence[str], backward: bool) -> dict[str, Run]:
    """A call of each kernel, perhaps with gradients, and 'held dense'."""
    make = _both_ways if backward else _one_way
    draw = _Draw(self.num_entries, self.num_connections)
    index = draw.index((self.num_in, self.num_out))
    x = draw.normal(self.num_vectors, self.num_in).astype(self.dtype)
    dy = draw.normal(self.num_vectors, self.num_out).astype(self.dtype)
    values = draw.normal(index.positions.size).astype(self.dtype)
    weight = draw.normal(self.num_in, self.num_out).astype(self.dtype)
    by_kernel = {
      kernel: functools.partial(
        linear.product, index=index, kernel=cast(Kernel, kernel)
      )
      for kernel in kernels
    }
    found = {k: make(f, x, values, dy) for k, f in by_kernel.items()}
    return {**found, _HELD_DENSE: make(jnp.matmul, x, weight, dy)}


class Convolution(NamedTuple):
  """What decides how long a convolution takes.

  Attributes:
    images: [N, H, W, C].
    num_out: channels that come out.
    num_connections: of the kernel.
    window: how the kernel moves.
  """

  images: tuple[int, ...]
  num_out: int
  num_connections: int
  window: Window

  @property
  def dtype(self) -> str:
    """Of the images; sparse_convolution has no other."""
    return 'float32'

  @property
  def num_in(self) -> int:
    """Entries of the kernel for each channel that comes out."""
    return self.window.height * self.window.width * self.images[-1]

  @property
  def num_entries(self) -> int:
    """Connections that the kernel could have."""
    return self.num_in * self.num_out

  @property
  def work(self) -> int:
    """Multiplications with a dense kernel."""
    out_shape = self.window.out_shape(self.images, self.num_out)
    return self.num_in * math.prod(out_shape)

  def runs(self, kernels: Sequence[str], backward: bool) -> dict[str, Run]:
    """A call of each kernel, perhaps with gradients, and 'held dense'."""
    make = _both_ways if backward else _one_way
    height, width, stride, pads = self.window
    draw = _Draw(self.num_entries, self.num_connections)
    index = draw.index((self.num_in, self.num_out))
    x = draw.normal(*self.images)
    dy = draw.normal(*self.window.out_shape(self.images, self.num_out))
    values = draw.normal(index.positions.size)
    shape = (height, width, self.images[-1], self.num_out)

    def convolve(x: jax.Array, weight: jax.Array) -> jax.Array:
      return plain_convolution.convolve(x, weight, stride, pads)

    def convolve_copy(x: jax.Array, values: jax.Array) -> jax.Array:
      weight = linear.dense(values, index).reshape(shape)
      return convolve(x, weight)

    def convolve_connections(x: jax.Array, values: jax.Array) -> jax.Array:
      return sparse_convolution.convolve(x, values, index, self.window)

    by_kernel = {'native': convolve_connections, 'dense': convolve_copy}
    found = {
      kernel: make(by_kernel[kernel], x, values, dy)
      for kernel in kernels
      if kernel in by_kernel
    }
    weight = draw.normal(*shape)
    return {**found, _HELD_DENSE: make(convolve, x, weight, dy)}


class _Draw:
  """Random numbers and connections, alike in every program."""

  def __init__(self, num_entries: int, num_connections: int):
    self._random = np.random.default_rng(0)
    self._places = np.sort(
      self._random.choice(num_entries, num_connections, replace=False)
    )

  def index(self, shape: tuple[int, int]) -> sparse_index.Index:
    return sparse_index.from_positions(self._places, shape)

  def normal(self, *shape: int) -> jax.Array:
    return jnp.asarray(self._random.standard_normal(shape), jnp.float32)


def _both_ways(
  apply: Callable[..., jax.Array], x: jax.Array, weight: jax.Array, dy: Any
) -> Run:
  """A call of a layer and its gradients."""

  @jax.jit
  def run(x: jax.Array, weight: jax.Array, dy: jax.Array) -> Any:
    y, pull_back = jax.vjp(apply, x, weight)
    return y, pull_back(dy)

  return functools.partial(run, x, weight, dy)


def _one_way(
  apply: Callable[..., jax.Array], x: jax.Array, weight: jax.Array, dy: Any
) -> Run:
  """A call of a layer alone."""
  del dy
  return functools.partial(jax.jit(apply), x, weight)


@contextlib.contextmanager
def use(*kernels: Kernel) -> Iterator[None]:
  """Lets programs that are traced in this context choose among these kernels.

  Args:
    *kernels: 'native', 'loops', 'dense', at least one. use('loops', 'dense')
      makes a program that other machines can run.

  Yields:
    Nothing; the effect ends with the context.

  Raises:
    ValueError: if there is none, or an unknown one.

  Example:
    >>> with use('loops'):
    ...   choose(Product(4096, 4096, 170_000, 128))
    'loops'
  """
  unknown = [kernel for kernel in kernels if kernel not in _KERNELS]
  if unknown or not kernels:
    raise ValueError(
      f'kernels must be some of {", ".join(_KERNELS)}, got '
      f'{", ".join(map(repr, unknown)) or "none"}.'
    )
  token = _ALLOWED.set(kernels)
  try:
    yield
  finally:
    _ALLOWED.reset(token)


def choose(task: Product | Convolution) -> Kernel:
  """The kernel for a product or a convolution.

  Args:
    task: what is to be computed.

  Returns:
    The fastest of those that are allowed here and can compute it. There are no
    loops for convolutions.
  """
  record = _RECORD.get()
  if record is not None:
    record[f'{hk.current_name()}/w'] = task
    return 'dense'
  kernels = _candidates(task)
  if len(kernels) == 1:
    return kernels[0]
  if jax.default_backend() != 'cpu':
    return 'dense' if 'dense' in kernels else kernels[0]
  if task.work < _WORTH_MEASURING:
    dense = task.num_connections > _DENSE_ABOVE * task.num_entries
    return 'dense' if dense and 'dense' in kernels else kernels[0]
  seconds = times(task)
  return min(kernels, key=lambda kernel: seconds[kernel])


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Product | Convolution]]:
  """Finds out what the layers of a network compute, without measuring it.

  Yields:
    A dictionary; whatever is traced in this context adds what each condensed
    layer would have to choose a kernel for, by the name of its weight,
    'module/w'.
  """
  found: dict[str, Product | Convolution] = {}
  token = _RECORD.set(found)
  try:
    yield found
  finally:
    _RECORD.reset(token)


def pays(task: Product | Convolution, *, backward: bool = True) -> bool:
  """Whether a layer without its zeros is faster than one that has them.

  Args:
    task: the product or convolution.
    backward: whether its gradients are taken too, as in training.

  Returns:
    True if the best kernel took less than 0.95 of the time of one with a weight
    that is held dense. False on other backends than CPUs, and for what is too
    small to be measured.
  """
  if jax.default_backend() != 'cpu' or task.work < _WORTH_MEASURING:
    return False
  seconds = times(task, backward=backward)
  best = min(seconds[kernel] for kernel in _candidates(task))
  return best < _MARGIN * seconds[_HELD_DENSE]


def times(
  task: Product | Convolution, *, backward: bool = True
) -> Mapping[str, float]:
  """Median seconds of every kernel and of a weight that is held dense.

  Measured once on a machine, where files can be kept: native/cache.py.

  Args:
    task: what is computed.
    backward: whether its gradients are taken too.

  Returns:
    {kernel: seconds}, of those that can compute it, and 'held dense'.
  """
  return _times(_bucket(task), native.is_available(), backward)


def _candidates(task: Product | Convolution) -> tuple[Kernel, ...]:
  kernels = set(_ALLOWED.get() or _KERNELS)
  if isinstance(task, Convolution):
    kernels.discard('loops')
  if (
    jax.default_backend() != 'cpu'
    or task.dtype == 'float64'
    or not native.is_available()
  ):
    kernels.discard('native')
  found = tuple(kernel for kernel in _KERNELS if kernel in kernels)
  return found or ('dense',)


def _bucket(task: Any) -> Any:
  """The same with a rounded density: two steps for each factor of two."""
  density = max(task.num_connections, 1) / task.num_entries
  rounded = 2 ** (round(2 * math.log2(density)) / 2) * task.num_entries
  return task._replace(
    num_connections=min(max(round(rounded), 1), task.num_entries)
  )


@functools.cache
def _times(
  task: Product | Convolution, with_native: bool, backward: bool
) -> Mapping[str, float]:
  # A file for each, so that programs that measure at once lose nothing.
  ways = 'forward and backward' if backward else 'forward'
  measured = (
    f'{native.machine()} jax {jax.__version__} source {_source_digest()} '
    f'{task} {ways}'
  )
  name = f'kernel_times_{cache.digest(measured.encode())}.json'
  missing = set() if with_native else {'native'}
  if isinstance(task, Convolution):
    missing.add('loops')
  kernels = [kernel for kernel in _KERNELS if kernel not in missing]
  known = _read(name, measured)
  if not {*kernels, _HELD_DENSE} <= set(known):
    # What is being traced must not see this.
    with jax.ensure_compile_time_eval():
      known = _measure(task.runs(kernels, backward))
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


def _measure(runs: Mapping[str, Run]) -> dict[str, float]:
  """Median seconds of a call, in interleaved rounds of several."""
  for run in runs.values():
    jax.block_until_ready(run())  # compiles
  num_calls = {}
  for name, run in runs.items():
    seconds = _seconds(run, 1)
    num_calls[name] = max(1, round(_SECONDS_PER_ROUND / seconds))
  found: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(_ROUNDS):
    for name, run in runs.items():
      # One long call says enough.
      if not found[name] or found[name][0] < _SECONDS_PER_CALL:
        found[name].append(_seconds(run, num_calls[name]))
  return {name: statistics.median(times) for name, times in found.items()}


def _seconds(run: Run, num_calls: int) -> float:
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
