r"""What leaving out the zeros saves: dense, masked and condensed, in one run.

    python -m experiments.benchmarks.sparse_speed --out runs/sparse_speed
    python -m experiments.benchmarks.sparse_speed --parts accuracy \
        --data.name mnist --data.dir DIR --out runs/sparse_accuracy

Three parts:

inference  a product with a square matrix of each width, in a run as many as
           take about 20 ms. Beside the condensed product there are, all with
           features first, scipy's CSR matrix, on a CPU the BCSR matrix of
           jax.experimental.sparse, and where it is installed (pip install mkl)
           the product of Intel's MKL, its matrix inspected beforehand.
step       a training step (forward, backward, update) of a network of two
           hidden layers, 784-WIDTH-WIDTH-10, SGD with momentum. masked is a
           sparsify with masks that never change, condensed the same training
           held without its zeros (train/condensed.py).
           In both parts auto is condensed where that was measured to be faster
           (kernel_choice.pays), and otherwise dense, or masked in training.
accuracy   the same network at one width trained until it reaches an accuracy on
           the test split: seconds in training steps, compilation and
           evaluations left out.

The connections are drawn at random, as many in each hidden layer; the last
layer is dense. What a table compares takes turns in one process, compiled as
JAX comes; ratios are medians of neighbouring runs, dense over the other, so
that more is faster. The default takes two to four minutes on two CPU cores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import statistics
import sys
import time
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
from jax.experimental import sparse as jax_sparse
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import experiments
from experiments.benchmarks import figures_speed, harness, mkl
import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Tree
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.nets import layers
from powerprop_jax.report import plotting
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import kernel_choice, linear, native
from powerprop_jax.train import condensed
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

Part = Literal['inference', 'step', 'accuracy']

_NUM_PIXELS, _NUM_CLASSES = 784, 10
_STEPS_PER_DISPATCH = 200
_SECONDS_PER_RUN = 0.02


class _Training(NamedTuple):
  """A training step, the first state, and how it is condensed, if it is."""

  step: step_lib.Step
  state: Tree
  layout: condensed.Layout | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  """Dense, masked and condensed layers: time and ratios."""

  # Folder for the tables as data and the figure; made if missing. Default: no
  # folder, only tables in the terminal.
  out: str | None = None
  # What to measure: inference, step, accuracy.
  parts: tuple[Part, ...] = ('inference', 'step')
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
    folder.write_results(found)
    folder.write_json('environment.json', {'environment': timing.environment()})
    if any('speed_up' in record for record in found):
      plotting.save(
        figures_speed.speed_ups(found, title=timing.environment()),
        folder.path / 'speed_ups',
      )
    folder.mark_complete()
    print(f'\nTables as data and figures: {folder.path}')


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
        place = {'width': width, 'batch': batch, 'sparsity': sparsity}
        yield from _records('inference', place, seconds)


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
  task = kernel_choice.Product(width, width, values.size, batch)
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
  pays = kernel_choice.pays(task, backward=False)
  found['auto'] = found['condensed' if pays else 'dense']
  if mkl.is_available():
    by_output_mkl = mkl.Matrix(by_output, batch)
    found['MKL'] = lambda: by_output_mkl(x_columns)
  # At small batches it takes far longer than all the others.
  if jax.default_backend() == 'cpu' and batch >= 32:
    found['BCSR'] = lambda: bcsr(by_output_jax, columns)
  return found


def _step(config: Config) -> Iterator[Row]:
  """A training step, of every width and sparsity."""
  random = np.random.default_rng(0)
  batch = config.train_batch
  images = jnp.asarray(random.random((batch, 28, 28, 1)), jnp.float32)
  labels = jnp.asarray(random.integers(0, _NUM_CLASSES, batch))
  for width in config.widths:
    for sparsity in config.sparsities:
      programs = {}
      for name, training in _trainings(
        width, sparsity, images, config.learning_rate
      ).items():
        step = jax.jit(training.step, donate_argnums=0)
        programs[name] = harness.going_on(
          step,
          functools.partial(lambda first: first, training.state),
          [(images, labels)],
        )
      times = timing.take_turns(programs, config.repeats)
      place = {'width': width, 'batch': batch, 'sparsity': sparsity}
      seconds = {name: found.wall for name, found in times.items()}
      yield from _records('step', place, seconds)


def _trainings(
  width: int, sparsity: float, images: jax.Array, learning_rate: float
) -> dict[str, _Training]:
  """Dense, masked, condensed and auto, from the same first weights."""
  net = _make_net(width, 1 - sparsity)
  inner = optax.sgd(learning_rate, momentum=0.9)
  masked = pp.static(
    inner, {'linear_0/w': sparsity, 'linear_1/w': sparsity, 'logits/w': 0.0}
  )
  key = jax.random.key(0)
  state = step_lib.create(net, masked, key, images)
  full = _make_net(width)
  dense = step_lib.create(full, inner, key, images)

  def thinned(execution: condensed.Execution) -> _Training:
    layout = condensed.layout(
      state, net=net, tx=masked, images=images, execution=execution
    )
    step = condensed.make_step(net, masked, layout)
    # Copies: what is not condensed is one array, and steps donate theirs.
    first = jax.tree.map(jnp.array, condensed.condense(state, layout))
    return _Training(step, first, layout)

  return {
    'dense': _Training(step_lib.make_step(full, inner), dense),
    'masked': _Training(step_lib.make_step(net, masked), state),
    'condensed': thinned('condensed'),
    'auto': thinned('auto'),
  }


def _make_net(width: int, density: float = 1.0) -> hk.TransformedWithState:
  """784-width-width-10, with rectifiers.

  The first weights have the variance of a layer that has no other inputs than
  its connections: with that of a dense one signals fade, and training is slow.
  """
  w_init = hk.initializers.VarianceScaling(1 / density)

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    del is_training
    x = images.reshape(images.shape[0], -1)
    for name in ('linear_0', 'linear_1'):
      x = jax.nn.relu(layers.linear(width, name, w_init=w_init)(x))
    return layers.linear(_NUM_CLASSES, 'logits')(x)

  return hk.transform_with_state(forward)


def _accuracy(config: Config) -> Iterator[Row]:
  """Seconds of training until the network is good enough."""
  splits = data.load(config.data, show_progress=True)
  images = data.to_float(splits.train.images[: config.train_batch])
  for sparsity in (0.0, *config.sparsities):
    way = 'condensed' if sparsity else 'dense'
    training = _trainings(
      config.accuracy_width, sparsity or 0.5, images, config.learning_rate
    )[way]
    name = f'{way}, {sparsity:.0%} zeros'
    yield {
      'part': 'accuracy',
      'width': config.accuracy_width,
      'batch': config.train_batch,
      'sparsity': sparsity,
      'way': way,
      **_train(config, training, splits, name),
    }


def _train(
  config: Config, training: _Training, splits: data.Splits, name: str
) -> Row:
  """Trains until the accuracy is reached; the clock runs in steps alone."""
  arrays, test = jax.device_put((splits.train, splits.test))
  net = _make_net(config.accuracy_width)
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
  part: str, place: Row, seconds: Mapping[str, list[float]]
) -> Iterator[Row]:
  """What a table says of each program."""
  for way, found in seconds.items():
    yield {
      'part': part,
      **place,
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
      if name != 'part'
    }
    for record in records
  ]


_PARTS: dict[Part, Callable[[Config], Iterator[Row]]] = {
  'inference': _inference,
  'step': _step,
  'accuracy': _accuracy,
}


if __name__ == '__main__':
  experiments.start(main, {'default': Config()}, static_alpha=None)
