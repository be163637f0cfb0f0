"""An optimiser from settings, powerprop around it.

The library's own way to choose an optimiser is to write it down in Optax; this
is for programs, which read their settings from a command line.
"""

import dataclasses
from typing import Any, Literal

import optax

from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import decay
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim.powerprop import Form
from powerprop_jax.train.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How the weights are trained."""

  # 'sgd' with the momentum below, or 'adam'.
  name: Literal['sgd', 'adam'] = 'sgd'
  # Step size, the largest of the schedule.
  learning_rate: float = 0.1
  # 'constant', or 'cosine' from learning_rate down to zero at the last step.
  schedule: Literal['constant', 'cosine'] = 'constant'
  # Momentum of 'sgd', in [0, 1); 'adam' keeps its own defaults.
  momentum: float = 0.0
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


def make_tx(
  config: OptimizerConfig,
  alpha: Any,
  num_steps: int,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that the settings describe.

  Args:
    config: the settings.
    alpha: the power, at least 1; a Python number is compiled in, an array may
      be traced or batched.
    num_steps: length of the run, for the schedule.
    select: which leaves are reparameterised and decay.

  Returns:
    powerprop around the optimiser, followed by decay of φ if there is any.

  Raises:
    UserError: if a setting is out of range.
  """
  _check(config)
  learning_rate: optax.ScalarOrSchedule = config.learning_rate
  if config.schedule == 'cosine':
    learning_rate = optax.cosine_decay_schedule(config.learning_rate, num_steps)
  if config.name == 'adam':
    inner = optax.adam(learning_rate)
  else:
    inner = optax.sgd(learning_rate, config.momentum or None)
  if config.decay_theta:
    inner = optax.chain(decay.decay_theta(config.decay_theta, select), inner)
  tx = powerprop_lib.powerprop(inner, alpha, select, form=config.form)
  if config.decay_phi:
    shrink = decay.decay_phi(config.decay_phi, learning_rate, select)
    tx = optax.chain(tx, shrink)
  return tx


def _check(config: OptimizerConfig) -> None:
  if not 0 < config.learning_rate < float('inf'):
    raise UserError(
      'learning_rate must be positive and finite, got '
      f'{config.learning_rate:g}.'
    )
  if not 0 <= config.momentum < 1:
    raise UserError(f'momentum must be in [0, 1), got {config.momentum:g}.')
  if config.name == 'adam' and config.momentum:
    raise UserError(
      "momentum is a setting of name='sgd'; 'adam' has its own, so leave it 0."
    )
  if config.form == 'naive' and config.decay_theta:
    raise UserError(
      'decay_theta needs the recommended form: in the naive form the optimiser '
      'sees φ. Use decay_phi, or form=recommended.'
    )
