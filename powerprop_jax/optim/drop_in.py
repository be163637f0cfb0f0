"""Sparse training in a loop that somebody else owns: θ outside, φ in the state.

    params = θ⊙M ──▶ network ──▶ g = ∂L/∂(θ⊙M)
       ▲                              │
       └── θ_new⊙M_new − params ◀── drop_in.update ─ φ ─ tx.update ─ φ_new

A loop such as Flax's TrainState or nnx.Optimizer hands its parameters to the
network as they are, so they must be the effective ones. Here they are, and
what the transformation works on is kept in its state. It costs one more copy of
the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Params, Updates
from powerprop_jax.optim import topology, views
from powerprop_jax.optim.topology import DropInState

# What the sum of parameters and update may be off by, as a part of the largest
# entry of a leaf, in roundings of its dtype.
_ROUNDINGS = 8


def drop_in(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Lets a loop hold the effective weights θ⊙M where tx works on φ.

  `update(grads, state, params)` takes params = θ⊙M and returns what takes them
  to the next θ⊙M: zeros are exactly zero, and evaluation, averages,
  checkpoints and export see what the network computes with. Wrap the whole
  optimiser: what stands around drop_in must not change its updates.

      tx = pp.drop_in(pp.rigl(pp.powerprop(optax.adam(1e-3), 2.0), 0.9))

  The first forward pass sees the weights as they are; for the masked start, put
  sparse_start(tx, params) in their place once the optimiser is built on them.

  θ and φ are kept together by comparing them at every update. Where they are
  the same but for rounding, φ is what counts. Where somebody else has changed
  the parameters (weights loaded or averaged, updates scaled outside), the new
  value is adopted, φ = ψ⁻¹(params); weights without a connection stay zero.
  The state counts the updates at which that happened, and check_returned
  makes an error of it.

  Args:
    tx: any transformation with powerprop or sparsify in it; others work, too.

  Example:
    >>> tx = drop_in(pp.powerprop(optax.sgd(0.25), alpha=2.))
    >>> params = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = tx.update(grads, state, params)
    >>> optax.apply_updates(params, updates)['linear']['w']
    Array([[ 1.    , -0.5625]], dtype=float32)
  """
  tx = optax.with_extra_args_support(tx)

  def init(params: Params) -> DropInState:
    phi, inner_state = views.init(tx, params)
    topology.refuse_drop_in(inner_state, 'drop_in')
    counts = jnp.array(False), jnp.zeros([], jnp.int32)
    return DropInState(phi, *counts, inner_state)

  def update(
    updates: Updates,
    state: DropInState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, DropInState]:
    trees.require_params(params, 'drop_in')
    phi, changed = _adopted(params, state)
    updates, inner_state = tx.update(
      updates, state.inner_state, phi, **extra_args
    )
    phi = optax.apply_updates(phi, updates)
    theta = views.effective_params(phi, inner_state)
    updates = jax.tree.map(jnp.subtract, theta, params)
    adopted = state.adopted + changed.astype(jnp.int32)
    return updates, DropInState(phi, jnp.array(True), adopted, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def sparse_start(tx: optax.GradientTransformation, params: Params) -> Params:
  """The weights that the first masks leave: what a loop may begin with.

  Build the optimiser first, on the dense weights: what it knows of weights
  behind the masks, and of the scale of all, is what init saw.

  Example:
    >>> params = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> masks = {'linear': {'w': jnp.array([[True, False]])}}
    >>> tx = drop_in(pp.static(optax.sgd(0.1), masks=masks))
    >>> sparse_start(tx, params)['linear']['w']
    Array([[4., 0.]], dtype=float32)
  """
  return views.init(tx, params)[0]


def check_returned(opt_state: OptState) -> None:
  """Refuses a state whose parameters were changed by somebody else; not in jit.

  Where that is meant, such as weights loaded in the middle, do not ask.

  Raises:
    ValueError: if there was an update that found other parameters than the one
      before it had left.
  """
  state = topology.find_drop_in_state(opt_state)
  if state is None:
    raise ValueError('check_returned found no drop_in in the optimiser state.')
  if count := int(state.adopted):
    raise ValueError(
      f'{count:,} updates found other parameters than drop_in had left: '
      'something scales its updates, averages or replaces the weights. They '
      'were adopted, and weights without a connection set back to zero. What '
      'changes updates goes inside: drop_in(sparsify(chain(...), topology)).'
    )


def _adopted(params: Params, state: DropInState) -> tuple[Params, jax.Array]:
  """φ as the parameters have it, and whether they were changed by others."""
  given = views.effective_params(state.phi, state.inner_state)
  masks = views.current_masks(state.phi, state.inner_state)
  latent = views.latent_params(params, state.inner_state)

  def is_other(p: jax.Array, t: jax.Array) -> jax.Array:
    largest = jnp.maximum(jnp.max(jnp.abs(p)), jnp.max(jnp.abs(t)))
    near = _ROUNDINGS * jnp.finfo(p.dtype).eps * largest
    return ~(jnp.abs(p - t) <= near)  # NaN is another value as well

  other = jax.tree.map(is_other, params, given)
  phi = jax.tree.map(
    lambda o, m, new, old: jnp.where(o & m, new, old),
    other,
    masks,
    latent,
    state.phi,
  )
  # Before the first update, weights without a connection may be what they were.
  seen = jax.tree.map(lambda o, m: o & (m | state.started), other, masks)
  some = [jnp.any(leaf) for leaf in jax.tree.leaves(seen)]
  return phi, jnp.any(jnp.stack(some)) if some else jnp.array(False)
