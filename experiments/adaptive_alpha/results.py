"""What is known of networks after alpha_runs trained them, as flat records."""

import math

import jax
import numpy as np

from experiments.adaptive_alpha import runs as alpha_runs
from experiments.adaptive_alpha.control import Problem
from experiments.adaptive_alpha.evaluation import Records
from experiments.adaptive_alpha.runs import Trained
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis
from powerprop_jax.train import ensemble


def results(
  problem: Problem,
  trained: Trained,
  kept: tuple[float, ...],
  epsilons: tuple[float, ...],
) -> Records:
  """Flat records of all that is known of one method.

  Args:
    problem: what was trained.
    trained: what came out.
    kept: shares of weights to keep in one-shot pruning.
    epsilons: distances from zero.

  Returns:
    Records that all have key, of five kinds: sparsity, density, accuracy, loss
    after one-shot pruning, on the test split; leaf, epsilon, size, near_zero;
    step, leaf, power, near_zero, …, a look; rung, candidate, …, a verdict; and
    one for each key with steps, own_steps, power (where there is one for all
    leaves), near_zero, gain (of near_zero since the start) and mechanical (what
    of it came with changes of α).
  """
  state, runs = trained.state, trained.lanes
  pruned = ensemble.prune(
    problem.net,
    state,
    runs,
    problem.splits.test,
    [masks_lib.density_to_sparsity(share) for share in kept],
    scope=alpha_runs.SCOPE,
  )
  found: Records = [{k: r[k] for k in r if k != 'alpha'} for r in pruned]
  thetas = jax.device_get(jax.jit(jax.vmap(lambda s: s.theta))(state))
  for lane, key in enumerate(runs.key.tolist()):
    theta = jax.tree.map(lambda x, i=lane: x[i], thetas)
    found += [
      {'key': key, **record}
      for record in analysis.fraction_near_zero(theta, epsilons)
    ]
    found.append({'key': key, **summary(trained, key)})
  return [*found, *trained.looks, *trained.verdicts]


def summary(trained: Trained, key: int) -> Row:
  """What became of one key, from the first look to the last.

  Args:
    trained: what came out.
    key: the key.

  Returns:
    steps, own_steps, power (where there is one for all leaves), near_zero, gain
    and mechanical; NaN where weights were not finite.
  """
  of_key = [r for r in trained.looks if r['key'] == key and 'near_zero' in r]
  first, last = of_key[0], of_key[-1]
  # As JSON has it, what is not finite is None.
  number = lambda value: math.nan if value is None else value
  return {
    'steps': trained.steps,
    'own_steps': trained.own_steps,
    **{name: last[name] for name in ('power', 'near_zero') if name in last},
    'gain': number(last['near_zero']) - number(first['near_zero']),
    'mechanical': last['jump'],
  }


def selected_weights(trained: Trained, key: int) -> dict[str, np.ndarray]:
  """The weights θ of one key, by the names of their leaves."""
  lane = int(np.flatnonzero(trained.lanes.key == key)[0])
  state = jax.tree.map(lambda x: x[lane], trained.state)
  return {
    leaf.path: np.asarray(leaf.value)
    for leaf in trees.named_leaves(jax.device_get(state.theta))
    if select_lib.is_weight(*leaf)
  }
