r"""Class-specialisation of features: a dense network against sparse ones.

Trains a network dense and with methods of sparse training, and measures, on the
test split, how much each feature that a layer reads prefers one class: the
largest share that a class has in its activity.

    python -m experiments.class_specialisation --out runs/class_specialisation

Expected, on the bundled digits: lower means for the sparse networks, but for
what the logits of RigL read (0.30 dense, 0.30 RigL, 0.23 SNFS), within two
points of accuracy. Half a minute on two CPU cores.

On MNIST, and on CIFAR-10, for an accelerator:

    python -m experiments.class_specialisation --preset mnist \
        --data.dir ~/tensorflow_datasets --out runs/specialisation_mnist
    python -m experiments.class_specialisation --preset cifar10 \
        --data.dir ~/tensorflow_datasets --out runs/specialisation_cifar10

Each method has a folder of its own in --out, with its metrics and checkpoints;
--resume trains only what is missing. results.json holds two kinds of records,
all with method, density, alpha and key:

    layer, feature, specialisation             null for a feature without one;
                                               'output' for the logits
    accuracy, loss, density_measured, …        of the test split

Source: Dettmers & Zettlemoyer, Sparse networks from scratch, 2019, the analysis
of features. Theirs are convolutions; see features.py for
what differs.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

import experiments
from experiments.class_specialisation import features, report
from experiments.class_specialisation.features import LayerFeatures
from experiments.common import sparse_runs
from experiments.common.sparse_runs import Settings, Trained
from powerprop_jax import nets
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.report import records as records_lib
from powerprop_jax.train import ensemble
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import Method
from powerprop_jax.train.runs import divergence, metrics
from powerprop_jax.train.runs.contents import Contents
from powerprop_jax.train.runs.folder import RunFolder

_PROGRAM = 'class_specialisation'
_BATCH = 1_000  # test examples measured at a time, which bounds the memory


@dataclasses.dataclass(frozen=True)
class Config(Settings):
  """Class-specialisation of features, dense against sparse."""

  # Folder for the results; made if missing.
  out: str = 'runs/class_specialisation'
  # Methods to compare with each other; 'dense' is the dense network.
  methods: tuple[Method, ...] = ('dense', 'rigl', 'snfs')
  # Share of the weights that are connections in the sparse networks, in (0, 1].
  density: float = 0.1
  # The power; 1 is training without powerprop.
  alpha: float = 1.0
  # Seeds of the initial weights, of masks, and of the order of the data.
  keys: tuple[int, ...] = (0, 1)


PRESETS = {
  'digits': Config(),
  # 55,000 images to train on: five epochs. At 0.05 the dense network diverges,
  # which has no activation after its convolutions.
  'mnist': Config(
    data=DataConfig('mnist'),
    normalise=True,
    net='lenet_5',
    optimizer=dataclasses.replace(Settings.optimizer, learning_rate=0.01),
    loop=LoopConfig(
      num_steps=2_750, batch_size=100, eval_every=550, steps_per_dispatch=55
    ),
  ),
  # 45,000 images to train on: 100 epochs.
  'cifar10': Config(
    data=DataConfig('cifar10'),
    normalise=True,
    augment=True,
    net='vgg_like',
    loop=LoopConfig(
      num_steps=35_100, batch_size=128, eval_every=3_510, steps_per_dispatch=351
    ),
  ),
}


def main(config: Config) -> None:
  """Trains the networks, measures their features, writes what came out."""
  splits = sparse_runs.check_settings(config, 'methods', 'keys')
  chosen = sparse_runs.combinations(
    config.methods, [config.density], [config.alpha]
  )
  sparse_runs.check_combinations(config, chosen, splits)
  net = nets.make(config.net, splits.num_classes)
  theta = step_lib.shapes(net, splits.example)
  folder = RunFolder(config.out, config, program=_PROGRAM, resume=config.resume)
  lost: list[bool] = []
  records: list[Row] = []
  tables: dict[str, list[Row]] = {}
  for number, combination in enumerate(chosen, start=1):
    part = RunFolder(
      folder.path / combination.name,
      config,
      program=_PROGRAM,
      resume=folder.is_resumed,
      is_part=True,
      contents=Contents(sparse_runs.networks(config, config.alpha)),
    )
    trained = sparse_runs.train(
      config,
      net,
      sparse_runs.tx_maker(config, combination, theta, splits),
      config.alpha,
      part,
      description=f'{number}/{len(chosen)} {combination.name}',
    )
    part.mark_complete()
    logged = metrics.read_metrics(part.metrics_path)
    lost += divergence.lost(logged).values()
    found = _measure(trained)
    tables[combination.method] = features.specialisation_table(_pooled(found))
    place = {'method': combination.method, 'density': combination.density}
    records += [place | record for record in sparse_runs.results(trained)]
    records += [
      {**combination._asdict(), 'key': key, **record}
      for key, of_key in found.items()
      for record in features.specialisation_records(of_key)
    ]
  folder.write_results(records)
  report.write(
    folder.path,
    f'{config.net} on {config.data.name}, density {config.density:g}, '
    f'α = {config.alpha:g}',
    splits.num_classes,
    records,
    tables,
  )
  folder.mark_complete()
  print(f'\nFigure and report: {folder.path / "report.html"}')
  divergence.check_any_left(folder.path, lost)


def _measure(trained: Trained) -> dict[int, dict[str, LayerFeatures]]:
  """What the features of each layer respond to, by key."""
  weights = jax.jit(jax.vmap(lambda s: (s.theta, s.net_state)))(trained.state)
  test = trained.splits.test
  found = {}
  for index, key in enumerate(trained.members.key):
    theta, net_state = ensemble.take(weights, index)

    def apply(
      theta: Params, images: Any, net_state: Tree = net_state
    ) -> jax.Array:
      images = trained.prepare(images)
      return trained.net.apply(theta, net_state, None, images, False)[0]

    batches = (
      (test.images[i : i + _BATCH], test.labels[i : i + _BATCH])
      for i in range(0, len(test.labels), _BATCH)
    )
    by_layer = features.specialisation_by_layer(
      apply, theta, batches, trained.splits.num_classes
    )
    *layers, output = by_layer
    names = {**records_lib.short_names(layers), output: output}
    # The first layer reads the images.
    found[int(key)] = {names[n]: by_layer[n] for n in [*layers[1:], output]}
  return found


def _pooled(
  found: Mapping[int, Mapping[str, LayerFeatures]],
) -> dict[str, LayerFeatures]:
  """The features of all keys, side by side."""
  first, *_ = found.values()
  return {
    layer: LayerFeatures(
      *(np.concatenate(parts, axis=-1) for parts in zip(*of_keys, strict=True))
    )
    for layer in first
    for of_keys in [[of_key[layer] for of_key in found.values()]]
  }


if __name__ == '__main__':
  experiments.start(main, PRESETS, static_alpha=True)
