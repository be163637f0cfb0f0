"""The first value of a connection that did not exist before.

Without powerprop zero will do: the gradient moves it. Under α > 1 zero is a
critical point, ψ′(0) = 0, and a weight that starts there never moves.
"""

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import (
  Alpha,
  NamedLeaf,
  Params,
  Tree,
  Updates,
)
from powerprop_jax.optim import powerprop
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topology import Regrow, Topology


def resolve(
  regrow: Regrow | None, topology: Topology, power: PowerState | None
) -> Regrow:
  """What regrow=None means here; refuses 'zero' where α is not certainly 1."""
  if topology.regrow is not None:
    return topology.regrow
  is_powered = power is not None and not _is_certainly_one(power.alpha)
  if regrow is None:
    return 'keep' if is_powered else 'zero'
  if regrow == 'zero' and is_powered:
    raise ValueError(
      "regrow='zero' would start new connections at φ = 0, where "
      'powerpropagation with α > 1 gives them no gradient, so that they could '
      "never grow. Use regrow='keep', 'redraw' or 'smallest'."
    )
  return regrow


def _is_certainly_one(alpha: Tree) -> bool:
  """Whether θ = φ, as far as can be seen without looking at arrays."""
  return all(_is_one(a) for a in powerprop.alpha_by_path(alpha).values())


def _is_one(alpha: Alpha) -> bool:
  return isinstance(alpha, float) and alpha == 1


def scales(theta: Params) -> Tree:
  """Root mean square of each leaf, a tree of float32 scalars."""
  return jax.tree.map(
    lambda t: jnp.sqrt(jnp.mean(jnp.square(t.astype(jnp.float32)))), theta
  )


def redrawn(key: jax.Array, theta: Params, scale: Tree) -> Params:
  """Normal values in θ for every weight, with a scale from scales."""
  noise = optax.tree.random_like(key, theta, jax.random.normal)
  return jax.tree.map(
    lambda t, s, n: (s * n).astype(t.dtype), theta, scale, noise
  )


def smallest(theta: Params, grads: Updates, survivors: Masks) -> Params:
  """Values in θ of the size of the smallest survivor, down the gradient."""

  def visit(t: jax.Array, g: jax.Array, survives: jax.Array) -> jax.Array:
    least = _least(t, survives)
    # A leaf without a survivor has no smallest one: the old latent value stays.
    return jnp.where(jnp.isfinite(least), _descending(least, g, t.dtype), t)

  return jax.tree.map(visit, theta, grads, survivors)


def _least(x: jax.Array, among: jax.Array | bool) -> jax.Array:
  """The smallest magnitude that is not zero, float32; infinite without any."""
  size = jnp.abs(x.astype(jnp.float32))
  return jnp.min(size, where=among & (size > 0), initial=jnp.inf)


def _descending(
  size: jax.Array, grads: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Values of one size, with the sign that a step down the gradient has."""
  return jnp.where(grads > 0, -size, size).astype(dtype)


def powers_above_one(phi: Params, power: PowerState | None) -> dict[str, Alpha]:
  """The α of each leaf where zero may be a critical point, by 'module/name'.

  Of the leaves that powerprop selects, without those whose α is certainly 1.
  """
  if power is None:
    return {}
  alphas = power.alphas(phi)
  return {path: alpha for path, alpha in alphas.items() if not _is_one(alpha)}


def least_above_zero(
  phi: Params, survivors: Masks, powers: dict[str, Alpha]
) -> dict[str, jax.Array]:
  """The size at which a connection starts that would be dead at φ = 0.

  For each leaf of powers_above_one the smallest |φ| among its survivors, a
  float32 scalar; among all its weights where no survivor differs from zero; 0
  where α is 1, so that nothing is dead.
  """
  leaves, survives = trees.by_path(phi), trees.by_path(survivors)
  sizes = {}
  for path, alpha in powers.items():
    least = _least(leaves[path], survives[path])
    least = jnp.where(jnp.isfinite(least), least, _least(leaves[path], True))
    is_dead = (alpha > 1) & jnp.isfinite(least)
    sizes[path] = jnp.where(is_dead, least, 0)
  return sizes


def revived(
  delta: Updates, phi: Params, grads: Updates, least: dict[str, jax.Array]
) -> Updates:
  """The step on φ, which is 0 where φ = 0 and α > 1, away from zero there.

  least is as from least_above_zero, or 0 to leave the leaf as it is.
  """

  def visit(leaf: NamedLeaf, d: jax.Array, g: jax.Array) -> jax.Array:
    size = least.get(leaf.path)
    if size is None:
      return d
    # Every step pays for this, so it is one comparison: nothing equals a NaN.
    zero = jnp.where(size > 0, 0, jnp.nan).astype(leaf.value.dtype)
    return jnp.where(leaf.value == zero, _descending(size, g, d.dtype), d)

  return trees.map_leaves(visit, phi, delta, grads)
