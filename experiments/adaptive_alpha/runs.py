"""Ways to choose α for a network that will be pruned, from settings.

'fixed' trains with one power. The published controller raises and lowers α by
the share of weights near zero, under a cap or without one, and holds θ or φ
when α changes. 'per_leaf' is that rule for each layer by itself. 'race' is the
successive halving of alpha_race. 'branch' is the same in the middle of a run:
one network is trained with a moderate α; then branches of it go on with larger
ones and the same φ, and these race. Keeping φ shrinks all weights below 1, the
small ones most: θ becomes sign(θ) |θ|^(α′/α). What the published rule mistakes
for a success is here a soft pruning, after which training mends the network,
and which is judged by the accuracy after pruning. All methods have the same
number of training steps.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from experiments.adaptive_alpha import (
  control as alpha_control,
)
from experiments.adaptive_alpha import (
  race as alpha_race,
)
from experiments.adaptive_alpha.control import (
  Control,
  Controlled,
  Hold,
  Problem,
)
from experiments.adaptive_alpha.evaluation import Records
from experiments.adaptive_alpha.race import Rung
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import reparam
from powerprop_jax.optim import alpha as alpha_lib
from powerprop_jax.train import ensemble as lanes
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.state import TrainState

Name = Literal[
  'fixed',
  'published_theta',
  'published_phi',
  'uncapped_theta',
  'uncapped_phi',
  'per_leaf',
  'race',
  'branch',
]
NAMES: tuple[Name, ...] = (
  'fixed',
  'published_theta',
  'published_phi',
  'uncapped_theta',
  'uncapped_phi',
  'per_leaf',
  'race',
  'branch',
)
# Networks are pruned with all layers ranked together.
SCOPE = 'global'


@dataclasses.dataclass(frozen=True)
class ControlConfig:
  """The published rule, and what it leaves open."""

  # α before the first control point, above 1.
  initial_alpha: float = 1.25
  # A weight within this distance of zero counts as near zero.
  epsilon: float = 0.01
  # Epochs between two control points; there is none after the last step.
  period: int = 3
  # Epochs before the first of these periods.
  warm_up: int = 0
  # By how much α - 1 is multiplied at first, and divided at a setback.
  growth: float = 1.5
  # What is added to α after the first setback.
  increment: float = 0.1
  # Largest α; the methods 'uncapped' have none but that of float32.
  alpha_max: float = 4.0


@dataclasses.dataclass(frozen=True)
class RaceConfig:
  """The race."""

  # Powers at the start.
  candidates: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
  # Share of weights to keep in the one-shot pruning that decides.
  kept: float = 0.05
  # Share of all training steps that the last power gets at least.
  final_share: float = 0.6


@dataclasses.dataclass(frozen=True)
class BranchConfig:
  """The race of branches; its target is that of the race."""

  # α before the branches.
  initial_alpha: float = 1.5
  # Share of all training steps before them, in (0, 1).
  trunk_share: float = 0.4
  # Powers of the branches.
  candidates: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
  # Share of the other steps that the last branch gets at least.
  final_share: float = 0.4


class Trained(NamedTuple):
  """What came out of one method.

  Attributes:
    state: stacked final states, a lane for each key.
    lanes: the keys, and the α from which each lane started.
    looks: records of the looks at the networks that are left, see
      alpha_looks.look_records; step counts their own steps.
    verdicts: records of a race, see alpha_race.Outcome; else empty.
    steps: training steps taken for one key, all lanes together.
    own_steps: those of the network that is left.
  """

  state: TrainState
  lanes: Members
  looks: Records
  verdicts: Records
  steps: int
  own_steps: int


def check(
  problem: Problem,
  names: tuple[Name, ...],
  control: ControlConfig,
  race: RaceConfig,
  branch: BranchConfig,
) -> None:
  """Refuses what a method cannot do, before any training.

  Args:
    problem: what is to be trained.
    names: the methods.
    control: settings of the controllers.
    race: settings of the race.
    branch: settings of the race of branches.

  Raises:
    UserError: naming the setting.
    ValueError: from the controller, likewise.
  """
  if control.period < 1:
    raise UserError(f'period must be at least 1 epoch, got {control.period}.')
  if control.warm_up < 0:
    raise UserError(
      f'warm_up must be at least 0 epochs, got {control.warm_up}.'
    )
  lanes.check_at_once(problem.at_once)
  masks_lib.density_to_sparsity(race.kept, '--kept')
  for name in names:
    if name == 'race':
      _check_candidates(race.candidates)
      _plan(problem, race)
    if name == 'branch':
      _check_candidates((branch.initial_alpha,))
      _check_candidates(branch.candidates)
      _plan(problem, branch)
    steering = control_of(problem, name, control)
    if steering is not None:
      alpha_control.check_start(problem, steering, control.initial_alpha)


def _check_candidates(powers: tuple[float, ...]) -> None:
  if len(set(powers)) < len(powers):
    raise UserError(f'candidates must differ from each other, got {powers}.')
  for power in powers:
    reparam.check_alpha(power, 'a candidate')
    reparam.check_invertible(power, 'a candidate')


def control_of(
  problem: Problem, name: Name, config: ControlConfig
) -> Control | None:
  """What changes α in a method; None for fixed powers and races.

  Args:
    problem: what is trained.
    name: the method.
    config: settings of the controllers.

  Returns:
    The control, its epochs turned into steps.

  Raises:
    ValueError: if a setting is out of range.
  """
  if name in ('fixed', 'race', 'branch'):
    return None
  is_uncapped = name.startswith('uncapped')
  hold: Hold = 'phi' if name.endswith('phi') else 'theta'
  controller = alpha_lib.near_zero_controller(
    config.epsilon,
    growth=config.growth,
    increment=config.increment,
    alpha_max=reparam.MAX_ALPHA if is_uncapped else config.alpha_max,
    per_leaf=name == 'per_leaf',
  )
  epoch = problem.loop.steps_per_dispatch
  return Control(
    controller,
    config.period * epoch,
    config.warm_up * epoch,
    hold,
    per_leaf=name == 'per_leaf',
  )


def train(
  problem: Problem,
  name: Name,
  alpha: float | None,
  folder: RunFolder,
  control: ControlConfig,
  race: RaceConfig,
  branch: BranchConfig,
  *,
  description: str = '',
) -> Trained:
  """Trains one method for every key, or goes on where the folder stopped.

  Args:
    problem: what is trained.
    name: the method.
    alpha: the power of 'fixed'; None for the others.
    folder: where metrics and checkpoints go.
    control: settings of the controllers.
    race: settings of the race.
    branch: settings of the race of branches.
    description: what is being trained, for the progress; '' for no progress.

  Returns:
    What came out.
  """
  if name in ('race', 'branch'):
    plan = _plan(problem, race if name == 'race' else branch)
    return _race(problem, folder, plan, race.kept, description)
  num_steps = problem.loop.num_steps
  steering = control_of(problem, name, control)
  start = control.initial_alpha if alpha is None else alpha
  runs = lanes.product([start], problem.keys)
  state, looks = alpha_control.fit(
    problem,
    alpha_control.initial_state(problem, runs, num_steps, steering),
    runs,
    folder,
    num_steps=num_steps,
    horizon=num_steps,
    control=steering,
    description=description,
  )
  return Trained(state.train, runs, looks, [], num_steps, num_steps)


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
    return self.trunk + alpha_race.own_steps(self.ladder)

  def steps_before(self, number: int) -> int:
    """Steps of a network before a rung."""
    return self.trunk + alpha_race.own_steps(self.ladder[:number])

  def spent(self, number: int) -> int:
    """Steps of all lanes of a key up to the end of a rung."""
    done = self.ladder[: number + 1]
    return self.trunk + sum(r.num_lanes * r.num_steps for r in done)


def _plan(problem: Problem, config: RaceConfig | BranchConfig) -> _Plan:
  num_steps, trunk, initial_alpha = problem.loop.num_steps, 0, 1.0
  if isinstance(config, BranchConfig):
    if not 0 < config.trunk_share < 1:
      raise UserError(
        f'trunk_share must be in (0, 1), got {config.trunk_share:g}.'
      )
    trunk = max(1, int(config.trunk_share * num_steps))
    initial_alpha = config.initial_alpha
  ladder = alpha_race.rungs(
    len(config.candidates), num_steps - trunk, config.final_share
  )
  return _Plan(config.candidates, ladder, trunk, initial_alpha)


def _race(
  problem: Problem,
  folder: RunFolder,
  plan: _Plan,
  kept: float,
  description: str,
) -> Trained:
  """A race, each stretch in a folder of its own within that of the run."""
  stored = run_folder.read_config(folder.path)
  looks: Records = []
  shared: Records = []

  def fit(
    state: Controlled, runs: Members, name: str, start: int, num_steps: int
  ) -> Controlled:
    part = RunFolder(
      folder.path / name,
      stored['config'],
      program=stored['program'],
      resume=True,
      is_part=True,
    )
    state, found = alpha_control.fit(
      problem,
      state,
      runs,
      part,
      num_steps=num_steps,
      horizon=plan.horizon,
      start=start,
      description=description and f'{description}, {name}',
    )
    looks.extend(found)
    return state

  def train_rung(
    state: Controlled, runs: Members, number: int, num_steps: int
  ) -> Controlled:
    start = plan.steps_before(number)
    state = fit(state, runs, f'rung_{number}', start, num_steps)
    for record in looks[-len(runs.key) :]:
      writer.write(plan.spent(number), record)
    return state

  def score(state: Controlled, runs: Members) -> tuple[np.ndarray, np.ndarray]:
    found = lanes.prune(
      problem.net,
      state.train,
      runs,
      problem.splits.validation,
      [masks_lib.density_to_sparsity(kept)],
      scope=SCOPE,
    )
    scores = np.array([record['accuracy'] for record in found])
    losses = np.array([record['loss'] for record in found])
    leaves = lanes.lost_leaves(runs, state.train).values()
    is_lost = [leaf is not None for leaf in leaves]
    return np.where(is_lost, np.nan, scores), losses

  powers = (plan.initial_alpha,) if plan.trunk else plan.candidates
  runs = lanes.product(powers, problem.keys)
  state = alpha_control.initial_state(problem, runs, plan.horizon)
  if plan.trunk:
    state = fit(state, runs, 'trunk', 0, plan.trunk)
    shared, looks = looks, []
    state, runs = alpha_control.branch(problem, state, runs, plan.candidates)
  # What is shown as progress counts the steps of all lanes.
  with metrics.MetricsWriter(folder.metrics_path) as writer:
    outcome = alpha_race.run(
      state, runs, plan.ladder, train=train_rung, score=score
    )
  won = set(zip(*(x.tolist() for x in outcome.lanes), strict=True))
  own = [r for r in looks if (r['start_alpha'], r['key']) in won]
  return Trained(
    outcome.state.train,
    outcome.lanes,
    shared + own,
    outcome.verdicts,
    problem.loop.num_steps,
    plan.horizon,
  )
