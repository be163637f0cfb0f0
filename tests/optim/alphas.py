"""Facts about a changing α, and transformations that change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.core import trees


def theta_bound(theta, old, new):
  """How far θ may move when its φ is remapped, in double precision.

  2 eps (max(α, α′) + 1 + |log2 |θ||) |θ|: a relative rounding of φ counts α
  times, and powers.power is exact to 1e-7 (1 + |log2 |θ||) before and after.
  """
  theta = np.abs(np.asarray(theta, np.float64))
  log = np.abs(np.log2(np.where(theta == 0, 1, theta)))
  eps = float(jnp.finfo(jnp.float32).eps)
  return 2 * eps * (max(old, new) + 1 + log) * theta


def always(alpha):
  """A controller that says the same power whenever it is asked."""
  update = lambda theta, masks, old, state: (
    jax.tree.map(lambda _: jnp.float32(alpha), old),
    state,
  )
  return pp.AlphaController(lambda alpha: (), update)


def power(alpha=1.5, inner=None, **kwargs):
  inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
  return pp.powerprop(inner, jnp.float32(alpha), **kwargs)


def alpha_of(opt_state):
  found = trees.find_states(opt_state, pp.PowerState)
  return found[0].alpha


def still(tx):
  """A step with gradients of zero."""

  @jax.jit
  def still_step(phi, opt_state):
    zeros = jax.tree.map(jnp.zeros_like, phi)
    updates, opt_state = tx.update(zeros, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  return still_step


def assert_theta_stays(before, after, old, new):
  """To the rounding of a step added to φ, as adaptive_alpha promises."""
  for name in ('m', 'n'):
    a, b = (np.asarray(x[name]['w'], np.float64) for x in (before, after))
    size = np.where(a == 0, 1.0, np.abs(a))
    fall = np.maximum(1, size ** (1 / old - 1 / new))
    assert np.all(np.abs(b - a) <= theta_bound(a, old, new) * fall)
