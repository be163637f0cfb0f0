"""The same effective weights under another power.

    φ′ = φ |φ|^((α-α′)/α′)    gives    ψ(φ′, α′) = ψ(φ, α)

One power of φ and not two through θ: θ may be too small for float32 where φ is
not, and the smaller the change, the smaller the error; none for α′ = α.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from powerprop_jax.core import reparam, trees
from powerprop_jax.core.trees import Alpha, NamedLeaf, OptState, Params, Static
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim.powerprop import PowerState

# What stays where it is when α changes.
Hold = Literal['theta', 'phi']


def known_values(alpha: Alpha) -> dict[str, float]:
  """The powers that are not traced, by the paths of their leaves, '' for one.

  Example:
    >>> known_values({'m': {'w': jnp.float32(2)}})
    {'m/w': 2.0}
  """
  is_static = lambda node: isinstance(node, Static)
  number = lambda a: a.value if is_static(a) else a
  values = jax.tree.map(number, alpha, is_leaf=is_static)
  return {
    leaf.path: float(leaf.value)
    for leaf in trees.named_leaves(values)
    if not isinstance(leaf.value, jax.core.Tracer)
  }


def check_hold(hold: str) -> None:
  """Refuses anything but the two things that can be held."""
  if hold not in get_args(Hold):
    raise ValueError(f"hold must be 'theta' or 'phi', got {hold!r}.")


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
    >>> old = PowerState(Static(1.), None, Static(lambda *leaf: True))
    >>> new = PowerState(Static(2.), None, Static(lambda *leaf: True))
    >>> remap({'m': {'w': jnp.array([4., 0., -0.25])}}, old, new)['m']['w']
    Array([ 2. ,  0. , -0.5], dtype=float32)
  """
  old_alpha = powerprop_lib.alpha_lookup(old.alpha)
  new_alpha = powerprop_lib.alpha_lookup(new.alpha)

  def visit(leaf: NamedLeaf) -> jax.Array:
    p: jax.Array = leaf.value
    if not old.select.value(*leaf):
      return p
    return _remap_leaf(p, old_alpha(leaf.path), new_alpha(leaf.path))

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
