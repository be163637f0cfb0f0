"""The first value of a connection that did not exist before.

Without powerprop zero will do: the gradient moves it. Under α > 1 zero is a
critical point, ψ′(0) = 0, and a weight that starts there never moves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.optim.powerprop import PowerState, Static
from powerprop_jax.optim.topology import Regrow, Topology


def resolve(
  regrow: Regrow | None, topology: Topology, inner_state: Any
) -> Regrow:
  """What regrow=None means here; refuses 'zero' where weights would be dead.

  Args:
    regrow: what the user asked for.
    topology: the topology, which may prescribe a value.
    inner_state: state of the optimiser inside sparsify.

  Returns:
    The rule to follow.

  Raises:
    ValueError: if regrow is 'zero', and α is not certainly 1.
  """
  if topology.regrow is not None:
    return topology.regrow
  is_powered = not _is_certainly_one(inner_state)
  if regrow is None:
    return 'keep' if is_powered else 'zero'
  if regrow == 'zero' and is_powered:
    raise ValueError(
      "regrow='zero' would start new connections at φ = 0, where "
      'powerpropagation with α > 1 gives them no gradient, so that they could '
      "never grow. Use regrow='keep', 'redraw' or 'smallest'."
    )
  return regrow


def _is_certainly_one(inner_state: Any) -> bool:
  """Whether θ = φ, as far as can be seen without looking at arrays."""
  powers = trees.find_states(inner_state, PowerState)
  alphas = [
    alpha
    for state in powers
    for alpha in jax.tree.leaves(
      state.alpha, is_leaf=lambda node: isinstance(node, Static)
    )
  ]
  return all(isinstance(a, Static) and a.value == 1 for a in alphas)


def scales(theta: Any) -> Any:
  """Root mean square of each leaf, a tree of float32 scalars."""
  return jax.tree.map(
    lambda t: jnp.sqrt(jnp.mean(jnp.square(t.astype(jnp.float32)))), theta
  )


def values(
  regrow: Regrow,
  key: jax.Array,
  theta: Any,
  grads: Any,
  scale: Any,
  before: Masks,
  after: Masks,
) -> Any:
  """Values in θ for every weight, of which only reborn ones will be used.

  Args:
    regrow: 'redraw' or 'smallest'.
    key: PRNG key.
    theta: effective parameters, dense.
    grads: their dense gradients.
    scale: as from scales; only for 'redraw'.
    before: weights that were trained until now.
    after: weights that will be trained.

  Returns:
    A tree like theta.
  """
  if regrow == 'redraw':
    noise = optax.tree.random_like(key, theta, jax.random.normal)
    return jax.tree.map(
      lambda t, s, n: (s * n).astype(t.dtype), theta, scale, noise
    )

  def smallest(t: Any, g: Any, old: Any, new: Any) -> Any:
    size = jnp.abs(t.astype(jnp.float32))
    least = jnp.min(size, where=old & new & (size > 0), initial=jnp.inf)
    value = jnp.where(g > 0, -least, least).astype(t.dtype)
    # A leaf without a survivor has no smallest one: the old latent value stays.
    return jnp.where(jnp.isfinite(least), value, t)

  return jax.tree.map(smallest, theta, grads, before, after)
