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
Its state.npz holds the network with all its tasks.

What comes out: accuracy.png, capacity.png, weights.png, table.md, report.html,
and results.json with one record for

    method, alpha, key, tasks_learned, task, accuracy    an entry of the
                             accuracy matrix; tasks_learned 0 is untrained
    …, tasks_learned, density, new, overlap, capacity_used, …    a task
    …, num_tasks, average_accuracy, forgetting, …    the whole stream

Source: Schwarz et al., Powerpropagation, 2021, section 5, and the seed report's
figures 13 and 14. Numbers: experiments/README.md.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments import continual_permuted_report
from experiments.continual_permuted_config import PRESETS, Config
from powerprop_jax.core import reparam
from powerprop_jax.train import (
  checks,
  combination_runs,
  command,
  continual_baselines,
  continual_methods,
  continual_packing,
  continual_runs,
  continual_streams,
  optimizers,
)
from powerprop_jax.train import state as state_lib
from powerprop_jax.train.continual_methods import Method, Name, Problem
from powerprop_jax.train.errors import UserError
from powerprop_jax.train.run_folder import RunFolder

_PROGRAM = 'continual_permuted'


class Combination(NamedTuple):
  """One run.

  Attributes:
    method: the method.
    alpha: the power; 1 for dense methods.
    key: seed of the initial weights and of the order of the data.
  """

  method: Name
  alpha: float
  key: int

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f'{self.method}_alpha_{self.alpha:g}_key_{self.key}'


def main(config: Config) -> None:
  """Runs every combination and writes what came out."""
  combinations = _checked_combinations(config)
  settings = combination_runs.settings(config)
  folder = RunFolder(
    config.out, settings, program=_PROGRAM, resume=config.resume
  )
  num_tasks = len(continual_streams.load(config.stream, config.data))
  found = combination_runs.run_all(
    functools.partial(_run, config),
    combinations,
    config.out,
    config.workers,
    num_tasks,
    _print,
  )
  results = [
    {**c._asdict(), **record}
    for c, records in found.items()
    for record in records
  ]
  folder.write_results(results)
  continual_permuted_report.write(
    folder.path,
    _title(config, num_tasks),
    settings,
    results,
    _weights(config, combinations),
  )
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')


def _checked_combinations(config: Config) -> list[Combination]:
  """All runs; refuses settings that do not fit before any of them starts."""
  combination_runs.check_workers(config.workers)
  checks.several(config, 'methods', 'alphas', 'keys')
  if config.rates and len(config.rates) != len(config.alphas):
    raise UserError(
      f'--rates needs one for each of the {len(config.alphas)} alphas, got '
      f'{len(config.rates)}. Leave it away to use one rate for all.'
    )
  checks.positive(config, 'measure_every')
  for alpha in config.alphas:
    reparam.check_alpha(alpha)
  for key in config.keys:
    state_lib.check_key(key)
  for rate in config.rates or (config.optimizer.learning_rate,):
    optimizers.make_tx(_with_rate(config, rate).optimizer, 1.0, 1)
  combinations = [
    Combination(method, alpha, key)
    for method in config.methods
    for alpha in (
      config.alphas if method in continual_methods.SPARSE else (1.0,)
    )
    for key in config.keys
  ]
  for combination in combinations:
    if combination.key == config.keys[0]:
      continual_methods.check(_problem(config, combination))
      _method(config, combination).init()
  return combinations


def _with_rate(config: Config, rate: float) -> Config:
  optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
  return dataclasses.replace(config, optimizer=optimizer)


def _problem(config: Config, combination: Combination) -> Problem:
  if config.rates and combination.method in continual_methods.SPARSE:
    rate = config.rates[config.alphas.index(combination.alpha)]
    config = _with_rate(config, rate)
  stream = continual_streams.load(config.stream, config.data)
  return Problem(
    stream=stream,
    num_classes=max(task.num_classes for task in stream),
    is_multi_head=config.stream.own_heads,
    key=combination.key,
    net=config.net,
    optimizer=config.optimizer,
    ewc=config.ewc,
  )


def _method(config: Config, combination: Combination) -> Method:
  method, alpha, _ = combination
  problem = _problem(config, combination)
  # Spelled out for the type checker.
  if method == 'efficient_packnet' or method == 'packnet':
    return continual_packing.make(method, problem, config.packing, alpha)
  return continual_baselines.make(method, problem)


def _run(
  config: Config, description: str, combination: Combination
) -> list[dict[str, Any]]:
  """Results of a combination: learned, or read where that is done."""

  def learn(folder: RunFolder) -> list[dict[str, Any]]:
    return continual_runs.run(
      _method(config, combination),
      _problem(config, combination),
      folder,
      measure_every=config.measure_every,
      description=description,
    )

  settings = combination_runs.settings(config) | combination._asdict()
  return combination_runs.once(
    learn, config.out, combination, settings, _PROGRAM
  )


def _weights(
  config: Config, combinations: list[Combination]
) -> dict[str, dict[float, Any]]:
  """Shared weights of the first key after the last task, by method and α."""
  weights: dict[str, dict[float, Any]] = {}
  for combination in combinations:
    method, alpha, key = combination
    if method in continual_methods.SPARSE and key == config.keys[0]:
      path = combination_runs.path(config.out, combination)
      state = continual_runs.read_state(path, _method(config, combination))
      weights.setdefault(method, {})[alpha] = continual_packing.weights(state)
  return weights


def _title(config: Config, num_tasks: int) -> str:
  if config.stream.kind == 'sequence':
    return ', then '.join(config.stream.sequence)
  return f'{num_tasks} tasks, {config.stream.kind} {config.data.name}'


def _print(combination: Combination, results: list[dict[str, Any]]) -> None:
  (summary,) = [r for r in results if 'num_tasks' in r]
  average = summary['average_accuracy']
  words = f'average accuracy {np.nan if average is None else average:.4f}'
  for record in results:
    if 'stopped' in record:
      words = f'stopped: {record["stopped"]}'
  print(f'{combination.name}: {words}', flush=True)


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
