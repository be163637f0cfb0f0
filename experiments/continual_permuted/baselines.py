"""What packing tasks into one network is compared with.

Fine-tuning on one task after another, elastic weight consolidation, a network
for each task, and one for all tasks at once. All are dense and train θ itself,
without powerprop.
"""

from collections.abc import Callable
import functools
from typing import Literal, NamedTuple

import haiku as hk
import jax
import numpy as np
import optax

from experiments.continual_permuted import methods, training
from experiments.continual_permuted.methods import (
  Approach,
  Problem,
  Report,
  initial,
)
from experiments.continual_permuted.training import Program, TaskData
import powerprop_jax as pp
from powerprop_jax.continual.packnet import Learner
from powerprop_jax.continual.state import Network
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import ewc
from powerprop_jax.optim.ewc import EwcState
from powerprop_jax.train import optimizers
from powerprop_jax.train.data import splits


class DenseState(NamedTuple):
  """What a baseline remembers.

  Attributes:
    theta: weights of the network trained last.
    net_state: its state.
    heads: {number of a task: leaves of its head} if each task has one.
    penalty: what EWC holds on to; () for the others.
    latest: number of the task learned last, -1 before any.
  """

  theta: Params
  net_state: Tree
  heads: dict[str, Params]
  penalty: EwcState | tuple[()]
  latest: np.int64


def make(
  name: Literal['fine_tuning', 'ewc', 'separate', 'joint'], problem: Problem
) -> Approach:
  """One of the baselines; its state is a DenseState."""
  if name == 'joint':
    return _joint(problem)
  if name == 'separate':
    return _separate(problem)
  return _sequential(problem, is_ewc=name == 'ewc')


def _sequential(problem: Problem, is_ewc: bool) -> Approach:
  """Fine-tuning, and EWC, which is fine-tuning with a penalty."""
  num_steps = problem.sizes.num_steps
  program = _program(problem.settings, num_steps, is_ewc=is_ewc)

  def init() -> DenseState:
    state = _untrained(program, problem)
    if problem.is_multi_head:
      numbers = map(str, range(len(problem.stream)))
      head = _head(state.theta)
      state = state._replace(heads=dict.fromkeys(numbers, head))
    if is_ewc:
      opt_state = program.tx.init(state.theta)
      state = state._replace(penalty=ewc.penalty(opt_state))
    return state

  def learn(
    state: DenseState, task: TaskData, report: Report
  ) -> tuple[DenseState, Row]:
    number = str(task.number)
    theta = {**state.theta, **state.heads.get(number, {})}
    phi, opt_state = pp.init(program.tx, theta)
    if isinstance(state.penalty, EwcState):
      opt_state = ewc.with_penalty(opt_state, state.penalty)
    learner = Learner(phi, state.net_state, opt_state)
    learner = training.fit(
      program, learner, task, problem.sizes, problem.key, report
    )
    heads, penalty = state.heads, state.penalty
    if problem.is_multi_head:
      heads = {**heads, number: _head(learner.phi)}
    if is_ewc:
      found = _fisher(program, problem, learner, task)
      opt_state = ewc.consolidated(learner.opt_state, found, learner.phi)
      penalty = ewc.penalty(opt_state)
    state = _latest(learner, task)._replace(heads=heads, penalty=penalty)
    return state, _validation(program, learner, task)

  def params(state: DenseState, number: int) -> Network | None:
    head = state.heads.get(str(number), {})
    if head and number > state.latest:
      return None
    return {**state.theta, **head}, state.net_state

  tasks = range(len(problem.stream))
  return Approach(init, learn, params, program, problem.net.epochs, tasks)


def _separate(problem: Problem) -> Approach:
  """A network for each task; only the latest is kept."""
  program = _program(problem.settings, problem.sizes.num_steps)

  def learn(
    state: DenseState, task: TaskData, report: Report
  ) -> tuple[DenseState, Row]:
    del state
    theta, net_state = initial(program.net, problem, task.number)
    learner = Learner(theta, net_state, program.tx.init(theta))
    learner = training.fit(
      program, learner, task, problem.sizes, problem.key, report
    )
    return _latest(learner, task), _validation(program, learner, task)

  def params(state: DenseState, number: int) -> Network | None:
    if state.latest != number:
      return None
    return state.theta, state.net_state

  init = functools.partial(_untrained, program, problem)
  tasks = range(len(problem.stream))
  return Approach(init, learn, params, program, problem.net.epochs, tasks)


def _joint(problem: Problem) -> Approach:
  """All tasks at once, when the last one comes; as many steps as the others."""
  num_tasks = len(problem.stream)
  apart = problem.num_classes if problem.is_multi_head else 0
  num_train = sum(task.size('train') for task in problem.stream)
  epoch = -(-num_train // problem.net.batch_size)
  sizes = problem.sizes._replace(num_train=num_train, epoch=epoch)
  num_heads = num_tasks if apart else 1
  program = _program(problem.settings, sizes.num_steps, num_heads)

  def learn(
    state: DenseState, task: TaskData, report: Report
  ) -> tuple[DenseState, Row]:
    everything = jax.device_put(training.union(problem.stream, apart))
    task = task._replace(train=everything, num_train=num_train)
    learner = Learner(
      state.theta, state.net_state, program.tx.init(state.theta)
    )
    learner = training.fit(program, learner, task, sizes, problem.key, report)
    return _latest(learner, task), {}

  def params(state: DenseState, number: int) -> Network | None:
    del number
    return None if state.latest < 0 else (state.theta, state.net_state)

  init = functools.partial(_untrained, program, problem)
  last, epochs = [num_tasks - 1], problem.net.epochs
  return Approach(init, learn, params, program, epochs, last, apart)


def _untrained(program: Program, problem: Problem) -> DenseState:
  theta, net_state = initial(program.net, problem)
  return DenseState(theta, net_state, {}, (), np.int64(-1))


def _latest(learner: Learner, task: TaskData) -> DenseState:
  number = np.int64(task.number)
  return DenseState(learner.phi, learner.net_state, {}, (), number)


@functools.lru_cache
def _program(
  settings: Problem, num_steps: int, num_heads: int = 1, is_ewc: bool = False
) -> Program:
  """A network that trains θ itself, with its heads side by side."""
  tx: optax.GradientTransformation = optimizers.make_tx(
    settings.optimizer, 1.0, num_steps
  )
  if is_ewc:
    # With α = 1 the parameters are θ outside powerprop too.
    tx = optax.chain(ewc.ewc(settings.ewc.strength), tx)
  num_outputs = settings.num_classes * num_heads
  net = training.make_net(num_outputs, settings.net.hidden)
  return training.make_program(net, tx, settings.num_classes)


def _head(theta: Params) -> Params:
  """Modules of the head."""
  return {
    name: leaves
    for name, leaves in theta.items()
    if methods.is_head(name, '', 0)
  }


def _fisher(
  program: Program, problem: Problem, learner: Learner, task: TaskData
) -> Params:
  """Fisher information of a task; zero for a head that is the task's own."""
  num = min(problem.ewc.num_examples, task.num_train)
  num -= num % _FISHER_BATCH if num > _FISHER_BATCH else num - 1
  images = task.train.images[:num]
  key = jax.random.fold_in(jax.random.key(problem.key), task.number)
  fisher = _fisher_program(program.net)
  found = fisher(learner.phi, learner.net_state, images, key)
  if problem.is_multi_head:
    found = {**found, **optax.tree.zeros_like(_head(found))}
  return found


_FISHER_BATCH = 10


@functools.lru_cache
def _fisher_program(net: hk.TransformedWithState) -> Callable[..., Params]:
  @jax.jit
  def fisher(
    theta: Params, net_state: Tree, images: jax.Array, key: jax.Array
  ) -> Params:
    def logits_fn(theta: Params, images: jax.Array) -> jax.Array:
      return net.apply(theta, net_state, None, images, is_training=False)[0]

    batch = min(_FISHER_BATCH, len(images))
    images = splits.to_float(images)
    return ewc.fisher(logits_fn, theta, images, key, batch_size=batch)

  return fisher


def _validation(program: Program, learner: Learner, task: TaskData) -> Row:
  accuracy = program.accuracy(learner.phi, learner.net_state, task.validation)
  return {'validation_accuracy': accuracy}
