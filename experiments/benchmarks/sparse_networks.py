r"""Training steps of whole networks: dense, masked, and without their zeros.

    python -m experiments.benchmarks.sparse_networks --out runs/sparse_networks
    python -m experiments.benchmarks.sparse_networks --nets wrn_22_2 gpt_mini

A step is forward, backward and update, of random numbers. Four ways to take it:

dense      as anyone would write it with Haiku and Optax.
masked     the same with a sparsify around the optimiser, whose masks never
           change; its time does not depend on how many weights there are, and
           is measured at the first sparsity.
condensed  without the zeros (train/condensed.py), in every layer.
auto       without the zeros of layers with few connections (kernel_choice.py);
           where those are all, it is the same program, measured once.

Networks, each with its batch, and its inputs:

perceptron  784-4096-4096-10, batch 128; the last layer is dense
lenet_5     digits of 28 × 28, batch 128
wrn_22_2    images of 32 × 32, batch 32
resnet_18   the same
resnet_50   images of 64 × 64, batch 16
gpt_mini    128 of 65 characters, batch 16; 10.7 million weights, AdamW
vit_tiny    images of 32 × 32, batch 32, AdamW

Others take SGD with momentum. Connections are drawn at random, with the same
sparsity in each layer or by erk, which leaves small layers nearly dense. All
programs of a network take turns in one process, compiled as JAX comes; ratios
are medians of neighbouring runs, dense over the other, so that more is faster.
The default takes about forty minutes on two CPU cores, half of it compilation.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments
from experiments.benchmarks import figures_speed, harness
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Tree
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.nets import layers
from powerprop_jax.sparse import native
from powerprop_jax.train import condensed
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.folder import RunFolder

Distribution = Literal['uniform', 'erk']
Way = Literal['dense', 'masked', 'condensed', 'auto']

_NUM_CLASSES, _NUM_TOKENS = 10, 65


class _Setting(NamedTuple):
  """What a network is measured with; no shape is a text of that length."""

  batch: int
  shape: tuple[int, ...]


_SETTINGS = {
  'perceptron': _Setting(128, (28, 28, 1)),
  'lenet_5': _Setting(128, (28, 28, 1)),
  'wrn_22_2': _Setting(32, (32, 32, 3)),
  'resnet_18': _Setting(32, (32, 32, 3)),
  'resnet_50': _Setting(16, (64, 64, 3)),
  'gpt_mini': _Setting(16, (128,)),
  'vit_tiny': _Setting(32, (32, 32, 3)),
}


class Training(NamedTuple):
  """A training step, the first state, and how it is condensed, if it is."""

  step: step_lib.Step
  state: Tree
  layout: condensed.Layout | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  """Training steps of networks without their zeros: time, memory and ratios."""

  # Folder for the table as data and the figure; made if missing. Default: no
  # folder, only tables in the terminal.
  out: str | None = None
  # Networks to measure.
  nets: tuple[str, ...] = tuple(_SETTINGS)
  # Shares of zeros.
  sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
  # uniform: the same sparsity in each layer. erk: large layers are sparser.
  distribution: Distribution = 'uniform'
  # Examples in a batch. Default: of each network its own, as above.
  batch: int | None = None
  # Units in the hidden layers of the perceptron.
  width: int = 4096
  # Timed runs of each program.
  repeats: int = 9


def main(config: Config) -> None:
  """Prints a table for each network."""
  _check(config)
  folder = None
  if config.out is not None:
    folder = RunFolder(config.out, config, program='sparse_networks')
  print(timing.environment())
  print(f'compiled kernels: {native.status()}')
  found: list[Row] = []
  for name in config.nets:
    rows = list(_measured(config, name))
    print(f'\n{rows[0]["what"]}\n{tables.text_table(_shown(rows))}', flush=True)
    found += rows
    if folder is not None:
      folder.write_results(found)
  if folder is not None:
    figures_speed.save(found, folder)


def _check(config: Config) -> None:
  errors.check_several(config, 'nets', 'sparsities', differ=True)
  harness.check_known(config, 'nets', _SETTINGS)
  errors.check_positive(config, 'batch', 'width', 'repeats')
  for sparsity in config.sparsities:
    masks_lib.check_sparsity(sparsity, '--sparsities')


def _measured(config: Config, name: str) -> Iterator[Row]:
  """The rows of a network."""
  setting = _SETTINGS[name]
  batch = config.batch or setting.batch
  random = np.random.default_rng(0)
  if len(setting.shape) == 1:
    text = lambda: random.integers(0, _NUM_TOKENS, (batch, *setting.shape))
    inputs, labels = (jnp.asarray(text()) for _ in range(2))
  else:
    inputs = jnp.asarray(random.random((batch, *setting.shape)), jnp.float32)
    labels = jnp.asarray(random.integers(0, _NUM_CLASSES, batch))
  programs: dict[tuple[float, Way], timing.Program] = {}
  sizes, same = {}, set()
  for sparsity in config.sparsities:
    found = trainings(
      *_network(config, name, sparsity), inputs, jax.random.key(0)
    )
    for way in get_args(Way):
      is_first = sparsity == config.sparsities[0]
      if way in ('dense', 'masked') and not is_first:
        continue
      training = found[way]()
      sizes[sparsity, way] = _num_bytes(training.state)
      if way == 'auto' and training.layout == found['condensed']().layout:
        same.add(sparsity)
        continue
      programs[sparsity, way] = harness.going_on(
        jax.jit(training.step, donate_argnums=0),
        functools.partial(lambda first: first, training.state),
        [(inputs, labels)],
      )
  named = {
    f'{sparsity} {way}': run for (sparsity, way), run in programs.items()
  }
  times = timing.take_turns(named, config.repeats)
  first = config.sparsities[0]
  dense = times[f'{first} dense'].wall
  for sparsity, way in sizes:
    is_same = way == 'auto' and sparsity in same
    seconds = times[f'{sparsity} {"condensed" if is_same else way}'].wall
    yield {
      'what': f'{name}, batch {batch}',
      'sparsity': 0.0 if way == 'dense' else sparsity,
      'way': way,
      'ms': 1e3 * float(np.median(seconds)),
      'speed_up': timing.median_ratio(dense, seconds),
      'state_mb': sizes[sparsity, way] / 1e6,
    }


def _num_bytes(state: Tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _network(
  config: Config, name: str, sparsity: float
) -> tuple[
  hk.TransformedWithState,
  optax.GradientTransformation,
  optax.GradientTransformationExtraArgs,
]:
  """A network, its optimiser, and that with masks of this sparsity."""
  if name == 'perceptron':
    net, inner = perceptron(config.width, 1 - sparsity), sgd(0.05)
    return net, inner, masked_perceptron(inner, sparsity)
  is_transformer = name in ('gpt_mini', 'vit_tiny')
  net = nets.make(name, _NUM_TOKENS if name == 'gpt_mini' else _NUM_CLASSES)
  inner = optax.adamw(1e-3) if is_transformer else sgd(0.01)
  distribution = {'uniform': pp.uniform, 'erk': pp.erk}[config.distribution]
  return net, inner, pp.static(inner, sparsity, distribution=distribution)


def sgd(learning_rate: float) -> optax.GradientTransformation:
  """With momentum."""
  return optax.sgd(learning_rate, momentum=0.9)


def perceptron(width: int, density: float = 1.0) -> hk.TransformedWithState:
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


def masked_perceptron(
  inner: optax.GradientTransformation, sparsity: float
) -> optax.GradientTransformationExtraArgs:
  """Fixed masks on both hidden layers."""
  return pp.static(
    inner, {'linear_0/w': sparsity, 'linear_1/w': sparsity, 'logits/w': 0.0}
  )


def trainings(
  net: hk.TransformedWithState,
  inner: optax.GradientTransformation,
  tx: optax.GradientTransformationExtraArgs,
  inputs: jax.Array,
  key: jax.Array,
) -> dict[Way, Callable[[], Training]]:
  """What makes each way to train, from the same first weights."""
  create = functools.cache(lambda tx: step_lib.create(net, tx, key, inputs))

  def plain(tx: optax.GradientTransformation) -> Training:
    # Copies: steps donate theirs.
    state = jax.tree.map(jnp.array, create(tx))
    return Training(step_lib.make_step(net, tx), state)

  @functools.cache
  def thinned(execution: condensed.Execution) -> Training:
    layout = condensed.layout(
      create(tx), net=net, tx=tx, images=inputs, execution=execution
    )
    first = jax.tree.map(jnp.array, condensed.condense(create(tx), layout))
    step = condensed.make_step(net, tx, layout)
    return Training(step, first, layout)

  return {
    'dense': lambda: plain(inner),
    'masked': lambda: plain(tx),
    'condensed': lambda: thinned('condensed'),
    'auto': lambda: thinned('auto'),
  }


def _shown(rows: list[Row]) -> list[Row]:
  """The rows as a table for people."""
  return [
    {
      name: f'{value:.3g}' if isinstance(value, float) else value
      for name, value in row.items()
      if name != 'what'
    }
    for row in rows
  ]


if __name__ == '__main__':
  experiments.start(main, {'default': Config()}, static_alpha=None)
