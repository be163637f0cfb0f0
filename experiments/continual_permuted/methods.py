"""Ways to learn a stream of tasks, in one form.

A Method starts a state, learns a task with it, and says which weights to use
for a task. PackNet and EfficientPackNet are in continual_packing.py, what they
are compared with in continual_baselines.py.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp

from experiments.continual_permuted import training
from experiments.continual_permuted.training import Lengths, Program, TaskData
from powerprop_jax.continual.task_streams import Task
from powerprop_jax.files.tables import Row
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.errors import UserError

Name = Literal[
  'efficient_packnet', 'packnet', 'fine_tuning', 'ewc', 'separate', 'joint'
]
NAMES: tuple[Name, ...] = get_args(Name)
# Those that pack tasks into one network by masks, and take an α.
SPARSE: tuple[Name, ...] = ('efficient_packnet', 'packnet')

Tree = Row
Report = Callable[[float], None]
# Module of the head in the network of continual.make_net.
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
  def sizes(self) -> Lengths:
    """Common sizes of the tasks."""
    return training.lengths(self.stream, self.net.batch_size, self.net.epochs)


class Method(NamedTuple):
  """A way to learn a stream.

  Attributes:
    init: () -> state, a tree of arrays in nested dicts.
    learn: (state, task, report) -> (state, record); report is called with the
      mean loss of each epoch. The record has the validation accuracy and what
      else there is to say about the task. A continual.StoppedError ends it.
    params: (state, number) -> (theta, net_state) for a task, or None if there
      are none: it was not learned yet, or is of another network.
    program: what scores them.
    epochs: how often learn calls report.
    labels_apart: what to add to labels for each task before.
    learns: numbers of the tasks at which learn is called.
    to_arrays: state -> nested dicts of arrays on the host.
    from_arrays: its inverse.
  """

  init: Callable[[], Any]
  learn: Callable[[Any, TaskData, Report], tuple[Any, Row]]
  params: Callable[[Any, int], tuple[Any, Any] | None]
  program: Program
  epochs: int
  labels_apart: int
  learns: Sequence[int]
  to_arrays: Callable[[Any], Tree] = jax.device_get
  from_arrays: Callable[[Tree], Any] = lambda arrays: arrays


def check(problem: Problem) -> None:
  """Refuses settings that no method can use.

  Args:
    problem: the settings.

  Raises:
    UserError: naming the setting.
    ValueError: if the stream is unsound.
  """
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
) -> tuple[Any, Any]:
  """Weights and state of an untrained network.

  Args:
    net: the network.
    problem: the key and, for its shape, the data.
    number: which network, where there are several.

  Returns:
    (theta, net_state).
  """
  key = jax.random.key(problem.key)
  if number:
    key = jax.random.fold_in(key, number)
  images = jnp.zeros((1, *problem.stream[0].shape), jnp.float32)
  return net.init(key, images, is_training=True)


def is_head(module_name: str, name: str, value: Any) -> bool:
  """Selects the leaves of the head of continual.make_net."""
  del name, value
  return module_name.rpartition('/')[2] == _HEAD
