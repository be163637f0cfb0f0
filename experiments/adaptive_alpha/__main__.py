r"""The power α: fixed, steered by the weights near zero, or raced.

The published controller raises α while the share of weights near zero grows and
lowers it when that share falls. Here it is compared with fixed powers, with
itself when φ is kept as α changes, without a cap on α, with an α for each
layer, and with two races by the accuracy after pruning to a target: of powers
from the start, and of branches with larger powers in the middle of a run. All
take the same number of training steps, those of a race being counted over all
its networks.

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
    step, leaf, power, near_zero, jump, validation_accuracy, …    an evaluation,
                             power being α at that moment; jump as mechanical
                             below
    rung, candidate, accuracy, loss, survives    a network of the race,
                             validation split, after one-shot pruning
    steps, own_steps, near_zero, gain, mechanical, …    the whole run; gain is
                             what near_zero grew by, mechanical what the changes
                             of α added to it by themselves, without a step

Source: Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 5. Initial α,
ε, epochs and optimiser are not given there. Numbers:
docs/results/adaptive_alpha.md.
"""

import functools

import numpy as np

import experiments
from experiments.adaptive_alpha import methods, report, runs
from experiments.adaptive_alpha.config import PRESETS, Config
from experiments.adaptive_alpha.runs import Combination
from experiments.common import combinations as combination_runs
from powerprop_jax.core import masks, reparam
from powerprop_jax.files.tables import Row
from powerprop_jax.train import ensemble, optimizers
from powerprop_jax.train.runs import divergence, errors
from powerprop_jax.train.runs.errors import UserError


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  combinations = _checked_combinations(config)
  page = report.page(config)
  folder = combination_runs.run_folder(config, runs.PROGRAM, page)
  found = combination_runs.run_all(
    functools.partial(runs.train_or_read, config),
    combinations,
    config,
    runs.make_problem(config, config.nets[0]).loop.num_steps,
    functools.partial(_print, config),
  )
  results = [
    {**c._asdict(), **record}
    for c, records in found.items()
    for record in records
  ]
  folder.write_results(results)
  weights = {c: runs.read_weights(config, c) for c in combinations}
  report.write(folder, config, results, weights)
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  combination_runs.check_any_left(config.out, combinations)


def _checked_combinations(config: Config) -> list[Combination]:
  """All runs; refuses settings that do not fit before any of them starts."""
  errors.check_positive(config, 'workers')
  errors.check_several(config, 'nets', 'methods', 'keys', 'kept', 'epsilons')
  if 'fixed' in config.methods:
    errors.check_several(config, 'alphas')
  errors.check_positive(config, 'epochs', 'look_every', 'batch_size')
  for kept in config.kept:
    masks.density_to_sparsity(kept, '--kept')
  for epsilon in config.epsilons:
    if not 0 < epsilon < float('inf'):
      raise UserError(
        f'--epsilons are distances from zero, positive, got {epsilon:g}.'
      )
  for alpha in config.alphas:
    reparam.check_alpha(alpha)
    reparam.check_invertible(alpha)
  ensemble.product([1.0], config.keys)
  divergence.say_scale(runs.load_splits(config.data))
  optimizers.make_tx(config.optimizer, 1.0, 1)
  for net in config.nets:
    methods.check(config, runs.make_problem(config, net))
  return [
    Combination(net, method, alpha)
    for net in config.nets
    for method in config.methods
    for alpha in (config.alphas if method == 'fixed' else (None,))
  ]


def _print(
  config: Config, combination: Combination, results: list[Row]
) -> None:
  words = []
  for kept in config.kept:
    sparsity = masks.density_to_sparsity(kept)
    found = [r['accuracy'] for r in results if r.get('sparsity') == sparsity]
    words.append(f'{100 * np.mean(found):.2f} at {kept:g}')
  print(f'{combination.name}: {", ".join(words)} kept', flush=True)


if __name__ == '__main__':
  experiments.start(main, PRESETS)
