"""Learning rates of long runs: a warm-up, then stairs or half a cosine."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """How the learning rate rises and falls; lengths are in epochs."""

  # Step size after the warm-up.
  learning_rate: float = 1.6
  # Epochs in which it rises from zero along a line.
  warmup: float = 5.0
  # 'stairs' falls by the factor below at given epochs; 'cosine' falls along
  # half a cosine from the end of the warm-up to zero at the last step.
  kind: Literal['stairs', 'cosine'] = 'stairs'
  # Epochs at which the stairs fall.
  drops: tuple[float, ...] = (30.0, 70.0, 90.0)
  # By how much, in (0, 1).
  factor: float = 0.1


def make(
  config: ScheduleConfig,
  num_steps: int,
  steps_per_epoch: float,
  length: float = 1.0,
) -> optax.Schedule:
  """The learning rate as a function of the step.

  Args:
    config: the settings.
    num_steps: steps of the whole run, at least 1.
    steps_per_epoch: steps in which every example is seen once, more than 0.
    length: by how much the run is longer than the recipe: epochs of the
      settings are stretched by it.

  Returns:
    From the number of steps done, int32, to the rate, float32.

  Raises:
    UserError: if a setting is out of range.

  Example:
    >>> rate = make(ScheduleConfig(), num_steps=100, steps_per_epoch=1)
    >>> [round(float(rate(step)), 6) for step in (0, 4, 5, 29, 30, 99)]
    [0.0, 1.28, 1.6, 1.6, 0.16, 0.0016]

  Source:
    Goyal et al., Accurate, large minibatch SGD, 2017
    (https://arxiv.org/abs/1706.02677), section 2.2; Evci et al., Rigging the
    lottery, 2020 (https://arxiv.org/abs/1911.11134), section 4.1.
  """
  _check(config)
  steps = steps_per_epoch * length
  warmup = round(config.warmup * steps)
  if warmup >= num_steps:
    raise UserError(
      f'a warm-up of {config.warmup * length:g} epochs takes {warmup} steps, '
      f'but there are {num_steps}. Shorten schedule.warmup.'
    )
  # What comes after the end need not fit into 32 bits.
  drops = jnp.array(
    [min(round(epoch * steps), num_steps) for epoch in config.drops], jnp.int32
  )

  def rate(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.int32)
    if config.kind == 'cosine':
      done = (step - warmup) / (num_steps - warmup)
      scale = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2
    else:
      fallen = jnp.sum(step >= drops)
      scale = jnp.float32(config.factor) ** fallen.astype(jnp.float32)
    rising = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
    return (config.learning_rate * rising * scale).astype(jnp.float32)

  return rate


def _check(config: ScheduleConfig) -> None:
  if not 0 < config.learning_rate < float('inf'):
    raise UserError(
      'schedule.learning_rate must be positive and finite, got '
      f'{config.learning_rate:g}.'
    )
  if not 0 <= config.warmup < float('inf'):
    raise UserError(
      f'schedule.warmup must be at least 0 epochs, got {config.warmup:g}.'
    )
  if config.kind not in ('stairs', 'cosine'):
    raise UserError(
      f"schedule.kind must be 'stairs' or 'cosine', got {config.kind!r}."
    )
  if not 0 < config.factor < 1:
    raise UserError(
      f'schedule.factor must be in (0, 1), got {config.factor:g}.'
    )
  if any(epoch <= 0 for epoch in config.drops) or list(config.drops) != sorted(
    config.drops
  ):
    raise UserError(
      'schedule.drops must be positive epochs in ascending order, got '
      f'{config.drops}.'
    )
