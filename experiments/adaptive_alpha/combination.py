"""One network and method, for all keys, trained or read."""

import functools
import io
from typing import NamedTuple

import numpy as np

from experiments.adaptive_alpha import results as alpha_results
from experiments.adaptive_alpha import runs
from experiments.adaptive_alpha.config import Config
from experiments.adaptive_alpha.control import Problem
from experiments.adaptive_alpha.runs import Name
from experiments.common import combinations as combination_runs
from powerprop_jax import nets
from powerprop_jax.core.trees import Params
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.train import ensemble
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.loop import LoopConfig

PROGRAM = 'adaptive_alpha'


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


def make_problem(config: Config, net: str) -> Problem:
  """What is trained on what, for all keys."""
  splits = load_splits(config.data)
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
def load_splits(config: data.DataConfig) -> data.Splits:
  """The data, which a process loads once."""
  return data.load(config)


def train(
  config: Config, description: str, combination: Combination
) -> list[Row]:
  """Results of a combination: trained, or read where that is done."""
  folder = combination_runs.folder(config, combination, PROGRAM)
  if folder.is_complete:
    return combination_runs.read(folder)
  problem = make_problem(config, combination.net)
  trained = runs.train(
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
  whole.write_bytes(folder.path / _WEIGHTS, content.getvalue())
  ensemble.say_diverged(trained.lanes, trained.state, folder)
  results = alpha_results.results(
    problem, trained, config.kept, config.epsilons
  )
  return combination_runs.write(folder, results)


def read_weights(config: Config, combination: Combination) -> Params:
  """θ of the first key at the end, as a tree."""
  path = combination_runs.path(config.out, combination) / _WEIGHTS
  tree: dict[str, dict[str, np.ndarray]] = {}
  with np.load(path) as stored:
    for leaf in stored.files:
      module_name, _, name = leaf.rpartition('/')
      tree.setdefault(module_name, {})[name] = stored[leaf]
  return tree
