"""What is trained on photographs, from settings: network, optimiser, method.

make_net      bfloat16, recomputed activations
make_tx       schedule, L2 penalty, powerprop, method, mean
make_step     label smoothing
weights       of a state: what to evaluate and to export
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.imagenet_resnet50.config import (
  Config,
  NetConfig,
  RecipeConfig,
  ScheduleConfig,
)
import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.nets import resnet
from powerprop_jax.optim import ema
from powerprop_jax.train import methods
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.methods import Lengths
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import fusing, precision
from powerprop_jax.train.step import TrainState

# Of ImageNet's training images, in [0, 1]; those of the code of RigL.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def make_net(config: NetConfig, num_classes: int) -> hk.TransformedWithState:
  """ResNet-50 version 1.5, or a smaller one, for photographs.

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


def normalise(images: np.ndarray | jax.Array) -> jax.Array:
  """uint8 [..., 3] as float32, each channel of ImageNet standardised.

  Example:
    >>> np.round(np.float64(normalise(np.full((1, 3), 255, np.uint8))), 2)
    array([[2.25, 2.43, 2.64]])
  """
  x = jnp.asarray(images).astype(jnp.float32) / 255
  shape = (1,) * (x.ndim - 1) + (3,)
  return (x - _MEAN.reshape(shape)) / _DEVIATION.reshape(shape)


def learning_rate(recipe: RecipeConfig, num_examples: int) -> optax.Schedule:
  """The learning rate of a recipe as a function of the step.

  Example:
    >>> recipe = RecipeConfig(batch_size=1, num_steps=100)
    >>> rate = learning_rate(recipe, num_examples=1)
    >>> [round(float(rate(step)), 6) for step in (0, 4, 5, 29, 30, 99)]
    [0.0, 1.28, 1.6, 1.6, 0.16, 0.0016]

  Source:
    Goyal et al., Accurate, large minibatch SGD, 2017
    (https://arxiv.org/abs/1706.02677), section 2.2; Evci et al., Rigging the
    lottery, 2020 (https://arxiv.org/abs/1911.11134), section 4.1.
  """
  config, num_steps = recipe.schedule, recipe.total_steps
  _check_schedule(config)
  # In an epoch of the recipe, stretched as the run is.
  steps = num_examples / recipe.batch_size * recipe.length
  warmup = round(config.warmup * steps)
  if warmup >= num_steps:
    raise UserError(
      f'a warm-up of {config.warmup * recipe.length:g} epochs takes {warmup} '
      f'steps, but there are {num_steps}. Shorten schedule.warmup.'
    )
  peak = config.learning_rate
  if config.kind == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)
  levels = [peak * config.factor**n for n in range(len(config.drops) + 1)]
  # What comes after the end need not fit into 32 bits.
  drops = [min(round(epoch * steps), num_steps) for epoch in config.drops]
  stairs = optax.join_schedules([*map(optax.constant_schedule, levels)], drops)
  if not warmup:
    return stairs
  rising = optax.linear_schedule(0.0, 1.0, warmup)
  return lambda step: rising(step) * stairs(step)


def _check_schedule(config: ScheduleConfig) -> None:
  check = functools.partial(errors.check, config)
  rate, warmup = config.learning_rate, config.warmup
  check('schedule.learning_rate', 0 < rate < math.inf, 'positive and finite')
  check('schedule.warmup', 0 <= warmup < math.inf, 'at least 0 epochs')
  if config.kind not in ('stairs', 'cosine'):
    raise UserError(
      f"schedule.kind must be 'stairs' or 'cosine', got {config.kind!r}."
    )
  check('schedule.factor', 0 < config.factor < 1, 'in (0, 1)')
  drops = list(config.drops)
  if any(epoch <= 0 for epoch in drops) or drops != sorted(drops):
    raise UserError(
      'schedule.drops must be positive epochs in ascending order, got '
      f'{config.drops}.'
    )


def make_tx(
  config: Config,
  num_examples: int,
  theta: Params,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that trains as the settings say.

  From the inside out: L2 penalty, SGD, powerprop unless α is 1, sparsify, and
  the running mean of θ where the recipe has one. For 'one_shot' it trains the
  dense network. theta may be shapes.
  """
  recipe = config.recipe
  inner: Any = optax.sgd(
    learning_rate(recipe, num_examples),
    recipe.momentum or None,
    recipe.nesterov and recipe.momentum > 0,
  )
  if recipe.decay_theta:
    inner = optax.chain(pp.decay_theta(recipe.decay_theta), inner)
  if config.alpha != 1:
    inner = pp.powerprop(inner, config.alpha)
  is_dense = config.method in ('dense', 'one_shot')
  weights_of = (
    leaf for leaf in trees.named_leaves(theta) if pp.is_weight(*leaf)
  )
  tx = methods.make_tx(
    inner,
    'dense' if is_dense else config.method,
    1.0 if is_dense else 1 - config.sparsity,
    dataclasses.replace(
      config.sparse, distribution=_DISTRIBUTIONS[config.allocation]
    ),
    Lengths(
      recipe.total_steps,
      max(1, round(num_examples / recipe.batch_size)),
      sum(leaf.value.size for leaf in weights_of),
    ),
    key,
  )
  if fusing.fuses_loops():
    tx = fusing.fused(tx)
  return ema.with_ema(tx, recipe.ema) if recipe.ema else tx


_DISTRIBUTIONS: Row = {
  'uniform': 'uniform_dense_stem',
  'erk': 'erk',
}
_ALLOCATE: dict[str, Callable[..., dict[str, float]]] = {
  'uniform': methods.uniform_dense_stem,
  'erk': pp.erk,
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
  )


class Weights(NamedTuple):
  """What a state amounts to: θ is zero where the masks have no connection."""

  theta: hk.Params
  masks: Tree
  net_state: hk.State


def weights(
  state: TrainState, config: Config, *, mean: bool = False
) -> Weights:
  """The network to evaluate or to export, or its running mean; a pure function.

  For 'one_shot' the smallest weights of each layer are left out here.
  """
  read = ema.average if mean else pp.effective_params
  theta = read(state.phi, state.opt_state)
  held = pp.current_masks(state.phi, state.opt_state)
  if config.method == 'one_shot':
    allocated = _ALLOCATE[config.allocation](theta, config.sparsity)
    held = pp.prune(theta, allocated)
    theta = pp.apply_masks(theta, held)
  return Weights(theta, held, state.net_state)


def density(found: Weights) -> float:
  """Share of the weights, norms and biases aside, that are connections.

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
  chosen = [mask.value for leaf, mask in pairs if pp.is_weight(*leaf)]
  kept = sum(int(jnp.sum(mask)) for mask in chosen)
  return kept / sum(mask.size for mask in chosen)


def shapes(net: hk.TransformedWithState, image_size: int) -> Params:
  """Shapes of the parameters of a network, for square images of a side."""
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return step_lib.shapes(net, images)
