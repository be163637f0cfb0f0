"""Weight decay on θ and on φ, which are different regularisers.

With θ = φ |φ|^(α-1), a penalty Σφ² is Σ|θ|^(2/α): the larger α, the more it
prefers few large weights. Decay of θ belongs inside powerprop, where the
parameters are θ; decay of φ outside, where they are φ.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Select, Updates


class DecayPhiState(NamedTuple):
  """State of decay_phi.

  Attributes:
    step: number of updates seen, int32 scalar; schedules count with it.
  """

  step: jax.Array


def decay_theta(
  rate: float, select: Select = select_lib.is_weight
) -> optax.GradientTransformationExtraArgs:
  """Adds rate · θ to the gradient: the L2 penalty (rate/2) Σθ² on θ.

  Goes inside powerprop, before the optimiser:
  `powerprop(optax.chain(decay_theta(5e-4), optax.sgd(0.1)), alpha=2.)`.
  Decoupled decay of θ is what optax.adamw does when it is the inner optimiser.

  Example:
    >>> tx = decay_theta(0.5)
    >>> theta = {'linear': {'w': jnp.array([[2.0]])}}
    >>> grads = {'linear': {'w': jnp.array([[0.25]])}}
    >>> grads, _ = tx.update(grads, tx.init(theta), theta)
    >>> grads['linear']['w']                    # 0.25 + 0.5 · 2
    Array([[1.25]], dtype=float32)
  """
  _check_rate(rate)

  def init(params: Params) -> optax.EmptyState:
    select_lib.selected_names(select, params)
    return optax.EmptyState()

  def update(
    updates: Updates,
    state: optax.EmptyState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, optax.EmptyState]:
    del extra_args
    trees.require_params(params, 'decay_theta')
    decay = lambda g, theta: g + (rate * theta).astype(g.dtype)
    return trees.map_selected(decay, select, updates, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def decay_phi(
  rate: float,
  learning_rate: optax.ScalarOrSchedule,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Shrinks φ by the share learning_rate · rate at every step.

  A different regulariser from decay of θ: (rate/2) Σφ² is (rate/2) Σ|θ|^(2/α),
  for α = 2 an L1 penalty on θ, which drives small weights to zero. Goes outside
  powerprop, where the parameters are φ, and inside sparsify:
  `optax.chain(powerprop(optax.adam(lr), alpha=2.), decay_phi(1e-4, lr))`.

  Args:
    rate: strength, at least 0.
    learning_rate: that of the optimiser beside it, a number or an Optax
      schedule; with plain SGD the two are gradient descent on the loss plus
      (rate/2) Σφ².

  Example:
    >>> tx = decay_phi(0.5, learning_rate=0.1)
    >>> phi = {'linear': {'w': jnp.array([[2.0]])}}
    >>> updates = {'linear': {'w': jnp.array([[0.5]])}}
    >>> updates, _ = tx.update(updates, tx.init(phi), phi)
    >>> updates['linear']['w']                  # 0.5 - 0.1 · 0.5 · 2
    Array([[0.4]], dtype=float32)
  """
  _check_rate(rate)

  def init(params: Params) -> DecayPhiState:
    select_lib.selected_names(select, params)
    return DecayPhiState(jnp.zeros([], jnp.int32))

  def update(
    updates: Updates,
    state: DecayPhiState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, DecayPhiState]:
    del extra_args
    trees.require_params(params, 'decay_phi')
    lr = learning_rate(state.step) if callable(learning_rate) else learning_rate
    share = rate * lr
    decay = lambda u, phi: u - (share * phi).astype(u.dtype)
    updates = trees.map_selected(decay, select, updates, params)
    return updates, DecayPhiState(optax.safe_increment(state.step))

  return optax.GradientTransformationExtraArgs(init, update)


def _check_rate(rate: float) -> None:
  if not (math.isfinite(rate) and rate >= 0):
    raise ValueError(f'rate must be finite and at least 0, got {rate}.')
