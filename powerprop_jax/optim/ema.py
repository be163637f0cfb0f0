"""A running mean of the effective weights, to evaluate instead of the last.

The mean is kept in the optimiser's state, so that checkpoints, sharding and
whatever skips a step concern it as they concern the momenta.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Params, Updates
from powerprop_jax.optim import views


class EmaState(NamedTuple):
  """State of with_ema.

  Attributes:
    step: number of updates seen, int32 scalar.
    average: the mean of θ, a tree like the parameters.
    inner_state: state of the wrapped transformation.
  """

  step: jax.Array
  average: Params
  inner_state: OptState


def with_ema(
  inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
  """Keeps a mean of θ beside what inner does, which it leaves alone.

  After step t the mean is d·mean + (1 - d)·θ, with d = min(decay, (1 + t) /
  (10 + t)): at first it forgets fast, so that it is not biased towards the
  start. It goes around everything, sparsify and powerprop included.

  Example:
    >>> tx = with_ema(optax.sgd(1.0), 0.9)
    >>> phi = {'w': jnp.zeros(1)}
    >>> _, state = tx.update({'w': jnp.array([-1.])}, tx.init(phi), phi)
    >>> average(phi, state)['w']  # d = 2 / 11 at step 1
    Array([0.8181818], dtype=float32)
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay must be in [0, 1), got {decay:g}.')
  inner = optax.with_extra_args_support(inner)

  def init(params: Params) -> EmaState:
    inner_state = inner.init(params)
    theta = views.effective_params(params, inner_state)
    # Copies: where θ is φ, no array may be in the state of a run twice.
    return EmaState(
      jnp.zeros([], jnp.int32), jax.tree.map(jnp.array, theta), inner_state
    )

  def update(
    updates: Updates, state: EmaState, params: Params = None, **extra_args: Any
  ) -> tuple[Updates, EmaState]:
    trees.require_params(params, 'with_ema')
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    step = optax.safe_increment(state.step)
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    theta = views.effective_params(
      optax.apply_updates(params, updates), inner_state
    )
    mean = jax.tree.map(
      lambda a, t: a + weight.astype(a.dtype) * (t - a), state.average, theta
    )
    return updates, EmaState(step, mean, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def average(phi: Params, opt_state: OptState) -> Params:
  """The mean of θ, zero where no connection is; θ itself without with_ema.

  Example:
    >>> phi = {'w': jnp.ones(1)}
    >>> average(phi, optax.sgd(1.0).init(phi))['w']
    Array([1.], dtype=float32)
  """
  found = trees.find_states(opt_state, EmaState)
  if not found:
    return views.effective_params(phi, opt_state)
  masks = views.current_masks(phi, opt_state)
  return masks_lib.apply_masks(found[0].average, masks)
