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
  # What becomes of the step size. A 'cosine' goes from learning_rate down to
  # zero at the last step, a 'staircase' is multiplied by stair_factor after
  # every stair_steps steps.
  schedule: Literal['constant', 'cosine', 'staircase'] = 'constant'
  # Steps in which the step size rises from 0 to learning_rate.
  warmup_steps: int = 0
  # Steps at one level of the staircase.
  stair_steps: int = 25_000
  # By how much the staircase falls each time, in (0, 1).
  stair_factor: float = 0.1
  # Momentum of 'sgd', in [0, 1); 'adam' keeps its own defaults.
  momentum: float = 0.0
  # Whether that momentum looks ahead, as Nesterov's does.
  nesterov: bool = False
  # How slowly 'adam' forgets squared gradients, in [0, 1).
  b2: float = 0.999
  # L2 penalty on the effective weights θ, as a gradient rate · θ.
  decay_theta: float = 0.0
  # Penalty on the latent weights φ, decoupled: each step shrinks φ by
  # learning_rate · decay_phi.
  decay_phi: float = 0.0
  # Where the optimiser works: 'recommended' on θ, its step being multiplied by
  # ψ′(φ), or 'naive' on φ and the chain-ruled gradient.
  form: Form = 'recommended'

  @property
  def is_elementwise(self) -> bool:
    """Whether an update is a few operations per weight (step.make_advance)."""
    return self.name == 'sgd'


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
  if config.warmup_steps and not 0 < config.warmup_steps < num_steps:
    raise UserError(
      f'warmup_steps must be in [0, {num_steps}), the steps of the run, got '
      f'{config.warmup_steps}.'
    )
  rate = learning_rate(config, num_steps)
  if config.name == 'adam':
    inner = optax.adam(rate, b2=config.b2)
  else:
    inner = optax.sgd(rate, config.momentum or None, config.nesterov)
  if config.decay_theta:
    inner = optax.chain(decay.decay_theta(config.decay_theta, select), inner)
  tx = powerprop_lib.powerprop(inner, alpha, select, form=config.form)
  if config.decay_phi:
    shrink = decay.decay_phi(config.decay_phi, rate, select)
    tx = optax.chain(tx, shrink)
  return tx


def learning_rate(
  config: OptimizerConfig, num_steps: int
) -> optax.ScalarOrSchedule:
  """The step size, a number or a schedule, of a run of a length."""
  warmup = config.warmup_steps
  if not warmup:
    return _after_warmup(config, num_steps)
  after = _after_warmup(config, num_steps - warmup)
  first = optax.linear_schedule(0.0, config.learning_rate, warmup)
  rest = after if callable(after) else optax.constant_schedule(after)
  return optax.join_schedules([first, rest], [warmup])


def _after_warmup(
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


def _check(config: OptimizerConfig) -> None:
  check = functools.partial(errors.check, config)
  rate, momentum = config.learning_rate, config.momentum
  check('learning_rate', 0 < rate < math.inf, 'positive and finite')
  check('momentum', 0 <= momentum < 1, 'in [0, 1)')
  check('b2', 0 <= config.b2 < 1, 'in [0, 1)')
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
