r"""Sparse networks with and without a cosine transform, at extreme sparsity.

Trains a network as it is, and with a fixed cosine transform beside the weights
of every layer, for every way to choose the connections, at every density and
for every α; one compiled program for each, with all keys in it.

    python -m experiments.dct_plus_sparse --out runs/dct_plus_sparse --workers 2

Expected, on the bundled digits: at density 0.001 the network with a transform
is at 78 to 87 %, the standard one at chance but for SynFlow's support (34 %);
at 0.01 at 92 to 97 %, where the standard one passes 90 % with SynFlow and RigL
alone.
About a minute and a half on two CPU cores.

On MNIST, and on CIFAR for an accelerator:

    python -m experiments.dct_plus_sparse --preset mnist_lenet_300_100 \
        --data.dir ~/tensorflow_datasets --workers 2 --out runs/dct_300_100
    python -m experiments.dct_plus_sparse --preset cifar10_resnet_50 \
        --data.dir ~/tensorflow_datasets --out runs/dct_resnet_50

With --alphas 2 the weights are trained with powerprop. The sparse part of a
network with a transform starts at zero, where powerprop could not move it, so
for α > 1 it starts at random values instead (--dct-init-scale). That trains,
and did not help on MNIST: with EPL 94.0 % for 94.8 % at density 0.01, 76 % for
82 % at 0.001 (two keys, the first 2,000 test images).

Each finished combination is kept in a folder of its own under combinations/;
with --resume they are not trained again, and those that were interrupted go on
from their last evaluation. results.json holds two kinds of records, all with
network, support, density, alpha and key:

    accuracy, parameters, bytes_masked, bytes_condensed, …   of the network
    layer, layer_density, variance, gradient_norm            of each layer

The density of a layer is that after training, the other two are at
initialisation. sizes.json and steps.json hold the tables of sizes and of the
times of steps.

Source: Price & Tanner, Dense for the price of sparse, 2021. The L2 penalty is
on weights alone, theirs on the scales of the transforms too; for the
differences between supports and theirs see prune/at_init.
"""

import functools

import experiments
from experiments.common import combinations as combination_runs
from experiments.common import sparse_runs
from experiments.dct_plus_sparse import costs as costs_lib
from experiments.dct_plus_sparse import patterns, report, training
from experiments.dct_plus_sparse.config import PRESETS, Config
from experiments.dct_plus_sparse.training import Combination
from powerprop_jax.core.trees import Params
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  chosen = _check(config)
  folder = combination_runs.run_folder(
    config, training.PROGRAM, report.page(config), *training.NOT_SETTINGS
  )
  found = combination_runs.run_all(
    functools.partial(training.train, config),
    chosen,
    config,
    config.loop.num_steps,
    sparse_runs.print_accuracy,
  )
  results = [record for records in found.values() for record in records]
  if not results:
    raise UserError(
      'there is no network to report: no support was found. Raise --densities, '
      'or choose other --supports.'
    )
  folder.write_results(results)
  of_networks = [record for record in results if 'accuracy' in record]
  costs = {
    'sizes': costs_lib.size_table(of_networks),
    'steps': costs_lib.step_table(config),
  }
  report.write(folder, config, results, costs)
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  combination_runs.check_any_left(config.out, chosen)


def _check(config: Config) -> list[Combination]:
  """The combinations, after refusing what cannot be trained."""
  errors.check_positive(config, 'workers')
  if not 0 < config.dct_init_scale < float('inf'):
    raise UserError(
      '--dct-init-scale must be positive and finite, got '
      f'{config.dct_init_scale:g}: at 0 the sparse part would stay there for '
      'every α > 1.'
    )
  if config.timed_steps < 0:
    raise UserError(
      f'--timed-steps must be at least 0, got {config.timed_steps}.'
    )
  chosen = training.combinations(config)
  _check_supports(config, bool(chosen))
  splits = sparse_runs.check_settings(
    config, 'networks', 'supports', 'densities', 'alphas', 'keys'
  )
  patterns.check(config.score, len(splits.train.labels))
  # A layer that would lose all its weights is found from shapes alone.
  made: dict[tuple[str, float], Params] = {}
  for combination in chosen:
    network, support, density, alpha = combination
    if (network, alpha) not in made:
      net = training.make_net(config, network, alpha, splits.num_classes)
      made[network, alpha] = step_lib.shapes(net, splits.example)
    theta = made[network, alpha]
    make_tx = training.tx_maker(config, combination, theta, splits)
    what = f'{support} at density {density:g}'
    patterns.check_density(support, theta, density, what)
    sparse_runs.check_starts(make_tx, theta, what)
  return chosen


def _check_supports(config: Config, any_possible: bool) -> None:
  """Says which supports are not for every network, or for none."""
  scored = [s for s in config.supports if s in patterns.SCORED]
  if 'dct' not in config.networks or not scored:
    return
  line = (
    'the weights beside a cosine transform start at zero, where '
    f'{", ".join(scored)} cannot rank them'
  )
  if not any_possible:
    raise UserError(f'{line}. Add --networks standard, or other --supports.')
  print(f"note: {line}: not for the network 'dct'.", flush=True)


if __name__ == '__main__':
  experiments.start(main, PRESETS, static_alpha=True)
