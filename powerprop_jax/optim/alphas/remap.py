"""The same effective weights under another power.

    φ′ = φ |φ|^((α-α′)/α′)    gives    ψ(φ′, α′) = ψ(φ, α)

One power of φ and not two through θ: θ may be too small for float32 where φ is
not, and the smaller the change, the smaller the error; none for α′ = α.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from powerprop_jax.core import reparam, trees
from powerprop_jax.core.trees import Alpha, NamedLeaf, OptState, Params
from powerprop_jax.optim.powerprop import PowerState

# What stays where it is when α changes.
Hold = Literal['theta', 'phi']


def check_form(power: PowerState, hold: Hold) -> None:
  """Refuses to move φ under slots that live in φ-space."""
  if power.form.value == 'naive' and hold == 'theta':
    raise ValueError(
      "form='naive' keeps the optimiser's slots in φ-space, where they are "
      'wrong after φ has moved: a momentum would need the factor dφ′/dφ, which '
      "is infinite at 0 when α rises. Use form='recommended' (for plain SGD "
      "the two are equal), or hold='phi', which leaves φ where it is."
    )


def remap(phi: Params, old: PowerState, new: PowerState) -> Params:
  """The latent weights that have under a new power the θ of an old one.

  Zeros stay zero, and leaves that are not selected are the same arrays. Nothing
  moves where the two powers are equal; elsewhere the relative error of θ is
  below 2 eps (max(α, α′) + 1 + |log2 |θ||), the rounding of φ and of ψ itself.

  Example:
    >>> every = trees.Static(lambda *leaf: True)
    >>> old, new = (PowerState(trees.Static(a), None, every) for a in (1., 2.))
    >>> remap({'m': {'w': jnp.array([4., 0., -0.25])}}, old, new)['m']['w']
    Array([ 2. ,  0. , -0.5], dtype=float32)
  """
  olds, news = old.alphas(phi), new.alphas(phi)

  def visit(leaf: NamedLeaf) -> jax.Array:
    p: jax.Array = leaf.value
    if leaf.path not in olds:
      return p
    return _remap_leaf(p, olds[leaf.path], news[leaf.path])

  return trees.map_leaves(visit, phi)


def _remap_leaf(phi: jax.Array, alpha: Alpha, new_alpha: Alpha) -> jax.Array:
  x = reparam.widen(phi)
  exponent = jnp.asarray((alpha - new_alpha) / new_alpha, x.dtype)
  limits = jnp.finfo(x.dtype)
  # Guarded at the input: |0| to a negative power would be infinite.
  size = jnp.clip(jnp.abs(x), limits.tiny, limits.max)
  return (x * size**exponent).astype(phi.dtype)


def replace_alpha(opt_state: OptState, alpha: Alpha) -> OptState:
  """The optimiser state with another α in its powerprop, and all else as is."""
  return trees.replace_states(
    opt_state, PowerState, lambda s: s._replace(alpha=alpha)
  )
