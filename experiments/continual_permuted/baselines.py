"""What packing tasks into one network is compared with.

Fine-tuning on one task after another, elastic weight consolidation, a network
for each task, and one for all tasks at once. All are dense and train θ itself,
without powerprop.
"""

from collections.abc import Callable
import functools
from typing import Any

import haiku as hk
import jax
import numpy as np
import optax

from experiments.continual_permuted import methods, training
from experiments.continual_permuted.methods import (
  Method,
  Name,
  Problem,
  Report,
  initial,
)
from experiments.continual_permuted.training import Program, TaskData
from powerprop_jax.continual.packnet import Learner
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import ewc, views
from powerprop_jax.train import optimizers
from powerprop_jax.train.data import splits
from powerprop_jax.train.optimizers import OptimizerConfig


def make(name: Name, problem: Problem) -> Method:
  """One of the baselines.

  Args:
    name: 'fine_tuning', 'ewc', 'separate' or 'joint'.
    problem: the stream and the settings.

  Returns:
    The method.
  """
  if name == 'joint':
    return _joint(problem)
  if name == 'separate':
    return _separate(problem)
  return _sequential(problem, is_ewc=name == 'ewc')


def _sequential(problem: Problem, is_ewc: bool) -> Method:
  """Fine-tuning, and EWC, which is fine-tuning with a penalty."""
  sizes = problem.sizes
  strength = problem.ewc.strength if is_ewc else None
  program = dense_program(problem, sizes.num_steps, strength)

  def init() -> Tree:
    theta, net_state = initial(program.net, problem)
    return {'theta': theta, 'net_state': net_state, 'heads': {}, 'penalty': {}}

  def learn(state: Tree, task: TaskData, report: Report) -> tuple[Tree, Row]:
    theta = state['theta']
    if problem.is_multi_head:
      fresh, _ = initial(program.net, problem)
      theta = {**theta, **_head(fresh)}
    phi, opt_state = views.init(program.tx, theta)
    if state['penalty']:
      old = ewc.EwcState(**state['penalty'])
      opt_state = ewc.with_penalty(opt_state, old)
    learner = Learner(phi, state['net_state'], opt_state)
    learner = training.fit(program, learner, task, sizes, problem.key, report)
    theta, net_state = learner.phi, learner.net_state
    new = {**state, 'theta': theta, 'net_state': net_state}
    if problem.is_multi_head:
      new['heads'] = {**state['heads'], str(task.number): _head(theta)}
    if is_ewc:
      found = _fisher(program, problem, theta, net_state, task)
      opt_state = ewc.consolidated(learner.opt_state, found, theta)
      new['penalty'] = ewc.penalty(opt_state)._asdict()
    return new, _validation(program, theta, net_state, task)

  def params(state: Tree, number: int) -> tuple[Any, Any] | None:
    if not problem.is_multi_head:
      return state['theta'], state.get('net_state', {})
    head = state['heads'].get(str(number))
    if head is None:
      return None
    return {**state['theta'], **head}, state['net_state']

  return Method(
    init,
    learn,
    params,
    program,
    epochs=problem.net.epochs,
    labels_apart=0,
    learns=range(len(problem.stream)),
  )


def _separate(problem: Problem) -> Method:
  """A network for each task; only the latest is kept."""
  sizes = problem.sizes
  program = dense_program(problem, sizes.num_steps)

  def learn(state: Tree, task: TaskData, report: Report) -> tuple[Tree, Row]:
    del state
    theta, net_state = initial(program.net, problem, task.number)
    learner = Learner(theta, net_state, program.tx.init(theta))
    learner = training.fit(program, learner, task, sizes, problem.key, report)
    found = _validation(program, learner.phi, learner.net_state, task)
    return _latest(learner, task), found

  return Method(
    dict,
    learn,
    _params_of_latest,
    program,
    epochs=problem.net.epochs,
    labels_apart=0,
    learns=range(len(problem.stream)),
  )


def _latest(learner: Learner, task: TaskData) -> Tree:
  return {
    'theta': learner.phi,
    'net_state': learner.net_state,
    'number': np.int64(task.number),
  }


def _params_of_latest(state: Tree, number: int) -> tuple[Any, Any] | None:
  if state.get('number') != number:
    return None
  return state['theta'], state['net_state']


def _joint(problem: Problem) -> Method:
  """All tasks at once, when the last one comes; as many steps as the others."""
  num_tasks = len(problem.stream)
  apart = problem.num_classes if problem.is_multi_head else 0
  sizes = problem.sizes
  num_train = sum(task.size('train') for task in problem.stream)
  epoch = -(-num_train // problem.net.batch_size)
  sizes = sizes._replace(num_train=num_train, epoch=epoch)
  program = dense_program(
    problem, sizes.num_steps, num_heads=num_tasks if apart else 1
  )

  def learn(state: Tree, task: TaskData, report: Report) -> tuple[Tree, Row]:
    del state
    everything = training.union(problem.stream, apart)
    task = task._replace(
      train=jax.device_put(everything),
      num_train=num_train,
    )
    theta, net_state = initial(program.net, problem)
    learner = Learner(theta, net_state, program.tx.init(theta))
    learner = training.fit(program, learner, task, sizes, problem.key, report)
    return _latest(learner, task), {}

  def params(state: Tree, number: int) -> tuple[Any, Any] | None:
    del number
    return (state['theta'], state['net_state']) if state else None

  return Method(
    dict,
    learn,
    params,
    program,
    epochs=problem.net.epochs,
    labels_apart=apart,
    learns=[num_tasks - 1],
  )


def dense_program(
  problem: Problem,
  num_steps: int,
  strength: float | None = None,
  num_heads: int = 1,
) -> Program:
  """The program of a network that trains θ itself.

  Args:
    problem: the settings.
    num_steps: training steps for each task, for the schedule.
    strength: λ of a penalty on moving; None for no penalty.
    num_heads: heads of the network, side by side.

  Returns:
    The program; the same for the same settings, so that it is compiled once.
  """
  return _dense_program(
    problem.net.hidden,
    problem.num_classes,
    num_heads,
    problem.optimizer,
    num_steps,
    strength,
  )


@functools.lru_cache
def _dense_program(
  hidden: tuple[int, ...],
  num_classes: int,
  num_heads: int,
  optimizer: OptimizerConfig,
  num_steps: int,
  strength: float | None,
) -> Program:
  net = training.make_net(num_classes * num_heads, hidden)
  tx: optax.GradientTransformation = optimizers.make_tx(
    optimizer, 1.0, num_steps
  )
  if strength is not None:
    # With α = 1 the parameters are θ outside powerprop too.
    tx = optax.chain(ewc.ewc(strength), tx)
  return training.make_program(net, tx, num_classes)


def _head(theta: Params) -> Tree:
  """Modules of the head."""
  return {
    name: leaves
    for name, leaves in theta.items()
    if methods.is_head(name, '', 0)
  }


def _fisher(
  program: Program,
  problem: Problem,
  theta: Params,
  net_state: Tree,
  task: TaskData,
) -> Any:
  """Fisher information of a task; zero for a head that is the task's own."""
  num = min(problem.ewc.num_examples, task.num_train)
  num -= num % _FISHER_BATCH if num > _FISHER_BATCH else num - 1
  images = task.train.images[:num]
  key = jax.random.fold_in(jax.random.key(problem.key), task.number)
  found = _fisher_program(program.net)(theta, net_state, images, key)
  if problem.is_multi_head:
    found = {**found, **optax.tree.zeros_like(_head(found))}
  return found


_FISHER_BATCH = 10


@functools.lru_cache
def _fisher_program(net: hk.TransformedWithState) -> Callable[..., Any]:
  @jax.jit
  def fisher(
    theta: Params, net_state: Tree, images: Any, key: jax.Array
  ) -> Any:
    def logits_fn(theta: Params, images: jax.Array) -> jax.Array:
      return net.apply(theta, net_state, None, images, is_training=False)[0]

    batch = min(_FISHER_BATCH, len(images))
    images = splits.to_float(images)
    return ewc.fisher(logits_fn, theta, images, key, batch_size=batch)

  return fisher


def _validation(
  program: Program, theta: Params, net_state: Tree, task: TaskData
) -> Row:
  accuracy = program.accuracy(theta, net_state, task.validation)
  return {'validation_accuracy': accuracy}
