"""Optimisers and learning rates from settings, powerprop around them.

The library's own way to choose an optimiser is to write it down in Optax; this
is for programs, which read their settings from a command line.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import optax

from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import decay
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim.powerprop import Form
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How the weights are trained."""

  # 'sgd' with the momentum below, or 'adam'.
  name: Literal['sgd', 'adam'] = 'sgd'
  # Step size, the largest of the schedule.
  learning_rate: float = 0.1
  # 'constant'; 'cosine' from learning_rate down to zero at the last step; or
  # 'staircase', multiplied by stair_factor after every stair_steps steps.
  schedule: Literal['constant', 'cosine', 'staircase'] = 'constant'
  # Steps at one level of the staircase.
  stair_steps: int = 25_000
  # By how much the staircase falls each time, in (0, 1).
  stair_factor: float = 0.1
  # Momentum of 'sgd', in [0, 1); 'adam' keeps its own defaults.
  momentum: float = 0.0
  # Whether that momentum looks ahead, as Nesterov's does.
  nesterov: bool = False
  # L2 penalty on the effective weights θ, as a gradient rate · θ.
  decay_theta: float = 0.0
  # Penalty on the latent weights φ, decoupled: each step shrinks φ by
  # learning_rate · decay_phi.
  decay_phi: float = 0.0
  # 'recommended': the optimiser works on θ and its step is multiplied by ψ′(φ).
  # 'naive': the optimiser works on φ and the chain-ruled gradient.
  form: Form = 'recommended'

  @property
  def is_elementwise(self) -> bool:
    """Whether an update is a few operations per weight (step.make_advance)."""
    return self.name == 'sgd'


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """How the learning rate of a long run rises and falls, in epochs."""

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


def make_tx(
  config: OptimizerConfig,
  alpha: Any,
  num_steps: int,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that the settings describe.

  powerprop around the optimiser, followed by decay of φ if there is any; the
  selected leaves are reparameterised and decay. The number of steps is the
  length of the run, for the schedule.
  """
  _check(config)
  learning_rate = _learning_rate(config, num_steps)
  if config.name == 'adam':
    inner = optax.adam(learning_rate)
  else:
    inner = optax.sgd(learning_rate, config.momentum or None, config.nesterov)
  if config.decay_theta:
    inner = optax.chain(decay.decay_theta(config.decay_theta, select), inner)
  tx = powerprop_lib.powerprop(inner, alpha, select, form=config.form)
  if config.decay_phi:
    shrink = decay.decay_phi(config.decay_phi, learning_rate, select)
    tx = optax.chain(tx, shrink)
  return tx


def _learning_rate(
  config: OptimizerConfig, num_steps: int
) -> optax.ScalarOrSchedule:
  if config.schedule == 'cosine':
    return optax.cosine_decay_schedule(config.learning_rate, num_steps)
  if config.schedule == 'staircase':
    return optax.exponential_decay(
      config.learning_rate,
      config.stair_steps,
      config.stair_factor,
      staircase=True,
    )
  return config.learning_rate


def schedule(
  config: ScheduleConfig,
  num_steps: int,
  steps_per_epoch: float,
  length: float = 1.0,
) -> optax.Schedule:
  """The learning rate as a function of the step.

  Args:
    num_steps: steps of the whole run, at least 1.
    steps_per_epoch: steps in which every example is seen once, more than 0.
    length: by how much the run is longer than the recipe: epochs of the
      settings are stretched by it.

  Example:
    >>> rate = schedule(ScheduleConfig(), num_steps=100, steps_per_epoch=1)
    >>> [round(float(rate(step)), 6) for step in (0, 4, 5, 29, 30, 99)]
    [0.0, 1.28, 1.6, 1.6, 0.16, 0.0016]

  Source:
    Goyal et al., Accurate, large minibatch SGD, 2017
    (https://arxiv.org/abs/1706.02677), section 2.2; Evci et al., Rigging the
    lottery, 2020 (https://arxiv.org/abs/1911.11134), section 4.1.
  """
  _check_schedule(config)
  steps = steps_per_epoch * length
  warmup = round(config.warmup * steps)
  if warmup >= num_steps:
    raise UserError(
      f'a warm-up of {config.warmup * length:g} epochs takes {warmup} steps, '
      f'but there are {num_steps}. Shorten schedule.warmup.'
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


def _check(config: OptimizerConfig) -> None:
  check = functools.partial(errors.check, config)
  rate, momentum = config.learning_rate, config.momentum
  check('learning_rate', 0 < rate < math.inf, 'positive and finite')
  check('momentum', 0 <= momentum < 1, 'in [0, 1)')
  if config.nesterov and not momentum:
    raise UserError('nesterov needs a momentum, which is 0. Set it, e.g. 0.9.')
  check('stair_steps', config.stair_steps >= 1, 'at least 1')
  check('stair_factor', 0 < config.stair_factor < 1, 'in (0, 1)')
  for name in ('decay_theta', 'decay_phi'):
    decays = getattr(config, name)
    check(name, 0 <= decays < math.inf, 'finite and at least 0')
  if config.name == 'adam' and momentum:
    raise UserError(
      "momentum is a setting of name='sgd'; 'adam' has its own, so leave it 0."
    )
  if config.form == 'naive' and config.decay_theta:
    raise UserError(
      'decay_theta needs the recommended form: in the naive form the optimiser '
      'sees φ. Use decay_phi, or form=recommended.'
    )


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
