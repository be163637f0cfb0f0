"""The power map ψ between latent and effective weights, its inverse and slope.

θ = ψ(φ) = φ |φ|^(α-1). All three functions map an array or a tree of arrays to
the same structure, shapes and dtypes, and work in float32 (float64 when given
float64), whatever the dtype. α is a scalar of at least 1, or a tree of scalars
with the structure of the weights. Anything else that is known when it is called
is refused with a ValueError, and complex or integer weights with a TypeError.

Automatic differentiation of the formula gives NaN at φ = 0 for α < 2, so ψ
carries its own derivative rule: 0 at φ = 0 for α > 1, and 1 everywhere for
α = 1. Higher derivatives are those of the formula as well, in φ and in an array
α; where they do not exist at φ = 0, as the second for 1 < α < 2, which goes to
∞ on one side and to -∞ on the other, those in φ are 0, and those in α finite.

A Python number α is part of the program, and multiples of 1/4 then need only
products and square roots; an array α may be traced, and costs about an
exponential and a logarithm (see core/powers).
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp

from powerprop_jax.core import powers, trees
from powerprop_jax.core.trees import Params, Tree

Alpha = float | jax.Array

# The largest α that float32 inverts to 1e-5: the largest relative error of
# ψ(ψ⁻¹(θ)) in 200,001 values of |θ| from 1e-30 to 1e3 is 5e-6 for α = 4, 9.7e-6
# for 64, 1.2e-5 for 96 and 6e-5 for 1024. The rounding of |θ|^(1/α) counts α
# times.
MAX_ALPHA = 64.0


def psi(phi: Params, alpha: Tree) -> Params:
  """Effective weights of latent ones, θ = φ |φ|^(α-1).

  Small weights become smaller, and receive smaller gradients, as α grows; α = 1
  is the identity. Differentiable at every order, in φ and in an array α.

  Example:
    >>> psi(jnp.array([-2., 0., 0.5]), 2.)
    Array([-4.  ,  0.  ,  0.25], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, section 2
    (https://arxiv.org/abs/2110.00296).
  """
  return _map_with_alpha(_psi, phi, alpha)


def psi_inverse(theta: Params, alpha: Tree) -> Params:
  """Latent weights that ψ maps to theta, φ = sign(θ) |θ|^(1/α).

  Not meant to be differentiated: its slope at θ = 0 is infinite for α > 1.

  Example:
    >>> psi_inverse(jnp.array([-4., 0., 0.25]), 2.)
    Array([-2. ,  0. ,  0.5], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, section 2; the authors' notebook
    initialises with it, so that the network at step 0 is the same for every α.
  """
  return _map_with_alpha(_psi_inverse, theta, alpha)


def psi_derivative(phi: Params, alpha: Tree) -> Params:
  """Slope of ψ, dψ/dφ = α |φ|^(α-1), never negative.

  At φ = 0 it is 0 for α > 1 and 1 for α = 1.

  Example:
    >>> psi_derivative(jnp.array([-2., 0., 0.5]), 2.)
    Array([4., 0., 1.], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, section 2.
  """
  return _map_with_alpha(_psi_derivative, phi, alpha)


def check_alpha(alpha: Alpha, name: str = 'alpha') -> None:
  """Refuses a power that is not a finite number of at least 1, by its name.

  Traced values cannot be looked at and pass.

  Example:
    >>> check_alpha(0.5)
    Traceback (most recent call last):
      ...
    ValueError: alpha must be a finite number of at least 1, got 0.5.
  """
  if jnp.ndim(alpha) != 0:
    raise ValueError(
      f'{name} must be a scalar, got an array of shape {jnp.shape(alpha)}. '
      'For one power per leaf, pass a tree of scalars.'
    )
  if trees.is_traced(alpha):
    return
  value = float(alpha)
  if not (math.isfinite(value) and value >= 1):
    raise ValueError(
      f'{name} must be a finite number of at least 1, got {value:g}.'
    )


def check_invertible(alpha: Alpha, name: str = 'alpha') -> None:
  """Refuses a power above MAX_ALPHA, which float32 does not invert.

  Traced values cannot be looked at and pass.

  Example:
    >>> check_invertible(100.)
    Traceback (most recent call last):
      ...
    ValueError: alpha must be at most 64, got 100: with a larger power float32
    does not find its way from θ to φ and back.
  """
  if trees.is_traced(alpha):
    return
  if float(alpha) > MAX_ALPHA:
    raise ValueError(
      f'{name} must be at most {MAX_ALPHA:g}, got {float(alpha):g}: with a '
      'larger power float32 does not find its way from θ to φ and back.'
    )


def widen(x: jax.Array) -> jax.Array:
  """The values in the dtype that ψ computes in: float32, or float64."""
  _check_floating(x)
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _map_with_alpha(
  fn: Callable[[jax.Array, Alpha], jax.Array], tree: Tree, alpha: Tree
) -> Tree:
  def of_leaf(x: jax.typing.ArrayLike, alpha: Alpha) -> jax.Array:
    x = jnp.asarray(x)
    _check_floating(x)
    return fn(x, alpha)

  if jax.tree_util.all_leaves([alpha]):
    check_alpha(alpha)
    return jax.tree.map(lambda x: of_leaf(x, alpha), tree)
  jax.tree.map(check_alpha, alpha)
  return jax.tree.map(of_leaf, tree, alpha)


def _check_floating(x: jax.Array) -> None:
  """Refuses what ψ would lose: an imaginary part, the fraction of a power."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'ψ takes floating-point weights, got {x.dtype.name}. Convert them to '
      'float32 (of complex ones, the real and the imaginary part), or leave '
      'them out with select.'
    )


def _psi(phi: jax.Array, alpha: Alpha) -> jax.Array:
  if powers.is_number(alpha):
    if alpha == 1:
      return phi
    return _psi_static(phi, float(alpha))
  alpha = jnp.asarray(alpha)
  if not jnp.issubdtype(alpha.dtype, jnp.floating):
    alpha = alpha.astype(jnp.float32)  # an integer would have no tangent
  return _psi_traced(phi, alpha)


# Two functions, not one with an optional fast path: the derivative rule of a
# custom_jvp function turns every differentiable argument into an array, and
# would forget that α is known.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _psi_static(phi: jax.Array, alpha: float) -> jax.Array:
  x = widen(phi)
  return (x * powers.power(x, alpha - 1)).astype(phi.dtype)


@_psi_static.defjvp
def _psi_static_jvp(alpha: float, primals: Tree, tangents: Tree) -> Tree:
  (phi,), (dphi,) = primals, tangents
  return _psi_static(phi, alpha), _psi_derivative(phi, alpha) * dphi


@jax.custom_jvp
def _psi_traced(phi: jax.Array, alpha: jax.Array) -> jax.Array:
  x = widen(phi)
  return (x * powers.power(x, alpha - 1)).astype(phi.dtype)


@_psi_traced.defjvp
def _psi_traced_jvp(primals: Tree, tangents: Tree) -> Tree:
  (phi, alpha), (dphi, dalpha) = primals, tangents
  theta = _psi_traced(phi, alpha)
  dtheta = _psi_derivative(phi, alpha) * dphi
  by_alpha = theta * powers.log_size(phi)
  return theta, dtheta + by_alpha * dalpha.astype(phi.dtype)


def _psi_inverse(theta: jax.Array, alpha: Alpha) -> jax.Array:
  x = widen(theta)
  if powers.is_number(alpha) and alpha in (1, 2, 4):
    root = powers.power(x, 1 / float(alpha))
  else:
    root = jnp.abs(x) ** jnp.asarray(1 / alpha, x.dtype)
  return (jnp.sign(x) * root).astype(theta.dtype)


def _psi_derivative(phi: jax.Array, alpha: Alpha) -> jax.Array:
  x = widen(phi)
  if not powers.is_number(alpha):
    alpha = jnp.asarray(alpha, x.dtype)
  return powers.power(x, alpha - 1, factor=alpha).astype(phi.dtype)
