r"""The power α: fixed, steered by the weights near zero, or raced.

The published controller raises α while the share of weights near zero grows and
lowers it when that share falls. Here it is compared with fixed powers, with
itself when φ is kept as α changes, without a cap on α, with an α for each
layer, and with two races that look at the accuracy after pruning to a target:
of powers from the start, and of branches with larger powers in the middle of a
run. All take the same number of training steps, those of a race being counted
over all its lanes.

    python -m experiments.adaptive_alpha --out runs/adaptive_alpha --workers 2

Expected, on the bundled digits with 5 % of the weights kept: the best fixed
power, 3, near 88 %; the published rule near 80 % with θ kept, near 92 % with φ
kept, where over 90 % of what the weights near zero gain is mechanical, and
without a cap all its networks diverge; the race of powers near 87 %, that of
branches near 94 %. About two minutes on two CPU cores.

The published comparison, on MNIST, and two larger networks:

    python -m experiments.adaptive_alpha --preset mnist_mlp --workers 2 \
        --data.dir ~/tensorflow_datasets --out runs/alpha_mlp
    python -m experiments.adaptive_alpha --preset mnist_lenet_300_100 \
        --workers 2 --data.dir ~/tensorflow_datasets --out runs/alpha_lenet
    python -m experiments.adaptive_alpha --preset mnist_cnn \
        --workers 2 --data.dir ~/tensorflow_datasets --out runs/alpha_cnn

Each run of a network, method and α, with all keys, is kept in a folder of its
own under combinations/, with its metrics and checkpoints; with --resume it goes
on from there. What comes out: figures, table.md, report.html, and results.json
with five kinds of records, all with net, method, alpha (of 'fixed' alone), key:

    sparsity, density, accuracy, loss    test split, after one-shot pruning
    leaf, epsilon, size, near_zero       share of weights with |θ| ≤ ε
    step, leaf, power, near_zero, jump, validation_accuracy, …    a look, power
                             being α at that moment; jump as mechanical below
    rung, candidate, accuracy, loss, survives    a lane of the race, validation
                             split, after one-shot pruning
    steps, own_steps, near_zero, gain, mechanical, …    the whole run; gain is
                             what near_zero grew by, mechanical what the changes
                             of α added to it by themselves, without a step

Source: Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 5. Initial α,
ε, epochs and optimiser are not given there. Numbers: experiments/README.md.
"""

import functools
import io
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments import adaptive_alpha_report
from experiments.adaptive_alpha_config import PRESETS, Config
from powerprop_jax import nets
from powerprop_jax.core import reparam
from powerprop_jax.report import files
from powerprop_jax.train import (
  alpha_results,
  alpha_runs,
  checks,
  combination_runs,
  command,
  data,
  divergence,
  lanes,
  optimizers,
  sweep,
)
from powerprop_jax.train.alpha_control import Problem
from powerprop_jax.train.alpha_runs import Name
from powerprop_jax.train.errors import UserError
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.run_folder import RunFolder

_PROGRAM = 'adaptive_alpha'
_WEIGHTS = 'weights.npz'


class Combination(NamedTuple):
  """What is trained together, for all keys.

  Attributes:
    net: the network.
    method: how α is chosen.
    alpha: the power of 'fixed'; None for the others.
  """

  net: str
  method: Name
  alpha: float | None

  @property
  def name(self) -> str:
    """The name of its folder."""
    alpha = '' if self.alpha is None else f'_{self.alpha:g}'
    return f'{self.net}_{self.method}{alpha}'


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  combinations = _checked_combinations(config)
  settings = combination_runs.settings(config)
  folder = RunFolder(
    config.out, settings, program=_PROGRAM, resume=config.resume
  )
  found = combination_runs.run_all(
    functools.partial(_run, config),
    combinations,
    config.out,
    config.workers,
    _problem(config, config.nets[0]).loop.num_steps,
    functools.partial(_print, config),
  )
  results = [
    {**c._asdict(), **record}
    for c, records in found.items()
    for record in records
  ]
  folder.write_results(results)
  adaptive_alpha_report.write(
    folder.path,
    config,
    settings,
    results,
    {c: _read_weights(config, c) for c in combinations},
  )
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  combination_runs.check_any_left(config.out, combinations)


def _checked_combinations(config: Config) -> list[Combination]:
  """All runs; refuses settings that do not fit before any of them starts."""
  combination_runs.check_workers(config.workers)
  checks.several(config, 'nets', 'methods', 'keys', 'kept', 'epsilons')
  if 'fixed' in config.methods:
    checks.several(config, 'alphas')
  checks.positive(config, 'epochs', 'look_every', 'batch_size')
  for kept in config.kept:
    sweep.kept_to_sparsity(kept)
  for epsilon in config.epsilons:
    if not 0 < epsilon < float('inf'):
      raise UserError(
        f'--epsilons are distances from zero, positive, got {epsilon:g}.'
      )
  for alpha in config.alphas:
    reparam.check_alpha(alpha)
    reparam.check_invertible(alpha)
  lanes.product([1.0], config.keys)
  divergence.say_scale(_splits(config.data))
  optimizers.make_tx(config.optimizer, 1.0, 1)
  for net in config.nets:
    alpha_runs.check(
      _problem(config, net),
      config.methods,
      config.control,
      config.race,
      config.branch,
    )
  return [
    Combination(net, method, alpha)
    for net in config.nets
    for method in config.methods
    for alpha in (config.alphas if method == 'fixed' else (None,))
  ]


def _problem(config: Config, net: str) -> Problem:
  splits = _splits(config.data)
  data.check_batch_size(config.batch_size, len(splits.train.labels))
  epoch = -(-len(splits.train.labels) // config.batch_size)
  return Problem(
    net=nets.make(net, splits.num_classes),
    splits=splits,
    optimizer=config.optimizer,
    loop=LoopConfig(
      num_steps=config.epochs * epoch,
      batch_size=config.batch_size,
      eval_every=config.look_every * epoch,
      steps_per_dispatch=epoch,
    ),
    keys=config.keys,
    epsilon=config.control.epsilon,
    at_once=config.lanes_at_once,
  )


@functools.lru_cache(maxsize=1)
def _splits(config: data.DataConfig) -> data.Splits:
  """The data, which a process loads once."""
  return data.load(config)


def _run(
  config: Config, description: str, combination: Combination
) -> list[dict[str, Any]]:
  """Results of a combination: trained, or read where that is done."""

  def train(folder: RunFolder) -> list[dict[str, Any]]:
    problem = _problem(config, combination.net)
    trained = alpha_runs.train(
      problem,
      combination.method,
      combination.alpha,
      folder,
      config.control,
      config.race,
      config.branch,
      description=description,
    )
    weights = alpha_results.selected_weights(trained, config.keys[0])
    content = io.BytesIO()
    np.savez(content, **weights)  # type: ignore[arg-type]
    files.write_bytes(folder.path / _WEIGHTS, content.getvalue())
    sweep.say_diverged(trained.lanes, trained.state, folder)
    return alpha_results.results(problem, trained, config.kept, config.epsilons)

  settings = combination_runs.settings(config) | combination._asdict()
  return combination_runs.once(
    train, config.out, combination, settings, _PROGRAM
  )


def _read_weights(config: Config, combination: Combination) -> Any:
  """θ of the first key at the end, as a tree."""
  path = combination_runs.path(config.out, combination) / _WEIGHTS
  tree: dict[str, dict[str, np.ndarray]] = {}
  with np.load(path) as stored:
    for leaf in stored.files:
      module_name, _, name = leaf.rpartition('/')
      tree.setdefault(module_name, {})[name] = stored[leaf]
  return tree


def _print(
  config: Config, combination: Combination, results: list[dict[str, Any]]
) -> None:
  pruned = [record for record in results if 'sparsity' in record]
  words = ', '.join(
    f'{100 * np.mean(accuracies):.2f} at {kept:g}'
    for kept in config.kept
    for accuracies in [
      [
        record['accuracy']
        for record in pruned
        if record['sparsity'] == sweep.kept_to_sparsity(kept)
      ]
    ]
  )
  print(f'{combination.name}: {words} kept', flush=True)


if __name__ == '__main__':
  sys.exit(
    command.run(
      main,
      PRESETS,
      prog=f'python -m experiments.{_PROGRAM}',
      description=str(__doc__).split('\n', maxsplit=1)[0],
    )
  )
