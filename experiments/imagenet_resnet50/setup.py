"""What is trained on photographs, from settings: network, optimiser, method.

NetConfig ─▶ make_net        bfloat16, recomputed activations
RecipeConfig ─▶ make_tx      schedule, L2 penalty, powerprop, method, mean
             ─▶ make_step    label smoothing
state ─▶ weights             what to evaluate and to export
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import distributions, masks, reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.nets import resnet
from powerprop_jax.optim import decay, ema, powerprop, views
from powerprop_jax.prune import one_shot
from powerprop_jax.train import methods, schedules
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.methods import Lengths, SparseConfig
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import precision, xla_flags
from powerprop_jax.train.scale.precision import Half
from powerprop_jax.train.schedules import ScheduleConfig
from powerprop_jax.train.state import TrainState

Method = Literal[
  'dense', 'one_shot', 'static', 'pruning', 'set', 'rigl', 'snfs', 'top_kast'
]
METHODS = get_args(Method)
Allocation = Literal['uniform', 'erk']

# Of ImageNet's training images, in [0, 1]; those of the code of RigL.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class NetConfig:
  """The network."""

  # Layers: 50, 18, or 10 to try things out.
  depth: Literal[10, 18, 50] = 50
  # Channels, as a multiple of the usual number.
  width: float = 1.0
  # What layers compute with: 'bfloat16', or 'none' for float32.
  half: Half = 'none'
  # Compute activations inside blocks twice instead of keeping them.
  remat: bool = False


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """How it is trained: the recipe of RigL on ImageNet."""

  # Examples in a batch, on all devices together.
  batch_size: int = 4096
  # Training steps of the plain recipe.
  num_steps: int = 32_000
  # By how much training is longer than that: steps, epochs of the schedule and
  # the end of rewiring are stretched by it.
  length: float = 1.0
  # The learning rate, for the batch above.
  schedule: ScheduleConfig = ScheduleConfig()
  # Momentum, in [0, 1).
  momentum: float = 0.9
  # Whether it looks ahead. The paper does not say; its code does.
  nesterov: bool = True
  # L2 penalty on θ, not on norms and biases.
  decay_theta: float = 1e-4
  # Share of each label that is spread over all classes.
  label_smoothing: float = 0.1
  # Decay of a running mean of θ that is evaluated too; 0 keeps none.
  ema: float = 0.0


class Task(NamedTuple):
  """What the settings of a recipe are shares of, and what is asked of it.

  Attributes:
    method: one of METHODS.
    sparsity: share of zeros in the end, in [0, 1); 0 for 'dense'.
    allocation: how it is shared out between layers. Under 'uniform' the first
      layer is dense, as in RigL.
    alpha: the power; 1 is training without powerprop.
    num_examples: of the training split.
  """

  method: Method
  sparsity: float
  allocation: Allocation
  alpha: float
  num_examples: int


def make_net(config: NetConfig, num_classes: int) -> hk.TransformedWithState:
  """ResNet-50 version 1.5, or a smaller one, for photographs.

  Args:
    config: the settings.
    num_classes: size of the last axis of the logits.

  Returns:
    A network as from nets.make.

  Raises:
    UserError: if a setting is out of range.

  Example:
    >>> net = make_net(NetConfig(depth=18, width=0.25), 10)
    >>> theta, _ = jax.eval_shape(
    ...     lambda key: net.init(key, jnp.zeros((1, 32, 32, 3)), True),
    ...     jax.random.key(0))
    >>> theta['resnet_18/logits']['w'].shape
    (128, 10)
  """

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    net = resnet.ResNet(
      num_classes, config.depth, width=config.width, remat=config.remat
    )
    return net(images, is_training)

  if config.depth not in (10, 18, 50):
    raise UserError(f'net.depth must be 10, 18 or 50, got {config.depth}.')
  if not 1 / 64 <= config.width < math.inf:
    raise UserError(
      f'net.width must leave at least one of 64 channels, got {config.width:g}.'
    )
  net = hk.transform_with_state(forward)
  return precision.with_half(net, config.half, [resnet.ResNet])


def normalise(images: Any) -> jax.Array:
  """uint8 images with mean 0 and deviation 1 in each channel of ImageNet.

  Args:
    images: uint8[..., 3].

  Returns:
    float32 of the same shape.

  Example:
    >>> np.round(np.float64(normalise(np.full((1, 3), 255, np.uint8))), 2)
    array([[2.25, 2.43, 2.64]])
  """
  x = jnp.asarray(images).astype(jnp.float32) / 255
  shape = (1,) * (x.ndim - 1) + (3,)
  return (x - _MEAN.reshape(shape)) / _DEVIATION.reshape(shape)


def num_steps(config: RecipeConfig) -> int:
  """Training steps in all, of the stretched recipe.

  Raises:
    UserError: if there is none.

  Example:
    >>> num_steps(RecipeConfig(length=5))
    160000
  """
  if not 0 < config.length < math.inf:
    raise UserError(
      f'recipe.length must be positive and finite, got {config.length:g}.'
    )
  if config.num_steps < 1 or round(config.num_steps * config.length) < 1:
    raise UserError(
      f'recipe.num_steps must be at least 1, got {config.num_steps} × '
      f'{config.length:g}.'
    )
  return round(config.num_steps * config.length)


def learning_rate(config: RecipeConfig, num_examples: int) -> optax.Schedule:
  """The rate of a step; see schedules.make.

  Args:
    config: the settings.
    num_examples: of the training split.

  Returns:
    From the number of steps done to the rate.

  Raises:
    UserError: if a setting is out of range.
  """
  return schedules.make(
    config.schedule,
    num_steps(config),
    num_examples / config.batch_size,
    config.length,
  )


def make_tx(
  config: RecipeConfig,
  sparse: SparseConfig,
  task: Task,
  theta: Params,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that trains a task.

  From the inside out: L2 penalty, SGD, powerprop unless α is 1, sparsify, and
  the running mean of θ where one is wanted.

  Args:
    config: the recipe.
    sparse: settings of the method; its distribution is that of the task.
    task: the task.
    theta: parameters, or their shapes.
    key: seed of masks and random growth.

  Returns:
    The transformation. For 'one_shot' it trains the dense network.

  Raises:
    UserError: if a setting is out of range, or does not fit the method.
  """
  check_task(task)
  _check(config)
  inner: Any = optax.sgd(
    learning_rate(config, task.num_examples),
    config.momentum or None,
    config.nesterov and config.momentum > 0,
  )
  if config.decay_theta:
    inner = optax.chain(decay.decay_theta(config.decay_theta), inner)
  if task.alpha != 1:
    inner = powerprop.powerprop(inner, task.alpha)
  is_dense = task.method in ('dense', 'one_shot')
  weights_of = (
    leaf for leaf in trees.named_leaves(theta) if select_lib.is_weight(*leaf)
  )
  tx = methods.make_tx(
    inner,
    'dense' if is_dense else task.method,  # type: ignore[arg-type]
    1.0 if is_dense else 1 - task.sparsity,
    dataclasses.replace(sparse, distribution=_DISTRIBUTIONS[task.allocation]),
    Lengths(
      num_steps(config),
      max(1, round(task.num_examples / config.batch_size)),
      sum(leaf.value.size for leaf in weights_of),
    ),
    key,
  )
  return ema.with_ema(tx, config.ema) if config.ema else tx


_DISTRIBUTIONS: Row = {
  'uniform': 'uniform_dense_stem',
  'erk': 'erk',
}
_ALLOCATE: dict[str, Callable[..., dict[str, float]]] = {
  'uniform': methods.uniform_dense_stem,
  'erk': distributions.erk,
}


def make_step(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  config: RecipeConfig,
) -> step_lib.TrainStep:
  """One step on uint8 images; see step.make_step."""
  return step_lib.make_step(
    net,
    tx,
    prepare=normalise,
    label_smoothing=config.label_smoothing,
    repeat_update=xla_flags.fuses_loops(),
  )


class Weights(NamedTuple):
  """What a state amounts to.

  Attributes:
    theta: effective parameters, zero where no connection is.
    masks: the connections.
    net_state: state of the network.
  """

  theta: hk.Params
  masks: Tree
  net_state: hk.State


def weights(state: TrainState, task: Task, *, mean: bool = False) -> Weights:
  """The network to evaluate or to export; a pure function.

  Args:
    state: in training, or trained.
    task: the task; for 'one_shot' the smallest weights of each layer are left
      out here, at the sparsity of the task.
    mean: take the running mean of θ, where there is one.

  Returns:
    Its parts.
  """
  read = ema.average if mean else views.effective_params
  theta = read(state.phi, state.opt_state)
  held = views.current_masks(state.phi, state.opt_state)
  if task.method == 'one_shot':
    allocated = _ALLOCATE[task.allocation](theta, task.sparsity)
    held = one_shot.prune(theta, allocated)
    theta = masks.apply_masks(theta, held)
  return Weights(theta, held, state.net_state)


def density(found: Weights) -> float:
  """Share of the weights, norms and biases aside, that are connections.

  Args:
    found: the network, of any sharding.

  Returns:
    In [0, 1].

  Example:
    >>> theta = {'linear': {'w': jnp.ones((1, 2))}}
    >>> masks = {'linear': {'w': jnp.array([[True, False]])}}
    >>> density(Weights(theta, masks, {}))
    0.5
  """
  pairs = zip(
    trees.named_leaves(found.theta),
    trees.named_leaves(found.masks),
    strict=True,
  )
  chosen = [mask.value for leaf, mask in pairs if select_lib.is_weight(*leaf)]
  kept = sum(int(jnp.sum(mask)) for mask in chosen)
  return kept / sum(mask.size for mask in chosen)


def check_task(task: Task) -> None:
  """Refuses tasks that cannot be.

  Raises:
    UserError: naming the setting.
  """
  if task.method not in METHODS:
    raise UserError(
      f'unknown method {task.method!r}; there are: {", ".join(METHODS)}.'
    )
  if task.allocation not in _ALLOCATE:
    raise UserError(
      f'unknown allocation {task.allocation!r}; there are: '
      f'{", ".join(_ALLOCATE)}.'
    )
  if not 0 <= task.sparsity < 1:
    raise UserError(f'sparsity must be in [0, 1), got {task.sparsity:g}.')
  if task.method == 'dense' and task.sparsity:
    raise UserError(f'the dense network has sparsity 0, got {task.sparsity:g}.')
  if not 1 <= task.alpha < math.inf:
    raise UserError(f'alpha must be at least 1 and finite, got {task.alpha:g}.')
  reparam.check_invertible(task.alpha)


def _check(config: RecipeConfig) -> None:
  if config.batch_size < 1:
    raise UserError(
      f'recipe.batch_size must be at least 1, got {config.batch_size}.'
    )
  for name in ('momentum', 'label_smoothing', 'ema'):
    value = getattr(config, name)
    if not 0 <= value < 1:
      raise UserError(f'recipe.{name} must be in [0, 1), got {value:g}.')
  if not 0 <= config.decay_theta < math.inf:
    raise UserError(
      'recipe.decay_theta must be at least 0 and finite, got '
      f'{config.decay_theta:g}.'
    )


def shapes(net: hk.TransformedWithState, image_size: int) -> Any:
  """Shapes of the parameters of a network, for square images.

  Args:
    net: from make_net.
    image_size: their side.

  Returns:
    A tree of jax.ShapeDtypeStruct.
  """
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  init = functools.partial(net.init, is_training=True)
  return jax.eval_shape(init, jax.random.key(0), images)[0]
