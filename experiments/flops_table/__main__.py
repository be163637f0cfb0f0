r"""FLOPs and bytes of sparse networks, with the published values beside ours.

    python -m experiments.flops_table --sparsities 0.8 0.9 \
        --distributions uniform erk

prints, for ResNet-50 and each distribution of a sparsity over its layers, what
inference costs relative to the dense network, the size of the stored network,
and what training costs with each method. Nothing is run or trained; it takes a
few seconds. With --out DIR it also writes config.json, results.json, table.txt,
and layers.txt with the cost of every layer.

Expected: every published value within 0.01, but for training five times as long
(within 3 %). A '-' means that none was published.

Source: Evci et al., Rigging the lottery, 2020, appendix H
(https://arxiv.org/abs/1911.11134); the published values are in flops_published.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import experiments
from experiments.flops_table import published as flops_published
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import masks, schedules
from powerprop_jax.costs import flops
from powerprop_jax.costs import layers as layer_costs
from powerprop_jax.costs import training as training_flops
from powerprop_jax.costs.layers import LayerCost
from powerprop_jax.files import tables, whole
from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

Distribution = Literal['uniform', 'er', 'erk', 'erk_first_dense']


@dataclasses.dataclass(frozen=True)
class Config:
  """FLOPs and bytes of sparse networks."""

  # The network, one of powerprop_jax.nets.NAMES.
  net: str = 'resnet_50'
  # Shares of zeros, in [0, 1).
  sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.965)
  # How they are shared out. uniform and erk_first_dense leave the first layer
  # dense and have the sparsity in the others; er and erk have it in total.
  distributions: tuple[Distribution, ...] = ('uniform', 'erk')
  # Methods of training, of powerprop_jax.costs.training.METHODS.
  methods: tuple[str, ...] = (
    'static',
    'snip',
    'set',
    'rigl',
    'snfs',
    'pruning',
    'top_kast',
  )
  # Steps of training, as multiples of what the dense network is trained for.
  lengths: tuple[float, ...] = (1.0, 5.0)
  # Height and width of an image. Default: that of the network's data set.
  image_size: int | None = None
  # Channels of an image. Default: likewise.
  num_channels: int | None = None
  # Number of classes. Default: likewise.
  num_classes: int | None = None
  # Count a bias for every layer, as the figures for ResNet-50 do.
  count_bias: bool = True
  # Count a ReLU for every layer, likewise.
  count_relu: bool = True
  # Steps between the updates of RigL's masks.
  period: int = 100
  # Steps of training, and those between which gradual pruning takes place.
  num_steps: int = 32_000
  pruning_start: int = 10_000
  pruning_stop: int = 25_000
  # Steps between the updates of gradual pruning's masks.
  pruning_period: int = 1_000
  # Share of the weights that Top-KAST trains besides those in use.
  extra_density: float = 0.1
  # Folder for the results; made if missing. Default: only print.
  out: str | None = None
  # Write again into the folder of the same settings.
  resume: bool = False


PRESETS = {
  'resnet_50': Config(),
  'wrn_22_2': Config(
    net='wrn_22_2',
    sparsities=(0.8, 0.9),
    lengths=(1.0, 2.0),
    count_bias=False,
    num_steps=97_656,
    pruning_start=20_000,
    pruning_stop=75_000,
  ),
}


def main(config: Config) -> None:
  """Counts, prints and perhaps writes."""
  _check(config)
  size, channels, num_classes = _input_shape(config)
  net = nets.make(config.net, num_classes)
  images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  costs = layer_costs.layer_costs(net, images, is_training=True)
  inference = _inference(config, costs)
  training = _training(config, costs)
  text = '\n\n'.join(
    [
      _heading(config, costs, (size, size, channels)),
      'Inference, relative to dense:',
      tables.text_table(_for_people(inference)),
      'Training, relative to dense for as many steps:',
      tables.text_table(_side_by_side(training)),
    ]
  )
  if config.out is not None:
    _write(config, costs, [*inference, *training], text)
  print(text)


def _check(config: Config) -> None:
  errors.check_several(
    config, 'sparsities', 'distributions', 'methods', 'lengths', differ=False
  )
  for sparsity in config.sparsities:
    masks.check_sparsity(sparsity, '--sparsities')
  errors.check_positive(
    config, 'image_size', 'num_channels', 'num_steps', 'pruning_period'
  )
  if not 0 <= config.extra_density <= 1:
    raise UserError(
      f'--extra-density must be in [0, 1], got {config.extra_density}.'
    )


# Height (and width), channels and classes of the data a network was made for.
_CIFAR_10 = (32, 3, 10)
_MNIST = (28, 1, 10)
_MADE_FOR = {
  'resnet_50': (224, 3, 1000),
  'lenet_300_100': _MNIST,
  'lenet_5': _MNIST,
  'lenet_5_relu': _MNIST,
  'mlp': _MNIST,
  'mnist_cnn': _MNIST,
}


def _input_shape(config: Config) -> tuple[int, int, int]:
  given = (config.image_size, config.num_channels, config.num_classes)
  default = _MADE_FOR.get(config.net, _CIFAR_10)
  size, channels, num_classes = (
    usual if value is None else value
    for value, usual in zip(given, default, strict=True)
  )
  return size, channels, num_classes


def share_out(
  costs: tuple[LayerCost, ...], distribution: Distribution, sparsity: float
) -> dict[str, float]:
  """Sparsity of each leaf, 'module/name', of a network.

  'uniform' and 'erk_first_dense' leave the first layer dense, and the others
  together have the sparsity; with 'er' and 'erk' all layers together have it.
  """
  shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  leaves = [cost.leaf for cost in costs if cost.leaf is not None]
  for cost in costs:
    if cost.leaf is not None:
      module_name, _, name = cost.leaf.rpartition('/')
      leaf = jax.ShapeDtypeStruct(cost.shape, jnp.float32)
      shapes.setdefault(module_name, {})[name] = leaf
  select: pp.Select = pp.is_weight
  if distribution in ('uniform', 'erk_first_dense'):
    select = pp.exclude(select, f'^{re.escape(leaves[0])}$')
  functions: dict[str, Callable[..., dict[str, float]]] = {
    'uniform': pp.uniform,
    'er': pp.distributions.er,
  }
  function = functions.get(distribution, pp.erk)
  return function(shapes, sparsity, select=select)


def _counts(
  config: Config, costs: tuple[LayerCost, ...], sparsities: dict[str, float]
) -> flops.Counts:
  return flops.inference_counts(
    costs,
    sparsities,
    count_bias=config.count_bias,
    count_relu=config.count_relu,
  )


def _inference(config: Config, costs: tuple[LayerCost, ...]) -> list[Row]:
  """One record per distribution and sparsity, the dense network first."""
  published = _published(config, flops_published.INFERENCE)
  dense = _counts(config, costs, {}).flops
  cases: list[tuple[str, float, dict[str, float]]] = [('dense', 0.0, {})]
  cases += [
    (distribution, sparsity, share_out(costs, distribution, sparsity))
    for distribution in config.distributions
    for sparsity in config.sparsities
  ]
  records = []
  for distribution, sparsity, sparsities in cases:
    counts = _counts(config, costs, sparsities)
    size = flops.model_bytes(costs, sparsities, count_bias=config.count_bias)
    key = (config.net, distribution, sparsity)
    ratio, megabytes = published.get(key, (None, None))
    records.append(
      {
        'distribution': distribution,
        'sparsity': sparsity,
        'weights_left': round(counts.nonzeros),
        'flops': round(counts.flops),
        'inference': counts.flops / dense,
        'published_inference': ratio,
        'megabytes': size / 1e6,
        'published_megabytes': megabytes,
      }
    )
  return records


def _training(config: Config, costs: tuple[LayerCost, ...]) -> list[Row]:
  """One record per distribution, sparsity, method and length."""
  published = _published(config, flops_published.TRAINING)
  dense = _counts(config, costs, {}).flops
  records = []
  for distribution in config.distributions:
    # Most steps of gradual pruning have one of few sparsities.
    inference = functools.cache(
      lambda sparsity, d=distribution: (
        _counts(config, costs, share_out(costs, d, sparsity)).flops
      )
    )
    for sparsity in config.sparsities:
      sparse = inference(sparsity)
      # In decimals: 0.8 - 0.1 is 0.7.
      not_trained = round(max(sparsity - config.extra_density, 0.0), 12)
      backward = inference(not_trained)
      for method in config.methods:
        known = published.get((config.net, method, distribution), {})
        cost: float | list[float] = sparse
        if method == 'pruning':
          cost = list(map(inference, _pruning_sparsities(config, sparsity)))
        for length in config.lengths:
          records.append(
            {
              'distribution': distribution,
              'sparsity': sparsity,
              'method': method,
              'length': length,
              'training': training_flops.training_multiplier(
                method,
                dense,
                cost,
                period=config.period,
                backward=backward,
                length=length,
              ),
              'published_training': known.get((sparsity, length)),
            }
          )
  return records


def _pruning_sparsities(config: Config, sparsity: float) -> list[float]:
  """Sparsity over training, every pruning_period steps."""
  schedule = schedules.polynomial(
    sparsity, config.pruning_start, config.pruning_stop
  )
  steps = np.arange(0, config.num_steps + 1, config.pruning_period)
  return [float(s) for s in np.asarray(schedule(steps))]


def _heading(
  config: Config, costs: tuple[LayerCost, ...], shape: tuple[int, ...]
) -> str:
  counts = _counts(config, costs, {})
  macs = sum(cost.macs for cost in costs)
  flags = {'a bias': config.count_bias, 'a ReLU': config.count_relu}
  counted = ' and '.join(k for k, v in flags.items() if v) or 'nothing'
  return (
    f'{config.net} on images of {"×".join(map(str, shape))}: '
    f'{len(costs)} layers, {counts.weights:,} weights, {macs:,} multiply-adds, '
    f'{counts.flops:.4g} FLOPs, counting {counted} after each '
    'layer.'
  )


def _side_by_side(training: list[Row]) -> list[tables.Row]:
  """The training records with lengths across and a column for the published."""
  rows: dict[tuple[Any, ...], tables.Row] = {}
  for record in training:
    fields = {f: record[f] for f in ('distribution', 'sparsity', 'method')}
    row = rows.setdefault(tuple(fields.values()), fields)
    row[f'×{record["length"]:g}'] = record['training']
    row[f'published ×{record["length"]:g}'] = record['published_training']
  return _for_people(list(rows.values()))


def _for_people(rows: list[tables.Row]) -> list[tables.Row]:
  """Rows without the columns that have no value, and with fewer digits."""
  filled = {k for row in rows for k, v in row.items() if v is not None}
  short = lambda v: round(v, 4) if isinstance(v, float) else v
  return [{k: short(v) for k, v in row.items() if k in filled} for row in rows]


def _write(
  config: Config,
  costs: tuple[LayerCost, ...],
  records: list[Row],
  text: str,
) -> None:
  folder = RunFolder(
    str(config.out), config, program='flops_table', resume=config.resume
  )
  folder.write_results(records)
  cases: dict[str, dict[str, float]] = {'dense': {}}
  for distribution in config.distributions:
    for sparsity in config.sparsities:
      name = f'{distribution}, sparsity {sparsity:g}'
      cases[name] = share_out(costs, distribution, sparsity)
  tables = [
    f'{name}\n\n'
    + flops.flops_table(
      costs,
      sparsities,
      count_bias=config.count_bias,
      count_relu=config.count_relu,
    )
    for name, sparsities in cases.items()
  ]
  layers = '\n\n'.join(tables)
  whole.write_bytes(folder.path / 'table.txt', f'{text}\n'.encode())
  whole.write_bytes(folder.path / 'layers.txt', f'{layers}\n'.encode())
  folder.mark_complete()


def _published(config: Config, table: dict[Any, Any]) -> dict[Any, Any]:
  """A table of published values, if config counts what they count."""
  is_standard = (
    _input_shape(config) == _MADE_FOR.get(config.net, _CIFAR_10)
    and config.count_bias == (config.net == 'resnet_50')
    and config.count_relu
  )
  return table if is_standard else {}


if __name__ == '__main__':
  experiments.start(main, PRESETS)
