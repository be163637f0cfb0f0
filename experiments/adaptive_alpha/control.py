"""Training networks whose power α may change between two dispatches.

α is an array in the state, so that all runs take the same step. A controller
acts at the end of every so many epochs, with the pure functions of
optim/alphas/alpha.py and views.with_alpha. The wrapper adaptive_alpha does the
same inside the optimiser; done here, the share of weights near zero can be read
right before and right after α changes. What it gains there, without any
training, is mechanical.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adaptive_alpha import evaluation
from experiments.adaptive_alpha.evaluation import Records
import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.train import ensemble, loop, optimizers
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.runs.contents import Networks
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.runs.writers import Writer
from powerprop_jax.train.step import TrainState

Hold = Literal['theta', 'phi']


class Problem(NamedTuple):
  """What is trained, whatever becomes of α.

  Attributes:
    net_name: the network, see nets.make.
    data: the data set.
    net: the network.
    splits: the data.
    optimizer: the optimiser; its schedule ends with the run.
    loop: lengths; a dispatch is an epoch, and evaluations follow whole ones.
    keys: seeds.
    epsilon: a weight with |θ| < epsilon is near zero.
    at_once: networks computed side by side; None is all of them.
  """

  net_name: str
  data: DataConfig
  net: hk.TransformedWithState
  splits: data.Splits
  optimizer: OptimizerConfig
  loop: LoopConfig
  keys: Sequence[int]
  epsilon: float
  at_once: int | None = 1


class Control(NamedTuple):
  """What changes α, and when.

  Attributes:
    controller: the rule.
    period: steps between two control points, a multiple of those of an epoch.
    warm_up: steps before the first of these periods, likewise.
    hold: what stays when α changes, see views.with_alpha.
    per_leaf: whether each selected leaf has an α of its own.
  """

  controller: pp.AlphaController
  period: int
  warm_up: int = 0
  hold: Hold = 'theta'
  per_leaf: bool = False


class Controlled(NamedTuple):
  """The state of a run whose α may change.

  Attributes:
    train: what is trained.
    memory: state of the controller; () where there is none.
    jump: what the changes of α by themselves added to the share of weights
      near zero, up to now, float32 scalar.
  """

  train: TrainState
  memory: Tree
  jump: jax.Array


def networks(problem: Problem, members: Members, num_steps: int) -> Networks:
  """What to say of those that a folder holds after a stretch."""
  alphas, keys = (tuple(each.tolist()) for each in members)
  return Networks(
    problem.net_name, problem.data, num_steps, alphas, keys, are_paired=True
  )


def check_start(problem: Problem, control: Control, alpha: float) -> None:
  """Refuses an α from which a controller cannot start, with its ValueError."""
  start = _by_leaf(problem, alpha) if control.per_leaf else jnp.float32(alpha)
  control.controller.init(start)


def initial_state(
  problem: Problem,
  members: Members,
  horizon: int,
  control: Control | None = None,
) -> Controlled:
  """Stacked states before the first step, for a run of horizon steps.

  Raises:
    ValueError: if powerprop refuses an α. For a controller see check_start:
      here it sees traced values.
  """
  make_tx = _tx_maker(problem, horizon, control)
  images = problem.splits.example
  train = ensemble.create(problem.net, make_tx, members, images)
  memory: Tree = ()
  if control is not None:
    memory = jax.vmap(control.controller.init)(
      evaluation.power_of(train.opt_state)
    )
    # No array may be there twice, or it could not be donated.
    memory = jax.tree.map(lambda x: jnp.array(x, copy=True), memory)
  return Controlled(train, memory, jnp.zeros(len(members.key), jnp.float32))


def fit(
  problem: Problem,
  state: Controlled,
  members: Members,
  folder: RunFolder,
  *,
  num_steps: int,
  horizon: int,
  start: int = 0,
  control: Control | None = None,
  description: str = '',
  writers: Sequence[Writer] = (),
) -> tuple[Controlled, Records]:
  """Trains for a stretch, or goes on where the folder stopped.

  Args:
    state: stacked states; they are donated.
    num_steps: length of the stretch.
    horizon: steps of the whole run, for the schedule. There is no control point
      after the last of them: nothing would be trained with its α.
    start: steps before this stretch.
    description: what is being trained, for the progress; '' for no progress.
    writers: see loop.fit.

  Returns:
    The stacked states at the end, and evaluation.records with step; with
    start = 0 there is one before the first step.
  """
  evaluate = ensemble.mapped(_make_evaluate(problem), problem.at_once)
  advance = _make_advance(problem, horizon, control)
  records = functools.partial(evaluation.records, members)
  before: Records = []
  if not start:
    found = jax.jit(evaluate)(state, problem.splits.validation)
    before = [{'step': 0, **record} for record in records({}, found)]
  state = loop.fit(
    state,
    ensemble.mapped(advance, problem.at_once),
    evaluate,
    problem.splits,
    dataclasses.replace(problem.loop, num_steps=num_steps),
    folder,
    indices=lambda first, *rest: ensemble.batch_indices(
      members, start + first, *rest
    ),
    records=records,
    description=description,
    writers=writers,
  )
  logged = metrics.read_metrics(folder.metrics_path)
  return state, before + [{**r, 'step': start + r['step']} for r in logged]


def change_alpha(
  state: Controlled, control: Control, epsilon: float
) -> Controlled:
  """A control point of one network: asks for a new α.

  What that adds to the share of weights within epsilon of zero is added to
  jump; nothing once weights are not finite.
  """
  train = state.train
  alpha, memory = control.controller.update(
    train.theta,
    pp.current_masks(train.phi, train.opt_state),
    evaluation.power_of(train.opt_state),
    state.memory,
  )
  state = state._replace(memory=memory)
  return _with_alpha(state, alpha, control.hold, epsilon)


def branch(
  problem: Problem,
  state: Controlled,
  members: Members,
  candidates: Sequence[float],
) -> tuple[Controlled, Members]:
  """Copies of every network that go on with other powers, and the same φ.

  Returns:
    The stacked states of the branches, key by key within each power, which have
    no controller; and what they are, with the power of each as its α.
  """
  size = len(members.key)
  alpha = np.repeat(np.asarray(candidates, np.float64), size)
  places = np.tile(np.arange(size), len(candidates))
  copies = jax.tree.map(lambda x: x[places], state)
  change = jax.vmap(lambda s, a: _with_alpha(s, a, 'phi', problem.epsilon))
  branches = jax.jit(change)(copies, jnp.asarray(alpha, jnp.float32))
  return branches, Members(alpha, members.key[places])


def _with_alpha(
  state: Controlled, alpha: Tree, hold: Hold, epsilon: float
) -> Controlled:
  """The state with another α, and the jump of the near-zero mass added up."""
  train = state.train
  phi, opt_state = pp.with_alpha(train.phi, train.opt_state, alpha, hold=hold)
  changed = train._replace(phi=phi, opt_state=opt_state)
  before, after = (
    evaluation.share_near_zero(t.theta, epsilon) for t in (train, changed)
  )
  jump = jnp.where(jnp.isfinite(after - before), after - before, 0)
  return state._replace(train=changed, jump=state.jump + jump)


def _tx_maker(
  problem: Problem, horizon: int, control: Control | None
) -> Callable[[Any], optax.GradientTransformation]:
  """From a scalar α to the gradient transformation that every run has."""

  def make_tx(alpha: Any) -> optax.GradientTransformation:
    if control is not None and control.per_leaf:
      alpha = _by_leaf(problem, alpha)
    return optimizers.make_tx(problem.optimizer, alpha, horizon)

  return make_tx


def _by_leaf(problem: Problem, alpha: Any) -> Tree:
  """A tree of the selected leaves that has the same α for each."""
  theta = step_lib.shapes(problem.net, problem.splits.example)
  tree: dict[str, Row] = {}
  for leaf in trees.named_leaves(theta):
    if pp.is_weight(*leaf):
      tree.setdefault(leaf.module_name, {})[leaf.name] = jnp.float32(alpha)
  return tree


def _make_evaluate(problem: Problem) -> Callable[[Controlled, Arrays], Row]:
  score = evaluate_lib.on_state(problem.net)

  def evaluate(state: Controlled, arrays: Arrays) -> Row:
    train = state.train
    return {
      'scores': score(train, arrays),
      'near_zero': evaluation.share_near_zero(train.theta, problem.epsilon),
      'jump': state.jump,
      'power': evaluation.power_of(train.opt_state),
    }

  return evaluate


def _make_advance(
  problem: Problem, horizon: int, control: Control | None
) -> Callable[[Controlled, Arrays, jax.Array], tuple[Controlled, Row]]:
  # The update reads α from the state, so any α builds the same step.
  make_tx = _tx_maker(problem, horizon, control)
  train_steps = step_lib.make_advance(problem.net, make_tx(jnp.float32(2)))

  def advance(
    state: Controlled, arrays: Arrays, indices: jax.Array
  ) -> tuple[Controlled, Row]:
    train, found = train_steps(state.train, arrays, indices)
    state = state._replace(train=train)
    if control is None:
      return state, found
    since = train.step - control.warm_up
    is_due = (since > 0) & (since % control.period == 0)
    state = jax.lax.cond(
      is_due & (train.step < horizon),
      lambda s: change_alpha(s, control, problem.epsilon),
      lambda s: s,
      state,
    )
    return state, found

  return advance
