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
that were interrupted go on from their last evaluation.

Source: Dettmers & Zettlemoyer, Sparse networks from scratch, 2019; Evci et al.,
Rigging the lottery, 2020; see published.py. The L2 penalty is on
weights alone, theirs on biases too. Numbers: docs/results/sparse_training.md.
"""

import functools
import math

import experiments
from experiments.common import combinations as combination_runs
from experiments.common import sparse_runs
from experiments.common.sparse_runs import Combination
from experiments.sparse_training import report
from experiments.sparse_training.config import PRESETS, Config
from powerprop_jax import nets
from powerprop_jax.files.tables import Row
from powerprop_jax.train import methods as sparse_methods
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.runs import errors


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  run(config, 'sparse_training')


def run(config: Config, program: str) -> None:
  """The same under the name of a program."""
  splits = sparse_runs.check_settings(
    config, 'methods', 'densities', 'alphas', 'keys'
  )
  errors.check_positive(config, 'workers')
  is_positive = 0 < config.variance < math.inf
  errors.check(config, 'variance', is_positive, 'positive and finite')
  combinations = sparse_runs.combinations(
    config.methods, config.densities, config.alphas
  )
  sparse_runs.check_combinations(config, combinations, splits)
  densities = sorted({c.density for c in combinations})
  page = report.page(config, densities)
  folder = combination_runs.run_folder(config, program, page)
  found = combination_runs.run_all(
    functools.partial(train, config, program),
    combinations,
    config,
    config.loop.num_steps,
    sparse_runs.print_accuracy,
  )
  results = [record for records in found.values() for record in records]
  folder.write_results(results)
  report.write(folder, config, results)
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  combination_runs.check_any_left(config.out, combinations)


def train(
  config: Config, program: str, description: str, combination: Combination
) -> list[Row]:
  """Results of a combination: trained, or read where that is done."""
  method, density, alpha = combination
  folder = combination_runs.folder(
    config,
    combination,
    program,
    networks=sparse_runs.networks(config, alpha),
    sections=report.mask_sections(combination.name, [density], ''),
  )
  if folder.is_complete:
    return combination_runs.read(folder)
  splits = sparse_runs.load(config, bool(description))
  is_sparse = method not in sparse_methods.DENSE_FIRST
  variance = config.variance if is_sparse else 1.0
  net = nets.make(config.net, splits.num_classes, variance=variance)
  theta = step_lib.shapes(net, splits.example)
  trained = sparse_runs.train(
    config,
    net,
    sparse_runs.tx_maker(config, combination, theta, splits),
    alpha,
    folder,
    execution=config.execution if method != 'dense' else 'masked',
    description=description,
  )
  place = {'method': method, 'density': density}
  return combination_runs.write(
    folder, [place | record for record in sparse_runs.results(trained)]
  )


if __name__ == '__main__':
  experiments.start(main, PRESETS, static_alpha=True)
