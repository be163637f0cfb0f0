"""Ways to learn a stream of tasks, in one form.

An Approach starts a state, learns a task with it, and says which weights to use
for a task. PackNet and EfficientPackNet are in packing.py, what they are
compared with in baselines.py.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from experiments.continual_permuted import training
from experiments.continual_permuted.training import Lengths, Program, TaskData
from powerprop_jax.continual import storage
from powerprop_jax.continual.state import Network
from powerprop_jax.continual.storage import Arrays
from powerprop_jax.continual.task_streams import Task
from powerprop_jax.files.tables import Row
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.errors import UserError

MethodName = Literal[
  'efficient_packnet', 'packnet', 'fine_tuning', 'ewc', 'separate', 'joint'
]
NAMES: tuple[MethodName, ...] = get_args(MethodName)
# Those that pack tasks into one network by masks, and take an α.
SPARSE: tuple[MethodName, ...] = ('efficient_packnet', 'packnet')

Report = Callable[[float], None]
# Module of the head in the network of training.make_net.
_HEAD = 'logits'


@dataclasses.dataclass(frozen=True)
class EwcConfig:
  """Elastic weight consolidation."""

  # λ, weight of the penalty; see optim/ewc.py.
  strength: float = 100.0
  # Training examples for the Fisher information of a task, at most.
  num_examples: int = 1_000


@dataclasses.dataclass(frozen=True)
class NetConfig:
  """The network and how long it is trained."""

  # Units of each hidden layer.
  hidden: tuple[int, ...] = (2000, 2000)
  # Passes over the training examples of a task; over those of the largest one,
  # where tasks differ in size, since all take the same number of steps.
  epochs: int = 5
  # Examples in a batch.
  batch_size: int = 100


class Problem(NamedTuple):
  """What all methods have in common.

  Attributes:
    stream: the tasks.
    num_classes: outputs of a head.
    is_multi_head: whether each task has a head of its own.
    key: seed of the initial weights and of the order of the data.
    net: the network and how long it is trained.
    optimizer: how.
    ewc: settings of 'ewc'.
  """

  stream: Sequence[Task]
  num_classes: int
  is_multi_head: bool
  key: int
  net: NetConfig
  optimizer: OptimizerConfig
  ewc: EwcConfig

  @property
  def settings(self) -> 'Problem':
    """What a compiled program depends on: all but the data and the key."""
    return self._replace(stream=(), key=0)

  @property
  def sizes(self) -> Lengths:
    """Common sizes of the tasks."""
    return training.lengths(self.stream, self.net.batch_size, self.net.epochs)


class Approach(NamedTuple):
  """A way to learn a stream.

  Attributes:
    init: () -> state.
    learn: (state, task, report) -> (state, record); report is called with the
      mean loss of each epoch. The record has the validation accuracy and what
      else there is to say about the task. A training.StoppedError ends it.
    params: (state, number) -> what the network computes a task with, or None if
      there is nothing: it was not learned yet, or is of another network.
    program: what scores them.
    epochs: how often learn calls report.
    learns: numbers of the tasks at which learn is called.
    labels_apart: what to add to labels for each task before.
    to_arrays: state -> arrays on the host, by name.
    from_arrays: (arrays, a state of init) -> state, its inverse.
  """

  init: Callable[[], Any]
  learn: Callable[[Any, TaskData, Report], tuple[Any, Row]]
  params: Callable[[Any, int], Network | None]
  program: Program
  epochs: int
  learns: Sequence[int]
  labels_apart: int = 0
  to_arrays: Callable[[Any], dict[str, np.ndarray]] = storage.by_name
  from_arrays: Callable[[Arrays, Any], Any] = storage.restored


def check(problem: Problem) -> None:
  """Refuses settings that no method can use; the UserError names one."""
  config = problem.net
  for name, value in (
    ('net.epochs', config.epochs),
    ('net.batch-size', config.batch_size),
    ('ewc.num-examples', problem.ewc.num_examples),
    *(('net.hidden', width) for width in config.hidden),
  ):
    if value < 1:
      raise UserError(f'--{name} must be at least 1, got {value}.')
  if not 0 <= problem.ewc.strength < float('inf'):
    raise UserError(
      '--ewc.strength must be at least 0 and finite, got '
      f'{problem.ewc.strength:g}.'
    )


def initial(
  net: hk.TransformedWithState, problem: Problem, number: int = 0
) -> Network:
  """An untrained network; number tells apart where there are several."""
  key = jax.random.key(problem.key)
  if number:
    key = jax.random.fold_in(key, number)
  images = jnp.zeros((1, *problem.stream[0].shape), jnp.float32)
  return net.init(key, images, is_training=True)


def is_head(module_name: str, name: str, value: Any) -> bool:
  """Selects the leaves of the head of training.make_net."""
  del name, value
  return module_name.rpartition('/')[2] == _HEAD
