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

from collections.abc import Callable, Iterator
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np

from experiments import sparse_training_report
from experiments.sparse_training_config import PRESETS, Config
from powerprop_jax import nets
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.optim import views
from powerprop_jax.train import (
  augment,
  command,
  data,
  json_files,
  lanes,
  metrics,
  optimizers,
  sparse_methods,
  sparse_sweep,
  sweep,
  workers,
)
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import DataConfig
from powerprop_jax.train.data_sources import Arrays
from powerprop_jax.train.errors import UserError
from powerprop_jax.train.run_folder import RunFolder
from powerprop_jax.train.sparse_methods import Lengths, Method

_PROGRAM = 'sparse_training'


class Combination(NamedTuple):
  """What one compiled program trains, for all keys.

  Attributes:
    method: the method.
    density: share of the weights that are connections; 1 for 'dense'.
    alpha: the power.
  """

  method: Method
  density: float
  alpha: float

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f'{self.method}_density_{self.density:g}_alpha_{self.alpha:g}'


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  _check(config)
  combinations = list(_combinations(config))
  _check_combinations(config, combinations)
  folder = RunFolder(
    config.out, _identity(config), program=_PROGRAM, resume=config.resume
  )
  found: dict[Combination, list[dict[str, Any]]] = {}
  for combination, results in _train_all(config, combinations):
    found[combination] = results
    accuracies = [record['accuracy'] for record in results]
    print(f'{combination.name}: test accuracy {np.mean(accuracies):.4f}')
  # In the order of the settings, whatever was done first.
  results = [record for c in combinations for record in found[c]]
  folder.write_results(results)
  watched = {
    c: metrics.read_metrics(_path(config, c) / 'metrics.jsonl')
    for c in combinations
  }
  sparse_training_report.write(
    folder.path,
    f'{config.net} on {config.data.name}',
    (config.net, config.data.name),
    _identity(config),
    results,
    [
      {**record, 'method': c.method, 'total_density': c.density}
      for c, records in watched.items()
      for record in records
    ],
  )
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')


def _identity(config: Config) -> dict[str, Any]:
  """The settings on which the results depend."""
  settings = json_files.to_json(config)
  # How many processes share the work may change when it is resumed.
  return {k: v for k, v in settings.items() if k != 'workers'}


def _combinations(config: Config) -> Iterator[Combination]:
  for alpha in config.alphas:
    for method in config.methods:
      densities = (1.0,) if method == 'dense' else config.densities
      for density in densities:
        yield Combination(method, density, alpha)


def _path(config: Config, combination: Combination) -> pathlib.Path:
  folder = pathlib.Path(config.out).expanduser()
  return folder / 'combinations' / combination.name


def _check(config: Config) -> None:
  lanes.check_at_once(config.lanes_at_once)
  for name in ('methods', 'densities', 'alphas', 'keys'):
    values = getattr(config, name)
    if not values:
      raise UserError(f'--{name} needs at least one value.')
    if len(set(values)) < len(values):
      raise UserError(f'--{name} must differ from each other, got {values}.')
  if config.workers < 1:
    raise UserError(f'--workers must be at least 1, got {config.workers}.')
  if config.num_test is not None and config.num_test < 1:
    raise UserError(f'--num-test must be at least 1, got {config.num_test}.')
  lanes.product(config.alphas, config.keys)


def _check_combinations(
  config: Config, combinations: list[Combination]
) -> None:
  """Refuses what a method or a network cannot do, before any training."""
  splits = _load(config)
  net = nets.make(config.net, splits.num_classes)
  images = data.to_float(splits.train.images[:1])
  if config.augment:
    augment.crop_and_flip(jax.random.key(0), images)
  theta = _weights(net, images)
  for combination in combinations:
    tx = _maker(config, combination, theta, len(splits.train.labels))(
      jax.random.key(0)
    )
    try:
      jax.eval_shape(functools.partial(views.init, tx), theta)
    except ValueError as error:
      raise UserError(
        f'{combination.method} at density {combination.density:g}: {error}'
      ) from error


# A worker loads the data once, for all the combinations that it gets.
@functools.lru_cache(maxsize=1)
def _splits(
  config: DataConfig, num_test: int | None, show_progress: bool
) -> data.Splits:
  splits = data.load(config, show_progress=show_progress)
  test = Arrays(*(part[:num_test] for part in splits.test))
  return splits._replace(test=test)


def _load(config: Config, show_progress: bool = True) -> data.Splits:
  return _splits(config.data, config.num_test, show_progress)


def _weights(net: hk.TransformedWithState, images: jax.Array) -> Any:
  """Shapes of the parameters."""
  init = functools.partial(net.init, is_training=True)
  theta, _ = jax.eval_shape(init, jax.random.key(0), images)
  return theta


def _maker(
  config: Config, combination: Combination, theta: Any, num_examples: int
) -> Callable[[jax.Array], Any]:
  """From a PRNG key to the gradient transformation of a combination."""
  method, density, alpha = combination
  num_steps = config.loop.num_steps
  inner = optimizers.make_tx(config.optimizer, alpha, num_steps)
  sizes = [
    leaf.value.size
    for leaf in trees.named_leaves(theta)
    if select_lib.is_weight(*leaf)
  ]
  lengths = Lengths(
    num_steps, -(-num_examples // config.loop.batch_size), sum(sizes)
  )
  return lambda key: sparse_methods.make_tx(
    inner, method, density, config.sparse, lengths, key
  )


def _train_all(
  config: Config, combinations: list[Combination]
) -> Iterator[tuple[Combination, list[dict[str, Any]]]]:
  """Every combination with its results, as they are done."""
  if config.workers == 1:
    for number, combination in enumerate(combinations, start=1):
      description = f'{number}/{len(combinations)} {combination.name}'
      yield combination, _train(config, description, combination)
    return
  total = len(combinations) * config.loop.num_steps
  start = _steps_done(config, combinations)
  with metrics.Progress('training', total, start=start) as progress:
    yield from workers.run(
      functools.partial(_train, config, ''),
      combinations,
      config.workers,
      watch=lambda: progress.update(_steps_done(config, combinations)),
    )


def _steps_done(config: Config, combinations: list[Combination]) -> int:
  """Steps of all combinations together, up to their last looks."""
  done = 0
  for combination in combinations:
    path = _path(config, combination) / 'metrics.jsonl'
    records = metrics.read_metrics(path) if path.exists() else []
    done += records[-1]['step'] if records else 0
  return done


def _train(
  config: Config, description: str, combination: Combination
) -> list[dict[str, Any]]:
  """Results of a combination: trained, or read where that is done."""
  folder = RunFolder(
    _path(config, combination),
    _identity(config) | combination._asdict(),
    program=_PROGRAM,
    resume=True,
  )
  if folder.is_complete:
    return folder.read_json('results.json')
  splits = _load(config, show_progress=bool(description))
  net = nets.make(config.net, splits.num_classes)
  theta = _weights(net, data.to_float(splits.train.images[:1]))
  prepare: step_lib.Prepare = data.to_float
  if config.normalise:
    prepare = data.normalise(splits.train.images)
  runs = lanes.product([combination.alpha], config.keys)
  state = sparse_sweep.train(
    net,
    _maker(config, combination, theta, len(splits.train.labels)),
    runs,
    splits,
    config.loop,
    folder,
    prepare=prepare,
    augment=augment.crop_and_flip if config.augment else None,
    repeat_update=(
      combination.method == 'dense' and config.optimizer.is_elementwise
    ),
    at_once=config.lanes_at_once,
    description=description,
    show_progress=bool(description),
  )
  for note in sweep.notes_on_diverged(runs, state):
    print(f'{combination.name}: {note}', flush=True)
  results = [
    {'method': combination.method, 'density': combination.density, **record}
    for record in sparse_sweep.results(
      net, state, runs, splits, prepare=prepare
    )
  ]
  folder.write_results(results)
  folder.mark_complete()
  return results


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
