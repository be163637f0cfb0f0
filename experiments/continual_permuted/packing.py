"""PackNet and EfficientPackNet as methods of continual_methods."""

import dataclasses
import functools
from typing import Any

import jax

from experiments.continual_permuted import methods, training
from experiments.continual_permuted.methods import Method, Problem, Report
from experiments.continual_permuted.training import Program, TaskData
from powerprop_jax import continual as continual_lib
from powerprop_jax.continual import config as config_lib
from powerprop_jax.continual import state as pack_state
from powerprop_jax.continual.config import PackConfig, Restart, Scope
from powerprop_jax.continual.packnet import Learner
from powerprop_jax.continual.search import How
from powerprop_jax.continual.state import PackState, Private, TaskReport
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import sparsify
from powerprop_jax.optim.topologies import protected
from powerprop_jax.train import optimizers
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackingConfig:
  """How tasks are packed into one network."""

  # Share of the dense validation accuracy that a mask must reach, in (0, 1].
  gamma: float = 0.99
  # Shares of all weights that EfficientPackNet tries for a task, in (0, 1].
  densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
  # Shares of the free weights that PackNet keeps, one for each task. Default:
  # as many weights for each.
  budgets: tuple[float, ...] = ()
  # Without budgets: part of all weights that PackNet's tasks get together, in
  # (0, 1]. Late ones learn badly in a network of which little is free.
  share: float = 1.0
  # Densities from dense to sparse ('scan'), or by halving the grid ('bisect').
  search: How = 'scan'
  # Rank the weights of each layer by themselves, or of all together.
  scope: Scope = 'layer'
  # Whether to train the new weights of a task once more under its mask, as long
  # as the first time.
  retrain: bool = False
  # Free weights at the start of a task: 'redraw', 'zero' or 'keep'. Default:
  # 'zero' for PackNet with α = 1, otherwise 'redraw'.
  restart: Restart | None = None
  # Biases: frozen after the first task, or stored for each.
  private: Private = 'freeze'
  # A task needs so many free weights to begin.
  min_free: int = 1


def make(
  name: config_lib.Method, problem: Problem, config: PackingConfig, alpha: float
) -> Method:
  """A method that packs tasks into one network by masks.

  Args:
    name: 'packnet' or 'efficient_packnet'.
    problem: the stream and the settings.
    config: how tasks are packed.
    alpha: the power.

  Returns:
    The method; its state is a PackState.

  Raises:
    UserError: if there are budgets, but not one for each task.
    ValueError: if a setting is out of its range.
  """
  stream, sizes = problem.stream, problem.sizes
  if config.budgets and len(config.budgets) != len(stream):
    raise UserError(
      f'--packing.budgets needs one for each of the {len(stream)} tasks, got '
      f'{len(config.budgets)}. Leave it away for equal ones.'
    )
  program = _program(
    problem.net.hidden,
    problem.num_classes,
    problem.optimizer,
    alpha,
    sizes.num_steps,
  )
  configs = [_pack_config(name, problem, config, i) for i in range(len(stream))]

  def init() -> PackState:
    theta, net_state = methods.initial(program.net, problem)
    return continual_lib.init_pack(program.tx, theta, net_state, configs[0])

  def learn(
    state: PackState, task: TaskData, report: Report
  ) -> tuple[PackState, Row]:
    def train(learner: Learner, task: TaskData) -> Learner:
      return training.fit(program, learner, task, sizes, problem.key, report)

    task_id = stream[task.number].id
    key = jax.random.fold_in(jax.random.key(problem.key), task.number)
    try:
      state, found = continual_lib.learn(
        state,
        task_id,
        task,
        train,
        lambda theta, net_state, task: program.accuracy(
          theta, net_state, task.validation
        ),
        configs[task.number],
        key,
        retrain=train if config.retrain else None,
      )
    except continual_lib.CapacityError as error:
      raise training.StoppedError(str(error)) from error
    return state, _record(state, found)

  def params(state: PackState, number: int) -> tuple[Any, Any] | None:
    task_id = stream[number].id
    if task_id not in state.task_ids:
      return None
    return continual_lib.task_params(state, task_id)

  return Method(
    init,
    learn,
    params,
    program,
    epochs=problem.net.epochs * (1 + config.retrain),
    labels_apart=0,
    learns=range(len(stream)),
    to_arrays=continual_lib.to_arrays,
    from_arrays=lambda arrays: continual_lib.from_arrays(arrays, init()),
  )


def weights(state: PackState) -> Params:
  """All effective weights of a network with its tasks, on the host.

  Args:
    state: as from the method.

  Returns:
    θ, dense: what is used by some task, and what is free.
  """
  full = masks_lib.full_masks(state.phi)
  return jax.device_get(pack_state.masked_theta(state.phi, state.power, full))


@functools.lru_cache
def _program(
  hidden: tuple[int, ...],
  num_classes: int,
  optimizer: OptimizerConfig,
  alpha: float,
  num_steps: int,
) -> Program:
  inner = optimizers.make_tx(optimizer, alpha, num_steps)
  tx = sparsify.sparsify(inner, protected.protected())
  net = training.make_net(num_classes, hidden)
  return training.make_program(net, tx, num_classes)


def _pack_config(
  name: config_lib.Method, problem: Problem, config: PackingConfig, number: int
) -> PackConfig:
  """The settings for a task."""
  densities = config.densities
  if name == 'packnet':
    budgets = config.budgets or [
      continual_lib.equal_density(i, len(problem.stream), config.share)
      for i in range(len(problem.stream))
    ]
    densities = (budgets[number],)
  return PackConfig(
    method=name,
    densities=densities,
    gamma=config.gamma,
    search=config.search,
    scope=config.scope,
    restart=config.restart,
    heads=methods.is_head if problem.is_multi_head else None,
    private=config.private,
    min_free=config.min_free,
  )


def _record(state: PackState, found: TaskReport) -> Row:
  """How a task was packed, as a flat record; see continual.metrics.capacity."""
  leaves = pack_state.leaves_by_path(state.phi)
  dim = sum(leaves[path].size for path in state.layout.shared)
  shared = found.num_kept - found.num_new
  return {
    'validation_accuracy': found.score,
    'dense_accuracy': found.dense_score,
    'grid_density': found.density,
    'met': found.met,
    'evaluations': len(found.trials),
    'density': found.num_kept / dim,
    'new': found.num_new / dim,
    'overlap': shared / found.num_kept if found.num_kept else float('nan'),
    'capacity_used': 1 - found.num_free / dim,
  }
