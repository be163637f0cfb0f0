r"""Accuracy after one-shot pruning against sparsity, for several α.

The main job. It trains LeNet-300-100 for every α and key in one program, prunes
each network in one shot, without retraining, at every sparsity, and draws test
accuracy against the share of weights left.

    python -m experiments.one_shot_pruning --out runs/one_shot_pruning

Expected: on the bundled digits all α are level up to 90 % sparsity; beyond it
α = 1 falls first, and the larger α the later. About a minute on two CPU cores.

The recipe of the authors' notebook on MNIST, and our best one:

    python -m experiments.one_shot_pruning --preset mnist_reference \
        --data.dir ~/tensorflow_datasets --out runs/mnist_reference
    python -m experiments.one_shot_pruning --preset mnist_best \
        --data.dir ~/tensorflow_datasets --out runs/mnist_best

Source: Schwarz et al., Powerpropagation, 2021, Figure 1, and the authors'
notebook. Numbers: docs/results/one_shot_pruning.md.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import experiments
from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.core.trees import Params
from powerprop_jax.costs import summary
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis, plotting, records
from powerprop_jax.train import ensemble, evaluate, loop, optimizers, step
from powerprop_jax.train.cli.arguments import Net
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import contents, divergence, errors, writers
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Contents
from powerprop_jax.train.runs.folder import RunConfig, RunFolder
from powerprop_jax.train.step import TrainState

Scope = Literal['layer', 'global']


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  """Accuracy after one-shot pruning against sparsity, for several α."""

  # Folder for the results; made if missing.
  out: str = 'runs/one_shot_pruning'
  # The data set.
  data: DataConfig = DataConfig()
  net: Net = 'lenet_300_100'
  # Powers to compare; 1 is the baseline.
  alphas: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
  # Seeds of the initial weights and of the order of the data.
  keys: tuple[int, ...] = (0, 1, 2, 3, 4)
  # The optimiser.
  optimizer: OptimizerConfig = OptimizerConfig()
  # Lengths.
  loop: LoopConfig = LoopConfig()
  # Shares of weights to keep; each is one point of the curves.
  kept: tuple[float, ...] = (
    *(1.0, 0.5, 0.3, 0.2, 0.1),
    *(0.07, 0.05, 0.03, 0.02, 0.01),
  )
  # Rank the weights of each layer by themselves, of all together, or both.
  scopes: tuple[Scope, ...] = ('global', 'layer')
  # Per layer, the output layer keeps this many times the share, at most all.
  output_factor: float = 2.0
  # Networks trained side by side; fewer need less memory. Default: all.
  lanes_at_once: int | None = None


PRESETS = {
  'digits': Config(
    optimizer=OptimizerConfig(
      learning_rate=0.05, schedule='cosine', decay_phi=3e-3
    ),
    loop=LoopConfig(num_steps=6_000, batch_size=60),
  ),
  'mnist_reference': Config(
    data=DataConfig('mnist'),
    alphas=(1.0, 2.0, 3.0, 4.0, 5.0),
    keys=(0, 1),
    optimizer=OptimizerConfig(learning_rate=0.1),
    loop=LoopConfig(num_steps=50_001, batch_size=60, eval_every=5_000),
    kept=tuple(float(p) for p in np.geomspace(1.0, 0.01, 20).round(6)),
    scopes=('layer', 'global'),
    lanes_at_once=1,
  ),
  # The best of 22 recipes for α = 2, by validation accuracy with 5 % kept.
  'mnist_best': Config(
    data=DataConfig('mnist'),
    alphas=(1.0, 1.5, 2.0),
    keys=(0, 1, 2),
    optimizer=OptimizerConfig(
      learning_rate=0.2, schedule='cosine', momentum=0.9, decay_phi=2e-3
    ),
    loop=LoopConfig(num_steps=12_000, batch_size=100, eval_every=2_000),
    lanes_at_once=1,
  ),
  # The best of 28 recipes for α = 1, chosen likewise.
  'mnist_best_alpha_1': Config(
    data=DataConfig('mnist'),
    alphas=(1.0,),
    keys=(0, 1, 2),
    optimizer=OptimizerConfig(
      learning_rate=0.4, schedule='cosine', momentum=0.9, decay_phi=1e-2
    ),
    loop=LoopConfig(num_steps=12_000, batch_size=100, eval_every=2_000),
    lanes_at_once=1,
  ),
}


def main(config: Config) -> None:
  """Trains, prunes, and writes what came out."""
  _check(config)
  splits = data.load(config.data, show_progress=True)
  data.check_batch_size(config.loop.batch_size, len(splits.train.labels))
  net = nets.make(config.net, splits.num_classes)
  make_tx = lambda alpha: optimizers.make_tx(
    config.optimizer, alpha, config.loop.num_steps
  )
  members = ensemble.product(config.alphas, config.keys)
  state = ensemble.create(net, make_tx, members, splits.example)
  folder = RunFolder(
    config.out,
    config,
    program='one_shot_pruning',
    resume=config.resume,
    contents=_contents(config, splits.num_classes),
  )
  divergence.say_scale(splits)
  before = _theta_by_alpha(members, state)
  # The update reads α from the state, so any α builds the same step.
  advance = step.make_advance(net, make_tx(jnp.float32(1)))
  state = loop.fit(
    state,
    ensemble.mapped(advance, config.lanes_at_once),
    ensemble.mapped(evaluate.on_state(net), config.lanes_at_once),
    splits,
    config.loop,
    folder,
    indices=functools.partial(ensemble.batch_indices, members),
    records=functools.partial(ensemble.score_records, members),
    writers=writers.of_run(folder, config),
  )
  output_rule = ensemble.keep_more_outputs(config.output_factor)
  results = []
  for scope in config.scopes:
    results += ensemble.prune(
      net,
      state,
      members,
      splits.test,
      [masks.density_to_sparsity(kept) for kept in config.kept],
      scope=scope,
      overrides=output_rule if scope == 'layer' else None,
    )
  folder.write_results(results)
  after = _theta_by_alpha(members, state)
  name = f'{config.net} on {config.data.name}'
  _report(name, folder, before, after)
  folder.mark_complete()
  _print(config, folder, results)
  divergence.check_any_left(
    folder.path, ensemble.say_diverged(members, state, folder)
  )


def _contents(config: Config, num_classes: int) -> Contents:
  """What can be read of the run later, and what its page shows."""
  title = f'{config.net} on {config.data.name}'
  networks = contents.Networks(
    config.net, config.data, config.loop.num_steps, config.alphas, config.keys
  )
  figures = {name: contents.Figure(name, alt) for name, alt in _ALT.items()}
  sections = (
    contents.pruning_section(
      title, num_classes, config.scopes, len(config.keys)
    ),
    contents.training_section(title),
    contents.weights_section(
      figures['weight_histograms'],
      figures['near_zero'],
      text=f'All of key {config.keys[0]}.',
      caption=f'Effective weights for α = {max(config.alphas):g}.',
    ),
    contents.Section(
      'Masks before and after training',
      'How far the largest weights after training are those that were '
      'largest at the start.',
      (figures['mask_overlap'],),
    ),
  )
  alphas = ', '.join(f'{alpha:g}' for alpha in config.alphas)
  subtitle = f'α = {alphas}, keys {", ".join(map(str, config.keys))}'
  page = contents.Page(f'One-shot pruning of {title}', subtitle, sections)
  return Contents(networks, page)


def _check(config: Config) -> None:
  errors.check_positive(config, 'lanes_at_once', prefix='')
  errors.check_several(config, 'alphas', 'keys', 'kept', 'scopes', differ=False)
  for kept in config.kept:
    masks.density_to_sparsity(kept, '--kept')
  ensemble.keep_more_outputs(config.output_factor)


def _theta_by_alpha(members: Members, state: TrainState) -> dict[float, Params]:
  """Effective weights of the first key of every α, on the host."""
  theta = jax.device_get(jax.vmap(lambda s: s.theta)(state))
  return {
    name['alpha']: ensemble.take(theta, index)
    for index, name in enumerate(ensemble.names(members))
    if name['key'] == members.key[0]
  }


def _report(
  name: str,
  folder: RunFolder,
  before: Mapping[float, Params],
  after: Mapping[float, Params],
) -> None:
  """Figures of the weights, and the page."""
  overlaps = [
    {'alpha': alpha, **record}
    for alpha in after
    for record in analysis.mask_overlap(before[alpha], after[alpha])
  ]
  near_zero = [
    {'alpha': alpha, **record}
    for alpha in after
    for record in analysis.fraction_near_zero(after[alpha])
  ]
  figures = {
    'weight_histograms': plotting.weight_histograms(
      analysis.weight_histograms(after), title=f'Weights after training, {name}'
    ),
    'near_zero': plotting.near_zero(near_zero, title=name),
    'mask_overlap': plotting.mask_overlap(overlaps, title=name),
  }
  for key, figure in figures.items():
    plotting.save(figure, folder.path / key)
  folder.write_json('weights.json', summary.summary(after[max(after)]))
  run_report.write(folder.path)


_ALT = {
  'weight_histograms': 'histograms of the weights of each layer for each α',
  'near_zero': 'share of weights near zero for each α',
  'mask_overlap': 'overlap of magnitude masks before and after training',
}


def _print(config: Config, folder: RunFolder, results: list[Row]) -> None:
  """The table, on the standard output."""
  sparsities = [masks.density_to_sparsity(kept) for kept in config.kept]
  for scope in config.scopes:
    over = records.over_keys(len(config.keys))
    print(f'\nTest accuracy, {contents.SCOPES[scope]}{over}:\n')
    print('  kept' + ''.join(f'  α = {a:<4g}' for a in config.alphas))
    of_scope = [r for r in results if r['scope'] == scope]
    for kept, sparsity in zip(config.kept, sparsities, strict=True):
      row = f'{kept:6.1%}'
      for alpha in config.alphas:
        found = [
          record['accuracy']
          for record in of_scope
          if (record['alpha'], record['sparsity']) == (alpha, sparsity)
        ]
        row += f'  {np.mean(found):8.3f}'
      print(row)
  print(f'\nFigures and report: {folder.path / "report.html"}')


if __name__ == '__main__':
  experiments.start(main, PRESETS)
