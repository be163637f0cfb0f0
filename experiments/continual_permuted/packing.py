"""PackNet and EfficientPackNet as ways to learn a stream."""

import dataclasses
import functools

import jax

from experiments.continual_permuted import methods, training
from experiments.continual_permuted.methods import Approach, Problem, Report
from experiments.continual_permuted.training import Program, TaskData
import powerprop_jax as pp
from powerprop_jax import continual
from powerprop_jax.continual import config as config_lib
from powerprop_jax.continual import state as pack_state
from powerprop_jax.continual.config import PackConfig
from powerprop_jax.continual.packnet import Learner
from powerprop_jax.continual.state import (
  Network,
  PackMethod,
  PackState,
  Private,
  TaskReport,
)
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row
from powerprop_jax.train import optimizers
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackingConfig(PackConfig):
  """How the tasks of a stream are packed into one network."""

  # Shares of all weights that EfficientPackNet tries for a task, in (0, 1].
  densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
  # Shares of the free weights that PackNet keeps, one for each task. Default:
  # as many weights for each.
  budgets: tuple[float, ...] = ()
  # Without budgets: part of all weights that PackNet's tasks get together, at
  # most 1. Late ones learn badly in a network of which little is free.
  share: float = 1.0
  # Whether to train the new weights of a task once more under its mask, as long
  # as the first time.
  retrain: bool = False
  # Biases: frozen after the first task, or stored for each.
  private: Private = 'freeze'


def make(
  method: PackMethod, problem: Problem, config: PackingConfig, alpha: float
) -> Approach:
  """An approach that packs tasks into one network; its state is a PackState."""
  stream, sizes = problem.stream, problem.sizes
  program = _program(problem.settings, alpha, sizes.num_steps)
  configs = _configs(method, config, len(stream))

  def init() -> PackState:
    state = continual.init_pack(
      program.tx,
      *methods.initial(program.net, problem),
      method,
      heads=methods.is_head if problem.is_multi_head else None,
      private=config.private,
    )
    config_lib.restart_rule(config, state)  # refuses what later tasks cannot do
    return state

  def learn(
    state: PackState, task: TaskData, report: Report
  ) -> tuple[PackState, Row]:
    def train(learner: Learner, task: TaskData) -> Learner:
      return training.fit(program, learner, task, sizes, problem.key, report)

    key = jax.random.fold_in(jax.random.key(problem.key), task.number)
    try:
      state, found = continual.learn(
        state,
        stream[task.number].id,
        task,
        train,
        lambda theta, net_state, task: program.accuracy(
          theta, net_state, task.validation
        ),
        configs[task.number],
        key,
        retrain=train if config.retrain else None,
      )
    except continual.CapacityError as error:
      raise training.StoppedError(str(error)) from error
    return state, _record(state, found)

  def params(state: PackState, number: int) -> Network | None:
    task_id = stream[number].id
    if task_id not in state.task_ids:
      return None
    return continual.task_params(state, task_id)

  return Approach(
    init,
    learn,
    params,
    program,
    epochs=problem.net.epochs * (1 + config.retrain),
    learns=range(len(stream)),
    to_arrays=continual.to_arrays,
    from_arrays=continual.from_arrays,
  )


def weights(state: PackState) -> Params:
  """All θ of a network, of some task or free, dense and on the host."""
  full = pp.masks.full_masks(state.phi)
  return jax.device_get(pack_state.masked_theta(state.phi, state.power, full))


@functools.lru_cache
def _program(settings: Problem, alpha: float, num_steps: int) -> Program:
  inner = optimizers.make_tx(settings.optimizer, alpha, num_steps)
  tx = pp.sparsify(inner, continual.protected())
  net = training.make_net(settings.num_classes, settings.net.hidden)
  return training.make_program(net, tx, settings.num_classes)


def _configs(
  method: PackMethod, config: PackingConfig, num_tasks: int
) -> list[PackingConfig]:
  """The settings for each task."""
  if config.budgets and len(config.budgets) != num_tasks:
    raise UserError(
      f'--packing.budgets needs one for each of the {num_tasks} tasks, got '
      f'{len(config.budgets)}. Leave it out for equal ones.'
    )
  if method == 'efficient_packnet':
    return [config] * num_tasks
  budgets = config.budgets or [
    continual.equal_density(i, num_tasks, config.share)
    for i in range(num_tasks)
  ]
  return [dataclasses.replace(config, densities=(b,)) for b in budgets]


def _record(state: PackState, found: TaskReport) -> Row:
  """How a task was packed, as a flat record; see continual.metrics.capacity."""
  leaves = trees.by_path(state.phi)
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
