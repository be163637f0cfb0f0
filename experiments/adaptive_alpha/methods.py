"""Ways to choose α for a network that will be pruned, from settings.

'fixed' trains with one power. The published controller raises and lowers α by
the share of weights near zero, under a cap or without one, and holds θ or φ
when α changes. 'per_leaf' is that rule for each layer by itself. 'race' is the
successive halving of race.py. 'branch' is the same in the middle of a run: one
network is trained with a moderate α; then branches of it go on with larger ones
and the same φ, and these race. Keeping φ shrinks all weights below 1, the small
ones most: θ becomes sign(θ) |θ|^(α′/α). What the published rule mistakes for a
success is here a soft pruning, after which training mends the network, and
which is judged by the accuracy after pruning. All methods have the same number
of training steps.
"""

from collections.abc import Sequence
import contextlib
import functools
from typing import NamedTuple

import numpy as np

from experiments.adaptive_alpha import control as control_lib
from experiments.adaptive_alpha import race as race_lib
from experiments.adaptive_alpha.config import (
  BranchConfig,
  Config,
  ControlConfig,
  MethodName,
  RaceConfig,
)
from experiments.adaptive_alpha.control import Control, Controlled, Problem
from experiments.adaptive_alpha.evaluation import Records
from experiments.adaptive_alpha.race import Rung
import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import reparam
from powerprop_jax.train import ensemble
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.runs import errors, metrics, writers
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs.contents import Contents
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.runs.writers import Writer
from powerprop_jax.train.step import TrainState

# Networks are pruned with all layers ranked together.
SCOPE = 'global'


class Trained(NamedTuple):
  """What came out of one method.

  Attributes:
    state: stacked final states, one for each key.
    members: the keys, and the α from which each started.
    evaluations: records of the networks that are left, see evaluation.records;
      step counts their own steps.
    verdicts: records of a race, see race.Outcome; else empty.
    steps: training steps taken for one key, all networks of a race together.
    own_steps: those of the network that is left.
  """

  state: TrainState
  members: Members
  evaluations: Records
  verdicts: Records
  steps: int
  own_steps: int


def check(config: Config, problem: Problem) -> None:
  """Refuses what a method cannot do, before any training.

  Raises:
    UserError: naming the setting.
    ValueError: from the controller, likewise.
  """
  control = config.control
  if control.period < 1:
    raise UserError(f'period must be at least 1 epoch, got {control.period}.')
  if control.warm_up < 0:
    raise UserError(
      f'warm_up must be at least 0 epochs, got {control.warm_up}.'
    )
  errors.check_positive(problem, 'at_once', prefix='')
  masks_lib.density_to_sparsity(config.race.kept, '--race.kept')
  for method in config.methods:
    if method == 'race':
      _check_candidates(config.race.candidates)
      _plan(problem, config.race)
    if method == 'branch':
      _check_candidates((config.branch.initial_alpha,))
      _check_candidates(config.branch.candidates)
      _plan(problem, config.branch)
    steering = control_of(problem, method, control)
    if steering is not None:
      control_lib.check_start(problem, steering, control.initial_alpha)


def _check_candidates(powers: tuple[float, ...]) -> None:
  if len(set(powers)) < len(powers):
    raise UserError(f'candidates must differ from each other, got {powers}.')
  for power in powers:
    reparam.check_alpha(power, 'a candidate')
    reparam.check_invertible(power, 'a candidate')


def control_of(
  problem: Problem, method: MethodName, config: ControlConfig
) -> Control | None:
  """What changes α in a method; None for fixed powers and races."""
  if method in ('fixed', 'race', 'branch'):
    return None
  is_uncapped = method.startswith('uncapped')
  controller = pp.near_zero_controller(
    config.epsilon,
    growth=config.growth,
    increment=config.increment,
    alpha_max=reparam.MAX_ALPHA if is_uncapped else config.alpha_max,
    per_leaf=method == 'per_leaf',
  )
  epoch = problem.loop.steps_per_dispatch
  return Control(
    controller,
    config.period * epoch,
    config.warm_up * epoch,
    'phi' if method.endswith('phi') else 'theta',
    per_leaf=method == 'per_leaf',
  )


def train(
  config: Config,
  problem: Problem,
  method: MethodName,
  alpha: float | None,
  folder: RunFolder,
  description: str = '',
) -> Trained:
  """Trains one method for every key, or goes on where the folder stopped.

  alpha is the power of 'fixed', None for the others; the description is for the
  progress, '' for none.
  """
  log = writers.of_run(folder, config)
  if method in ('race', 'branch'):
    plan = _plan(problem, config.race if method == 'race' else config.branch)
    return _race(problem, folder, plan, config.race.kept, description, log)
  num_steps = problem.loop.num_steps
  steering = control_of(problem, method, config.control)
  start = config.control.initial_alpha if alpha is None else alpha
  members = ensemble.product([start], problem.keys)
  state, evaluations = control_lib.fit(
    problem,
    control_lib.initial_state(problem, members, num_steps, steering),
    members,
    folder,
    num_steps=num_steps,
    horizon=num_steps,
    control=steering,
    description=description,
    writers=log,
  )
  return Trained(state.train, members, evaluations, [], num_steps, num_steps)


class _Plan(NamedTuple):
  """A race, perhaps of branches.

  Attributes:
    candidates: the powers.
    ladder: the rungs.
    trunk: steps before them; 0 if the powers differ from the start.
    initial_alpha: the power of the trunk.
  """

  candidates: tuple[float, ...]
  ladder: tuple[Rung, ...]
  trunk: int = 0
  initial_alpha: float = 1.0

  @property
  def horizon(self) -> int:
    """Training steps of the network that wins."""
    return self.steps_before(len(self.ladder))

  def steps_before(self, number: int) -> int:
    """Steps of a network before a rung."""
    return self.trunk + race_lib.own_steps(self.ladder[:number])

  def spent(self, number: int) -> int:
    """Steps of all networks of a key up to the end of a rung."""
    done = self.ladder[: number + 1]
    return self.trunk + sum(r.num_members * r.num_steps for r in done)


def _plan(problem: Problem, config: RaceConfig | BranchConfig) -> _Plan:
  num_steps, trunk, initial_alpha = problem.loop.num_steps, 0, 1.0
  if isinstance(config, BranchConfig):
    if not 0 < config.trunk_share < 1:
      raise UserError(
        f'trunk_share must be in (0, 1), got {config.trunk_share:g}.'
      )
    trunk = max(1, int(config.trunk_share * num_steps))
    initial_alpha = config.initial_alpha
  ladder = race_lib.rungs(
    len(config.candidates), num_steps - trunk, config.final_share
  )
  return _Plan(config.candidates, ladder, trunk, initial_alpha)


def _race(
  problem: Problem,
  folder: RunFolder,
  plan: _Plan,
  kept: float,
  description: str,
  log: Sequence[Writer],
) -> Trained:
  """A race, each stretch in a folder of its own within that of the run."""
  stored = run_folder.read_config(folder.path)
  evaluations: Records = []
  shared: Records = []

  def fit(
    state: Controlled, members: Members, name: str, start: int, num_steps: int
  ) -> Controlled:
    # Only the last stretch leaves networks that are what the race is for.
    is_last = name == f'rung_{len(plan.ladder) - 1}'
    part = RunFolder(
      folder.path / name,
      stored['config'],
      program=stored['program'],
      resume=True,
      is_part=True,
      contents=Contents(
        control_lib.networks(problem, members, num_steps) if is_last else None
      ),
    )
    state, found = control_lib.fit(
      problem,
      state,
      members,
      part,
      num_steps=num_steps,
      horizon=plan.horizon,
      start=start,
      description=description and f'{description}, {name}',
    )
    evaluations.extend(found)
    return state

  def train_rung(
    state: Controlled, members: Members, number: int, num_steps: int
  ) -> Controlled:
    start = plan.steps_before(number)
    state = fit(state, members, f'rung_{number}', start, num_steps)
    for record in evaluations[-len(members.key) :]:
      spent = plan.spent(number)
      writer.write(spent, record)
      named = {**record, 'alpha': record['start_alpha']}
      for other in log:
        other.write(spent, writers.numbers(named))
    return state

  powers = (plan.initial_alpha,) if plan.trunk else plan.candidates
  members = ensemble.product(powers, problem.keys)
  state = control_lib.initial_state(problem, members, plan.horizon)
  if plan.trunk:
    state = fit(state, members, 'trunk', 0, plan.trunk)
    shared, evaluations = evaluations, []
    state, members = control_lib.branch(
      problem, state, members, plan.candidates
    )
  # What is shown as progress counts the steps of all networks.
  with (
    metrics.MetricsWriter(folder.metrics_path) as writer,
    contextlib.ExitStack() as stack,
  ):
    for other in log:
      stack.callback(other.close)
    outcome = race_lib.run(
      state,
      members,
      plan.ladder,
      train=train_rung,
      score=functools.partial(_scores, problem, kept),
    )
  won = set(zip(*(x.tolist() for x in outcome.members), strict=True))
  own = [r for r in evaluations if (r['start_alpha'], r['key']) in won]
  return Trained(
    outcome.state.train,
    outcome.members,
    shared + own,
    outcome.verdicts,
    problem.loop.num_steps,
    plan.horizon,
  )


def _scores(
  problem: Problem, kept: float, state: Controlled, members: Members
) -> tuple[np.ndarray, np.ndarray]:
  """Accuracy, NaN of those that diverged, and loss after one-shot pruning."""
  found = ensemble.prune(
    problem.net,
    state.train,
    members,
    problem.splits.validation,
    [masks_lib.density_to_sparsity(kept)],
    scope=SCOPE,
  )
  scores = np.array([record['accuracy'] for record in found])
  losses = np.array([record['loss'] for record in found])
  leaves = ensemble.lost_leaves(members, state.train).values()
  is_lost = [leaf is not None for leaf in leaves]
  return np.where(is_lost, np.nan, scores), losses
