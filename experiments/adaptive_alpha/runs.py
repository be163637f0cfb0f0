"""One network and method, for all keys: trained or read, and what is known."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from experiments.adaptive_alpha import control, methods
from experiments.adaptive_alpha.config import Config, MethodName
from experiments.adaptive_alpha.control import Problem
from experiments.adaptive_alpha.evaluation import Records
from experiments.adaptive_alpha.methods import Trained
from experiments.common import combinations as combination_runs
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params
from powerprop_jax.export import npz
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis
from powerprop_jax.train import ensemble
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.runs.errors import UserError

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
  method: MethodName
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
    net_name=net,
    data=config.data,
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


def train_or_read(
  config: Config, description: str, combination: Combination
) -> Records:
  """Results of a combination: trained, or read where that is done."""
  net, method, alpha = combination
  problem = make_problem(config, net)
  networks = None
  # Those of a race lie in its last part.
  if method not in ('race', 'branch'):
    start = config.control.initial_alpha if alpha is None else alpha
    members = ensemble.product([start], config.keys)
    num_steps = problem.loop.num_steps
    networks = control.networks(problem, members, num_steps)
  folder = combination_runs.folder(
    config, combination, PROGRAM, networks=networks
  )
  if folder.is_complete:
    return combination_runs.read(folder)
  trained = methods.train(config, problem, method, alpha, folder, description)
  weights = _selected_weights(trained, config.keys[0])
  content = npz.pack(weights, {}, is_sparse=False)
  whole.write_bytes(folder.path / _WEIGHTS, content)
  ensemble.say_diverged(trained.members, trained.state, folder)
  found = results(problem, trained, config.kept, config.epsilons)
  return combination_runs.write(folder, found)


def results(
  problem: Problem,
  trained: Trained,
  kept: tuple[float, ...],
  epsilons: tuple[float, ...],
) -> Records:
  """Flat records of all that is known of one method.

  Returns:
    Records that all have key, of five kinds: sparsity, density, accuracy, loss
    after one-shot pruning, on the test split; leaf, epsilon, size, near_zero;
    step, leaf, power, near_zero, …, an evaluation; rung, candidate, …, a
    verdict; and those of summary.
  """
  state, members = trained.state, trained.members
  pruned = ensemble.prune(
    problem.net,
    state,
    members,
    problem.splits.test,
    [masks_lib.density_to_sparsity(share) for share in kept],
    scope=methods.SCOPE,
  )
  found: Records = [{k: r[k] for k in r if k != 'alpha'} for r in pruned]
  thetas = jax.device_get(jax.jit(jax.vmap(lambda s: s.theta))(state))
  for index, key in enumerate(members.key.tolist()):
    theta = ensemble.take(thetas, index)
    found += [
      {'key': key, **record}
      for record in analysis.fraction_near_zero(theta, epsilons)
    ]
    found.append({'key': key, **summary(trained, key)})
  return [*found, *trained.evaluations, *trained.verdicts]


def summary(trained: Trained, key: int) -> Row:
  """What became of one key, from the first evaluation to the last.

  Returns:
    steps, own_steps, power (where there is one for all leaves), near_zero, gain
    (of near_zero since the start) and mechanical (what of it came with changes
    of α); NaN where weights were not finite.
  """
  own = [r for r in trained.evaluations if r['key'] == key and 'near_zero' in r]
  first, last = own[0], own[-1]
  # As JSON has it, what is not finite is None.
  number = lambda value: math.nan if value is None else value
  return {
    'steps': trained.steps,
    'own_steps': trained.own_steps,
    **{name: last[name] for name in ('power', 'near_zero') if name in last},
    'gain': number(last['near_zero']) - number(first['near_zero']),
    'mechanical': last['jump'],
  }


def _selected_weights(trained: Trained, key: int) -> dict[str, np.ndarray]:
  """The weights θ of one key, by the names of their leaves."""
  index = int(np.flatnonzero(trained.members.key == key)[0])
  state = ensemble.take(trained.state, index)
  return {
    leaf.path: np.asarray(leaf.value)
    for leaf in trees.named_leaves(jax.device_get(state.theta))
    if pp.is_weight(*leaf)
  }


def read_weights(config: Config, combination: Combination) -> Params:
  """θ of the first key at the end, as a tree."""
  path = combination_runs.path(config.out, combination) / _WEIGHTS
  try:
    arrays, _, _ = npz.unpack(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f'cannot read {path}: {error}. It is damaged or of version 0.1.0; remove '
      'its folder to train this network again, or choose another --out.'
    ) from error
  tree: dict[str, dict[str, np.ndarray]] = {}
  for leaf, value in arrays.items():
    module_name, _, name = leaf.rpartition('/')
    tree.setdefault(module_name, {})[name] = value
  return tree
