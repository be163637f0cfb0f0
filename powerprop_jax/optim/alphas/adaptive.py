"""A gradient transformation whose α a controller changes during training.

    update ─▶ inner ─▶ [every period steps: θ ─▶ controller ─▶ α′, φ ─▶ φ′]

α is an array of the state, so that nothing is compiled again when it changes.
"""

import operator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, trees
from powerprop_jax.core.trees import (
  Alpha,
  OptState,
  Params,
  Static,
  Tree,
  Updates,
)
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim import topology as topology_lib
from powerprop_jax.optim.alphas import remap
from powerprop_jax.optim.alphas.alpha import AlphaController
from powerprop_jax.optim.alphas.remap import Hold
from powerprop_jax.optim.powerprop import PowerState


class AdaptiveAlphaState(NamedTuple):
  """State of adaptive_alpha.

  Attributes:
    step: number of updates seen, int32 scalar.
    controller_state: what the controller remembers.
    inner_state: state of the wrapped transformation, with α in its PowerState.
  """

  step: jax.Array
  controller_state: Tree
  inner_state: OptState


def adaptive_alpha(
  inner: optax.GradientTransformation,
  controller: AlphaController,
  *,
  period: int,
  warm_up: int = 0,
  hold: Hold = 'theta',
) -> optax.GradientTransformationExtraArgs:
  """Lets a controller change the α of the powerprop inside, every period steps.

  After the updates number warm_up + period, warm_up + 2 period and so on, θ is
  measured as the step leaves it, the controller is asked for α, and φ moves so
  that θ stays as it is. The step that `update` returns includes that move.

  Goes outermost, around what else works on φ:
  `adaptive_alpha(rigl(powerprop(inner, alpha), ...), controller, period=100)`.
  Gradients may be clipped before it, and accumulated by an optax.MultiSteps
  inside or outside; its own steps are then those that it sees.

  Args:
    inner: a transformation with one powerprop inside, whose alpha is an array:
      a float32 scalar, or a tree of them; not of the naive form if θ is held.
    controller: the rule for α.
    period: updates from one change to the next, at least 1.
    warm_up: updates before the first period begins, at least 0.
    hold: 'theta', or 'phi' to leave φ where it is, so that the network jumps to
      sign(θ) |θ|^(α′/α). For |θ| < 1 that moves every weight nearer to zero
      when α rises, and a controller that measures this rewards itself.

  Note:
    The report does not say what becomes of φ when α changes; see with_alpha.
    A step is added to φ, so that φ′ is exact to the rounding of the larger of φ
    and φ′. θ stays to a relative 2 eps (max(α, α′) + 1 + |log2 |θ||) where α
    rises, and where it falls to that times max(1, |θ|^(1/α - 1/α′)). With
    the rule of next_alpha and growth 1.5, that exponent is at least -0.102.
    Where a rule of your own falls a long way, from 4 to 1.1 for instance,
    weights below about 1e-11 may become zero and stay there; with_alpha does
    not add and has no such limit.
    Slots of transformations behind powerprop live in φ-space and are not moved.

  Example:
    >>> tx = adaptive_alpha(
    ...   pp.powerprop(optax.sgd(0.1), alpha=jnp.float32(1.5)),
    ...   pp.near_zero_controller(epsilon=0.1), period=1)
    >>> phi = {'linear': {'w': jnp.array([[1.0, -0.01]])}}
    >>> zeros = {'linear': {'w': jnp.zeros((1, 2))}}
    >>> _, state = tx.update(zeros, tx.init(phi), phi)
    >>> print(state.inner_state.alpha)
    1.75

  Source:
    Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 5.
  """
  if operator.index(period) < 1:
    raise ValueError(f'period must be at least 1, got {period}.')
  if operator.index(warm_up) < 0:
    raise ValueError(f'warm_up must be at least 0, got {warm_up}.')
  names.check_choice('hold', hold, get_args(Hold))
  inner = optax.with_extra_args_support(inner)

  def init(params: Params) -> AdaptiveAlphaState:
    inner_state = inner.init(params)
    power = _only_power_state(inner_state)
    remap.check_form(power, hold)
    return AdaptiveAlphaState(
      jnp.zeros([], jnp.int32), controller.init(power.alpha), inner_state
    )

  def update(
    updates: Updates,
    state: AdaptiveAlphaState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, AdaptiveAlphaState]:
    trees.require_params(params, 'adaptive_alpha', latent=True)
    phi = params
    updates, inner_state = inner.update(
      updates, state.inner_state, phi, **extra_args
    )
    step = optax.safe_increment(state.step)
    if not jax.tree.leaves(phi):  # nothing to look at
      return updates, state._replace(step=step, inner_state=inner_state)
    elapsed = step - warm_up
    due = (elapsed > 0) & (elapsed % period == 0)
    updates, alpha, controller_state = _control_if(
      due, controller, hold, phi, updates, inner_state, state.controller_state
    )
    return updates, AdaptiveAlphaState(
      step, controller_state, remap.replace_alpha(inner_state, alpha)
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _control_if(
  due: jax.Array,
  controller: AlphaController,
  hold: Hold,
  phi: Params,
  updates: Updates,
  inner_state: OptState,
  controller_state: Tree,
) -> tuple[Updates, Alpha, Tree]:
  """The step, α and the controller's state after it saw θ, or as they are.

  A loop of at most one turn, not a condition, for the reasons that sparsify
  gives.
  """
  power = _only_power_state(inner_state)._replace(inner_state=None)
  sparse = topology_lib.find_sparse_state(inner_state)
  # Half-precision gradients give half-precision steps, too coarse for φ′ - φ.
  updates = jax.tree.map(
    lambda u, p: (
      u if u.dtype.itemsize > p.dtype.itemsize else u.astype(p.dtype)
    ),
    updates,
    phi,
  )
  outer = (phi, None if sparse is None else sparse.masks)

  def body(carry: Tree) -> Tree:
    # Or XLA computes at every step what the loop needs of its surroundings.
    carry, (phi, masks) = jax.lax.optimization_barrier((carry, outer))
    due, updates, alpha, controller_state = carry
    old = power._replace(alpha=alpha)
    stepped = optax.apply_updates(phi, updates)
    theta = powerprop_lib.to_theta(stepped, old)
    if masks is None:
      masks = masks_lib.full_masks(theta)
    else:
      theta = masks_lib.apply_masks(theta, masks)
    new_alpha, controller_state = controller.update(
      theta, masks, alpha, controller_state
    )
    new_alpha = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), new_alpha)
    if hold == 'theta':
      new = power._replace(alpha=new_alpha)
      moved = remap.remap(stepped, old, new)
      updates = jax.tree.map(
        lambda m, p, u: (m - p).astype(u.dtype), moved, phi, updates
      )
    return jnp.zeros_like(due), updates, new_alpha, controller_state

  _, updates, alpha, controller_state = jax.lax.while_loop(
    lambda carry: carry[0],
    body,
    (due, updates, power.alpha, controller_state),
  )
  return updates, alpha, controller_state


def _only_power_state(inner_state: OptState) -> PowerState:
  """The state of the one powerprop inside, with an α that can change."""
  found = trees.find_states(inner_state, PowerState)
  if len(found) != 1:
    raise ValueError(
      f'adaptive_alpha needs one powerprop inside, found {len(found)}. Write '
      'adaptive_alpha(powerprop(inner, jnp.float32(1.25)), controller, '
      'period=...).'
    )
  if trees.find_states(found[0].alpha, Static):
    raise ValueError(
      f'alpha was compiled in as a Python number, got {found[0].alpha}: every '
      'change would compile the program again. Give powerprop an array, for '
      'instance alpha=jnp.float32(1.25), or a tree of them.'
    )
  return found[0]
