r"""Many tasks in one network: EfficientPackNet and what it is compared with.

A network learns one task after another, e.g. MNIST with its pixels permuted
anew for each. PackNet and EfficientPackNet pack tasks into it by sparse masks,
for several α; fine-tuning shows what is forgotten without, elastic weight
consolidation what a penalty keeps, and a network for each task, or one for all
at once, what could be reached.

    python -m experiments.continual_permuted --out runs/continual --workers 2

Expected: on three permutations of the bundled digits the two PackNets forget
nothing and are within a point of a network for each task; fine-tuning is below
60 % on average. About a minute on two CPU cores.

Permuted MNIST, with 3, 10 and 100 tasks, and different data sets with a head
each:

    python -m experiments.continual_permuted --preset permuted_mnist_10 \
        --data.dir ~/tensorflow_datasets --out runs/permuted_mnist_10
    python -m experiments.continual_permuted --preset sequence \
        --data.dir ~/tensorflow_datasets --out runs/sequence

Each run of a method, α and key is kept in a folder of its own under
combinations/ and saved after every task; with --resume it goes on from there.

What comes out: accuracy.png, capacity.png, weights.png, table.md, report.html,
and results.json with one record for

    method, alpha, key, tasks_learned, task, accuracy    an entry of the
                             accuracy matrix; tasks_learned 0 is untrained
    …, tasks_learned, density, new, overlap, capacity_used, …    a task
    …, num_tasks, average_accuracy, forgetting, …    the whole stream

Source: Schwarz et al., Powerpropagation, 2021, section 5, and the seed report's
figures 13 and 14. Numbers: docs/results/continual_permuted.md.
"""

import functools
from typing import Any

import numpy as np

import experiments
from experiments.common import combinations as combination_runs
from experiments.continual_permuted import (
  methods,
  packing,
  report,
  runs,
  streams,
)
from experiments.continual_permuted.config import PRESETS, Config
from experiments.continual_permuted.runs import Combination
from powerprop_jax.core import reparam
from powerprop_jax.files.tables import Row
from powerprop_jax.train import optimizers
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError


def main(config: Config) -> None:
  """Runs every combination and writes what came out."""
  combinations = _checked_combinations(config)
  page = report.page(config)
  folder = combination_runs.run_folder(
    config, runs.PROGRAM, page, instead=runs.NO_NETWORK
  )
  num_tasks = len(streams.load(config.stream, config.data))
  found = combination_runs.run_all(
    functools.partial(runs.learn_or_read, config),
    combinations,
    config,
    num_tasks,
    _print,
  )
  results = [
    {**c._asdict(), **record}
    for c, records in found.items()
    for record in records
  ]
  folder.write_results(results)
  weights = _weights(config, combinations)
  report.write(folder, config, results, weights)
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')


def _checked_combinations(config: Config) -> list[Combination]:
  """All runs; refuses settings that do not fit before any of them starts."""
  errors.check_positive(config, 'workers')
  errors.check_several(config, 'methods', 'alphas', 'keys')
  if config.rates and len(config.rates) != len(config.alphas):
    raise UserError(
      f'--rates needs one for each of the {len(config.alphas)} alphas, got '
      f'{len(config.rates)}. Leave it out to use one rate for all.'
    )
  errors.check_positive(config, 'measure_every')
  for alpha in config.alphas:
    reparam.check_alpha(alpha)
  for key in config.keys:
    errors.check_key(key)
  combinations = [
    Combination(method, alpha, key)
    for method in config.methods
    for alpha in (config.alphas if method in methods.SPARSE else (1.0,))
    for key in config.keys
  ]
  for combination in combinations:
    if combination.key == config.keys[0]:
      problem = runs.make_problem(config, combination)
      optimizers.make_tx(problem.optimizer, 1.0, 1)
      methods.check(problem)
      runs.make_approach(config, combination).init()
  return combinations


def _weights(
  config: Config, combinations: list[Combination]
) -> dict[str, dict[float, Any]]:
  """Shared weights of the first key after the last task, by method and α."""
  weights: dict[str, dict[float, Any]] = {}
  for combination in combinations:
    method, alpha, key = combination
    if method in methods.SPARSE and key == config.keys[0]:
      path = combination_runs.path(config.out, combination)
      approach = runs.make_approach(config, combination)
      state = runs.read_state(path, approach)
      weights.setdefault(method, {})[alpha] = packing.weights(state)
  return weights


def _print(combination: Combination, results: list[Row]) -> None:
  (summary,) = [r for r in results if 'num_tasks' in r]
  average = summary['average_accuracy']
  words = f'average accuracy {np.nan if average is None else average:.4f}'
  for record in results:
    if 'stopped' in record:
      words = f'stopped: {record["stopped"]}'
  print(f'{combination.name}: {words}', flush=True)


if __name__ == '__main__':
  experiments.start(main, PRESETS, static_alpha=True)
