"""Training a network on one task of a stream, in a program that fits them all.

Arrays of all tasks are brought to common sizes, and what tells tasks apart is
data, so that the first task compiles and the others do not.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.continual.packnet import Learner
from powerprop_jax.continual.task_streams import Task
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.nets import mlp
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import divergence

# Examples scored at a time.
_SCORE_BATCH = 1000
# The label of examples that fill an array up.
_NOTHING = -1


class StoppedError(Exception):
  """A task cannot be learned: training diverged, or no room is left."""


class Lengths(NamedTuple):
  """Sizes that all tasks of a stream have in common.

  Attributes:
    num_train: rows of the training arrays.
    num_scored: rows of the arrays for scores.
    batch_size: examples in a batch.
    epoch: training steps in a pass over the largest training set.
    epochs: such passes for each task.
  """

  num_train: int
  num_scored: int
  batch_size: int
  epoch: int
  epochs: int

  @property
  def num_steps(self) -> int:
    """Training steps for each task."""
    return self.epoch * self.epochs


class TaskData(NamedTuple):
  """A task on the device.

  Attributes:
    number: its place in the stream, from 0.
    train: examples to train on, filled up to Lengths.num_train.
    num_train: how many of them there are.
    validation: examples to choose masks by, filled up to Lengths.num_scored.
  """

  number: int
  train: Arrays
  num_train: int
  validation: Arrays


class Program(NamedTuple):
  """What is compiled once for all tasks.

  Attributes:
    net: the network.
    tx: gradient transformation over φ.
    advance: jitted, (learner, arrays, indices) -> (learner, loss); indices are
      int32[steps, batch].
    count: jitted, (theta, net_state, arrays) -> (correct, examples), integers.
  """

  net: hk.TransformedWithState
  tx: optax.GradientTransformation
  advance: Callable[..., Any]
  count: Callable[..., Any]

  def accuracy(self, theta: Params, net_state: Tree, arrays: Arrays) -> float:
    """Share of the examples that are classified rightly."""
    correct, examples = self.count(theta, net_state, arrays)
    return int(correct) / int(examples)


def make_net(
  num_outputs: int, hidden: Sequence[int]
) -> hk.TransformedWithState:
  """The network of all methods, nets.mlp.MLP, as nets.make would give it."""

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    return mlp.MLP(num_outputs, hidden)(images, is_training)

  return hk.transform_with_state(forward)


def lengths(stream: Sequence[Task], batch_size: int, epochs: int) -> Lengths:
  """Common sizes of the tasks of a stream.

  epochs are passes over the largest training set; smaller ones are gone through
  more often, so that every task takes as many steps.
  """
  num_train = max(task.size('train') for task in stream)
  splits.check_batch_size(batch_size, num_train)
  num_scored = max(
    task.size(part) for task in stream for part in ('validation', 'test')
  )
  if num_scored > _SCORE_BATCH:
    num_scored = _SCORE_BATCH * math.ceil(num_scored / _SCORE_BATCH)
  epoch = math.ceil(num_train / batch_size)
  return Lengths(num_train, num_scored, batch_size, epoch, epochs)


def prepare(task: Task, number: int, sizes: Lengths) -> TaskData:
  """A task on the device; number is its place in the stream, from 0."""
  train = Arrays(*task.train)
  return TaskData(
    number,
    _filled(train, sizes.num_train),
    len(train.labels),
    scored(Arrays(*task.validation), sizes),
  )


def scored(arrays: Arrays, sizes: Lengths) -> Arrays:
  """Examples for Program.accuracy, on the device."""
  return _filled(arrays, sizes.num_scored)


def union(stream: Sequence[Task], labels_apart: int) -> Arrays:
  """The training examples of all tasks together, on the host.

  labels_apart is added to the labels for each task before.
  """
  images = [task.train.images for task in stream]
  labels = [
    task.labels('train') + labels_apart * i for i, task in enumerate(stream)
  ]
  return Arrays(np.concatenate(images), np.concatenate(labels).astype(np.int32))


def _filled(arrays: Arrays, size: int) -> Arrays:
  missing = size - len(arrays.labels)
  images, labels = arrays.images, arrays.labels.astype(np.int32)
  if missing:
    images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
    labels = np.pad(labels, (0, missing), constant_values=_NOTHING)
  return Arrays(*jax.device_put((images, labels)))


def make_program(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  num_classes: int,
) -> Program:
  """Compiles nothing yet; call it once for all tasks.

  A network whose head is a multiple of num_classes has a block of outputs for
  each task, and the label l·num_classes + i is class i of task l; the others'
  outputs do not take part. It needs no key.
  """

  def logits_fn(
    theta: Params, net_state: Tree, arrays: Arrays, is_training: bool
  ) -> tuple[jax.Array, Any]:
    images = splits.to_float(arrays.images)
    logits, net_state = net.apply(
      theta, net_state, None, images, is_training=is_training
    )
    return _own_block(logits, arrays.labels, num_classes), net_state

  def loss_fn(
    theta: Params, net_state: Tree, batch: Arrays
  ) -> tuple[jax.Array, Any]:
    logits, net_state = logits_fn(theta, net_state, batch, True)
    losses = step_lib.cross_entropy(
      logits, jnp.asarray(batch.labels) % num_classes
    )
    return jnp.mean(losses), net_state

  def advance(
    learner: Learner, arrays: Arrays, indices: jax.Array
  ) -> tuple[Learner, jax.Array]:
    def step(learner: Learner, rows: jax.Array) -> tuple[Learner, jax.Array]:
      phi, net_state, opt_state = learner
      theta = pp.effective_params(phi, opt_state, pinned=True)
      batch = Arrays(arrays.images[rows], arrays.labels[rows])
      (loss, net_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        theta, net_state, batch
      )
      updates, opt_state = tx.update(grads, opt_state, phi)
      phi = optax.apply_updates(phi, updates)
      return Learner(phi, net_state, opt_state), loss

    learner, losses = jax.lax.scan(step, learner, indices)
    return learner, jnp.mean(losses)

  def count(
    theta: Params, net_state: Tree, arrays: Arrays
  ) -> tuple[jax.Array, jax.Array]:
    def num_correct(batch: Arrays) -> jax.Array:
      logits, _ = logits_fn(theta, net_state, batch, False)
      found = jnp.argmax(logits, -1) == batch.labels % num_classes
      finite = jnp.all(jnp.isfinite(logits), axis=-1)
      return jnp.sum(found & finite & (batch.labels >= 0))

    size = min(_SCORE_BATCH, arrays.labels.shape[0])
    batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
    correct = jnp.sum(jax.lax.map(num_correct, batches))
    return correct, jnp.sum(arrays.labels >= 0)

  return Program(net, tx, jax.jit(advance), jax.jit(count))


def _own_block(logits: jax.Array, labels: Any, num_classes: int) -> jax.Array:
  """Of each row of logits, the block to which its label belongs."""
  if logits.shape[-1] == num_classes:
    return logits
  blocks = logits.reshape(len(logits), -1, num_classes)
  own = (labels // num_classes)[:, None, None]
  return jnp.take_along_axis(blocks, own, axis=1)[:, 0]


def fit(
  program: Program,
  learner: Learner,
  task: TaskData,
  sizes: Lengths,
  key: int,
  report: Callable[[float], None],
) -> Learner:
  """Trains on one task; report is called with the mean loss of each epoch.

  The key is the seed of the order of the examples, which also depends on the
  task.

  Raises:
    StoppedError: if a weight is not finite in the end.
  """
  for start in range(0, sizes.num_steps, sizes.epoch):
    indices = splits.batch_indices(
      _ORDERS * key + task.number,
      start,
      sizes.epoch,
      sizes.batch_size,
      task.num_train,
    )
    learner, loss = program.advance(learner, task.train, indices)
    report(float(loss))
  if divergence.lost_leaf(learner.phi) is not None:
    raise StoppedError(
      f'training on task {task.number + 1} diverged. Try a smaller '
      '--optimizer.learning-rate, smaller --rates, or a smaller --ewc.strength.'
    )
  return learner


# More than there are tasks, so that no two runs share the order of a task.
_ORDERS = 1_000_003
