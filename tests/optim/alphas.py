"""Facts about a changing α, and transformations that change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.core import trees

# Readings, α at the start, and α after each reading.
VECTORS = (
  (
    (0.50, 0.60, 0.70, 0.65, 0.66, 0.70, 0.71, 0.69, 0.69),
    1.5,
    (1.75, 2.125, 2.6875, 2.125, 2.225, 2.325, 2.425, 1.95, 2.05),
  ),
  ((0.5, 0.4, 0.3, 0.2), 2.0, (2.5, 2.0, 5 / 3, 13 / 9)),
  ((0.5, 0.6, 0.7), 1.0, (1.0, 1.0, 1.0)),
)


def theta_bound(theta, old, new):
  """How far θ may move when its φ is remapped, in double precision.

  2 eps (max(α, α′) + 1 + |log2 |θ||) |θ|: a relative rounding of φ counts α
  times, and powers.power is exact to 1e-7 (1 + |log2 |θ||) before and after.
  """
  theta = np.abs(np.asarray(theta, np.float64))
  log = np.abs(np.log2(np.where(theta == 0, 1, theta)))
  eps = float(jnp.finfo(jnp.float32).eps)
  return 2 * eps * (max(old, new) + 1 + log) * theta


def set_alpha(*powers):
  """A controller that goes through given powers, one after the other."""
  listed = jnp.array(powers, jnp.float32)

  def update(theta, masks, alpha, step):
    del theta, masks
    return jax.tree.map(lambda _: listed[step], alpha), step + 1

  return pp.AlphaController(lambda alpha: jnp.zeros([], jnp.int32), update)


def always(alpha):
  """A controller that says the same power whenever it is asked."""
  return set_alpha(*[alpha] * 9)


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
