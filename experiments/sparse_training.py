r"""Accuracy of sparse training against density: methods × densities × α × keys.

Trains a network with every method, at every density and for every α, one
compiled program for each with all keys in it, and compares test accuracies with
the published ones.

    python -m experiments.sparse_training --out runs/sparse_training --workers 2

Expected: on the bundled digits all methods are within a point or two of the
dense network at density 0.1; at 0.02 static is last.

The recipe of SNFS on MNIST, and that of RigL on CIFAR-10, for an accelerator:

    python -m experiments.sparse_training --preset mnist_lenet_300_100 \
        --data.dir ~/tensorflow_datasets --workers 2 --out runs/lenet_300_100
    python -m experiments.sparse_training --preset cifar10_wrn_22_2 \
        --data.dir ~/tensorflow_datasets --out runs/wrn_22_2

Each finished combination of method, density and α is kept in a folder of its
own under combinations/; with --resume they are not trained again, and those
that were interrupted go on from their last look.

Source: Dettmers & Zettlemoyer, Sparse networks from scratch, 2019; Evci et al.,
Rigging the lottery, 2020; see experiments/published.py. The L2 penalty is on
weights alone, theirs on biases too. Numbers: experiments/README.md.
"""

import functools
import sys
from typing import Any

from experiments import sparse_training_report
from experiments.sparse_training_config import PRESETS, Config
from powerprop_jax.train import (
  combination_runs,
  command,
  sparse_runs,
)
from powerprop_jax.train.run_folder import RunFolder
from powerprop_jax.train.sparse_runs import Combination

_PROGRAM = 'sparse_training'


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  _check(config)
  combinations = sparse_runs.combinations(
    config.methods, config.densities, config.alphas
  )
  sparse_runs.check_combinations(config, combinations)
  settings = combination_runs.settings(config)
  folder = RunFolder(
    config.out, settings, program=_PROGRAM, resume=config.resume
  )
  found = combination_runs.run_all(
    functools.partial(_train, config),
    combinations,
    config.out,
    config.workers,
    config.loop.num_steps,
    sparse_runs.print_accuracy,
  )
  results = [record for records in found.values() for record in records]
  folder.write_results(results)
  sparse_training_report.write(
    folder.path,
    f'{config.net} on {config.data.name}',
    (config.net, config.data.name),
    settings,
    results,
    [
      {**record, 'method': c.method, 'total_density': c.density}
      for c in combinations
      for record in combination_runs.looks(config.out, c)
    ],
  )
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  combination_runs.check_any_left(config.out, combinations)


def _check(config: Config) -> None:
  sparse_runs.check_settings(config, 'methods', 'densities', 'alphas', 'keys')
  combination_runs.check_workers(config.workers)


def _train(
  config: Config, description: str, combination: Combination
) -> list[dict[str, Any]]:
  """Results of a combination: trained, or read where that is done."""

  def train(folder: RunFolder) -> list[dict[str, Any]]:
    trained = sparse_runs.train(
      config,
      combination,
      folder,
      execution=config.execution,
      description=description,
    )
    return sparse_runs.results(combination, trained)

  settings = combination_runs.settings(config) | combination._asdict()
  return combination_runs.once(
    train, config.out, combination, settings, _PROGRAM
  )


if __name__ == '__main__':
  sys.exit(
    command.run(
      main,
      PRESETS,
      prog=f'python -m experiments.{_PROGRAM}',
      description=str(__doc__).split('\n', maxsplit=1)[0],
      static_alpha=True,
    )
  )
