r"""What leaving out the zeros saves: products, and training until it is done.

    python -m experiments.benchmarks.sparse_speed --out runs/sparse_speed
    python -m experiments.benchmarks.sparse_speed --parts accuracy \
        --data.name mnist --data.dir DIR --out runs/sparse_accuracy

Two parts; whole training steps are in sparse_networks:

inference  a product with a square matrix of each width, in a run as many as
           take about 20 ms. Beside the condensed product there are, all with
           features first, scipy's CSR matrix, on a CPU the BCSR matrix of
           jax.experimental.sparse, and where it is installed (pip install mkl)
           the product of Intel's MKL, its matrix inspected beforehand.
accuracy   784-WIDTH-WIDTH-10, dense and condensed (train/condensed.py), trained
           until it reaches an accuracy on the test split: seconds in training
           steps, compilation and evaluations left out.

The connections are drawn at random, as many in each hidden layer; the last
layer is dense. What a table compares takes turns in one process, compiled as
JAX comes; ratios are medians of neighbouring runs, dense over the other, so
that more is faster. The default takes two to four minutes on two CPU cores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import statistics
import sys
import time
from typing import Any, Literal, get_args

import jax
from jax.experimental import sparse as jax_sparse
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import experiments
from experiments.benchmarks import figures_speed, harness, mkl, sparse_networks
from experiments.benchmarks.sparse_networks import Training
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Tree
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import kernel_choice, linear, native
from powerprop_jax.train import condensed
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

Part = Literal['inference', 'accuracy']

_STEPS_PER_DISPATCH = 200
_SECONDS_PER_RUN = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
  """Dense, masked and condensed layers: time and ratios."""

  # Folder for the tables as data and the figure; made if missing. Default: no
  # folder, only tables in the terminal.
  out: str | None = None
  # What to measure: inference, accuracy.
  parts: tuple[Part, ...] = ('inference',)
  # Widths of matrices and hidden layers.
  widths: tuple[int, ...] = (1024, 4096)
  # Examples in a batch, in inference.
  batches: tuple[int, ...] = (1, 128)
  # Examples in a batch, in training.
  train_batch: int = 128
  # Shares of zeros.
  sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99)
  # Timed runs of each program.
  repeats: int = 15
  # accuracy: the data set; digits come with the library, but take no time.
  data: DataConfig = DataConfig()
  # accuracy: width of the hidden layers.
  accuracy_width: int = 4096
  # accuracy: test accuracy at which the clock stops.
  accuracy: float = 0.98
  # accuracy: steps after which a training that has not got there ends.
  max_steps: int = 8_000
  # accuracy: learning rate of SGD with momentum 0.9.
  learning_rate: float = 0.05


def main(config: Config) -> None:
  """Prints the tables."""
  _check(config)
  folder = None
  if config.out is not None:
    folder = RunFolder(config.out, config, program='sparse_speed')
  print(timing.environment())
  print(f'compiled kernels: {native.status()}')
  found: list[Row] = []
  for part in config.parts:
    records = list(_PARTS[part](config))
    print(f'\n{part}\n{tables.text_table(_shown(records))}', flush=True)
    found += records
  if folder is not None:
    figures_speed.save(found, folder)


def _check(config: Config) -> None:
  errors.check_several(
    config, 'parts', 'widths', 'batches', 'sparsities', differ=False
  )
  harness.check_known(config, 'parts', get_args(Part))
  errors.check_positive(config, 'widths', 'batches', 'train_batch', 'repeats')
  errors.check_positive(config, 'accuracy_width', 'max_steps')
  for sparsity in config.sparsities:
    masks_lib.check_sparsity(sparsity, '--sparsities')
  if not 0 < config.learning_rate < float('inf'):
    raise UserError(
      '--learning-rate must be positive and finite, got '
      f'{config.learning_rate:g}.'
    )
  if not 0 < config.accuracy < 1:
    raise UserError(f'--accuracy must be in (0, 1), got {config.accuracy:g}.')


def _inference(config: Config) -> Iterator[Row]:
  """y = x W, of every width, batch and sparsity."""
  for width in config.widths:
    for batch in config.batches:
      for sparsity in config.sparsities:
        programs = _products(width, batch, sparsity)
        seconds = timing.seconds_of_calls(
          programs, config.repeats, _SECONDS_PER_RUN
        )
        what = f'product {width:,}, batch {batch}'
        yield from _records(what, sparsity, seconds)


def _products(
  width: int, batch: int, sparsity: float
) -> dict[str, timing.Program]:
  random = np.random.default_rng(0)
  mask = random.random((width, width)) >= sparsity
  weight = np.where(mask, random.standard_normal(mask.shape), 0)
  weight = weight.astype(np.float32)
  x = random.standard_normal((batch, width)).astype(np.float32)
  index = sparse_index.from_positions(np.flatnonzero(mask.T), mask.shape)
  values = jnp.asarray(weight.T[mask.T])
  task = kernel_choice.Task(width, width, values.size, batch)
  kernel = kernel_choice.choose(task)
  by_output = scipy.sparse.csr_matrix(weight.T)
  x_columns = np.ascontiguousarray(x.T)
  by_output_jax = jax_sparse.BCSR.from_scipy_sparse(by_output)
  rows, columns = jnp.asarray(x), jnp.asarray(x_columns)
  full, kept = jnp.asarray(weight), jnp.asarray(mask)
  dense = jax.jit(jnp.matmul)
  masked = jax.jit(lambda x, w, m: x @ jnp.where(m, w, 0))
  sparse = jax.jit(lambda x, v, index: linear.product(x, v, index, kernel))
  bcsr = jax.jit(lambda a, x: a @ x)
  found: dict[str, timing.Program] = {
    'dense': lambda: dense(rows, full),
    'masked': lambda: masked(rows, full, kept),
    'condensed': lambda: sparse(rows, values, index),
    'scipy CSR': lambda: by_output @ x_columns,
  }
  if mkl.is_available():
    by_output_mkl = mkl.Matrix(by_output, batch)
    found['MKL'] = lambda: by_output_mkl(x_columns)
  # At small batches it takes far longer than all the others.
  if jax.default_backend() == 'cpu' and batch >= 32:
    found['BCSR'] = lambda: bcsr(by_output_jax, columns)
  return found


def _accuracy(config: Config) -> Iterator[Row]:
  """Seconds of training until the network is good enough."""
  splits = data.load(config.data, show_progress=True)
  images = data.to_float(splits.train.images[: config.train_batch])
  for sparsity in (0.0, *config.sparsities):
    way: sparse_networks.Way = 'condensed' if sparsity else 'dense'
    inner = optax.sgd(config.learning_rate, momentum=0.9)
    net = sparse_networks.perceptron(config.accuracy_width, 1 - sparsity)
    tx = sparse_networks.masked_perceptron(inner, sparsity)
    key = jax.random.key(0)
    training = sparse_networks.trainings(net, inner, tx, images, key)[way]()
    name = f'{way}, {sparsity:.0%} zeros'
    yield {
      'what': f'{config.accuracy_width:,} units, batch {config.train_batch}',
      'sparsity': sparsity,
      'way': way,
      **_train(config, training, splits, name),
    }


def _train(
  config: Config, training: Training, splits: data.Splits, name: str
) -> Row:
  """Trains until the accuracy is reached; the clock runs in steps alone."""
  arrays, test = jax.device_put((splits.train, splits.test))
  net = sparse_networks.perceptron(config.accuracy_width)
  score = jax.jit(evaluate_lib.make_evaluate(net))

  def run(state: Tree, arrays: Arrays, indices: jax.Array) -> Any:
    def body(state: Tree, batch: jax.Array) -> Any:
      images, labels = arrays.images[batch], arrays.labels[batch]
      return training.step(state, images, labels)

    return jax.lax.scan(body, state, indices)[0]

  def indices(start: int) -> jax.Array:
    size = len(splits.train.labels)
    return jnp.asarray(
      data.batch_indices(
        0, start, _STEPS_PER_DISPATCH, config.train_batch, size
      )
    )

  state = training.state
  advance = jax.jit(run, donate_argnums=0).lower(state, arrays, indices(0))
  compiled = advance.compile()
  seconds, accuracy = 0.0, 0.0
  for start in range(0, config.max_steps, _STEPS_PER_DISPATCH):
    batch = indices(start)
    begin = time.perf_counter()
    state = jax.block_until_ready(compiled(state, arrays, batch))
    seconds += time.perf_counter() - begin
    full = state
    if training.layout is not None:
      full = condensed.expand(state, training.layout)
    accuracy = float(score(full.theta, {}, test)['accuracy'])
    print(
      f'{name}: step {int(state.step):,}, {seconds:.1f} s, {accuracy:.2%}',
      file=sys.stderr,
      flush=True,
    )
    if accuracy >= config.accuracy:
      break
  return {
    'steps': int(state.step),
    'seconds': seconds,
    'ms_per_step': 1e3 * seconds / int(state.step),
    'accuracy': accuracy,
    'reached': accuracy >= config.accuracy,
  }


def _records(
  what: str, sparsity: float, seconds: Mapping[str, list[float]]
) -> Iterator[Row]:
  """What a table says of each program."""
  for way, found in seconds.items():
    yield {
      'what': what,
      'sparsity': sparsity,
      'way': way,
      'ms': 1e3 * statistics.median(found),
      'speed_up': timing.median_ratio(seconds['dense'], found),
    }


def _shown(records: Sequence[Row]) -> list[Row]:
  """The records as a table for people."""
  return [
    {
      name: f'{value:.3g}' if isinstance(value, float) else value
      for name, value in record.items()
    }
    for record in records
  ]


_PARTS: dict[Part, Callable[[Config], Iterator[Row]]] = {
  'inference': _inference,
  'accuracy': _accuracy,
}


if __name__ == '__main__':
  experiments.start(main, {'default': Config()}, static_alpha=None)
