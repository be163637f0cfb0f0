"""x^e for x ≥ 0, cheap enough to sit in every training step.

A general power costs a CPU three times what reading and writing the array does.
An exponent that is known and a multiple of 1/4 needs only products and square
roots; any other, traced ones included, a polynomial logarithm and exponential
of base two in plain arithmetic, which every compiler vectorises.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core.trees import Tree

# log2(1 + f) = f · P(f) for 1 + f in [√½, √2), and 2^g = Q(g) for g in [-½, ½]:
# Chebyshev fits in double precision, lowest power first, with relative errors
# of 2e-8 and 2e-9, below the rounding of float32.
_LOG2 = (
  1.442695004,
  -0.7213473334,
  0.4809106099,
  -0.3607048281,
  0.2879183245,
  -0.2389203398,
  0.2156698591,
  -0.2074210351,
  0.126148466,
)
_EXP2 = (
  1,
  0.6931472067,
  0.2402265121,
  0.05550327214,
  0.009618025603,
  0.001340043217,
  0.0001546973198,
)
_SQRT_HALF_BITS = 0x3F3504F3
_MANTISSA_BITS = 23


def power(
  x: jax.Array, exponent: float | jax.Array, factor: float | jax.Array = 1
) -> jax.Array:
  """factor · |x|^exponent with 0^0 = 1, differentiable at every order.

  In x, and in an exponent and a factor that are arrays. At x = 0 a negative
  exponent gives 0 instead of infinity, and so a derivative that does not exist.

  Args:
    x: float32 or float64, any shape.
    exponent: a Python number is compiled in, a scalar array may be traced.
    factor: at least 0; a Python number if the exponent is one.

  Returns:
    Its relative error in float32 is about 1e-7 (1 + |exponent log2 x|), from
    the rounding of the logarithm; overflow may give the largest float instead
    of infinity.

  Example:
    >>> power(jnp.array([0., 4., 9.]), 1.5)
    Array([ 0.,  8., 27.], dtype=float32)
  """
  if is_number(exponent):
    return _static(x, float(exponent), float(factor), False)
  return _times(factor, _traced(x, jnp.asarray(exponent, x.dtype), False))


def log_size(x: jax.Array) -> jax.Array:
  """log|x|, and 0 at x = 0, to be multiplied by what is 0 there."""
  return jnp.log(jnp.where(x == 0, 1, jnp.abs(x)))


def is_number(value: Any) -> bool:
  """True for a Python number, which is compiled into the program."""
  return isinstance(value, numbers.Real)


def is_quarters(exponent: Any) -> bool:
  """Whether products and square roots are all that a power needs.

  Example:
    >>> is_quarters(0.75), is_quarters(0.8), is_quarters(jnp.float32(0.75))
    (True, False, False)
  """
  return is_number(exponent) and float(4 * exponent).is_integer()


# The logarithm and the exponential below work on bits, where differentiation
# finds 0, so powers have rules of their own. The derivatives of even powers are
# odd ones, sign(x) |x|^e, and the other way round. Numbers and arrays have a
# function each: a rule turns every differentiable argument into an array, and
# would forget that the exponent is known.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _static(
  x: jax.Array, exponent: float, factor: float, is_odd: bool
) -> jax.Array:
  """factor · |x|^exponent, times sign(x) if it is odd."""
  size = jnp.abs(x)
  if factor == 0:
    raised = jnp.zeros_like(x)  # not 0 · ∞
  elif not is_quarters(exponent):
    raised = _times(factor, _general(size, jnp.asarray(exponent, x.dtype)))
  elif factor != 1 and exponent > 0 and exponent % 1:
    # The factor goes under the root, so that nothing but x is shared with other
    # powers of it. What is, XLA makes an array of, for the loops of both to
    # read.
    scaled = jnp.abs(x * factor ** (1 / (exponent % 1)))
    raised = _quarters(size, exponent // 1) * _quarters(scaled, exponent % 1)
  else:
    raised = _times(factor, _quarters(size, exponent))
  return jnp.sign(x) * raised if is_odd else raised


@_static.defjvp
def _static_jvp(
  exponent: float, factor: float, is_odd: bool, primals: Tree, tangents: Tree
) -> Tree:
  (x,), (dx,) = primals, tangents
  slope = _static(x, exponent - 1, factor * exponent, not is_odd)
  return _static(x, exponent, factor, is_odd), slope * dx


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _traced(x: jax.Array, exponent: jax.Array, is_odd: bool) -> jax.Array:
  """|x|^exponent, times sign(x) if it is odd."""
  raised = _general(jnp.abs(x), exponent)
  return jnp.sign(x) * raised if is_odd else raised


@_traced.defjvp
def _traced_jvp(is_odd: bool, primals: Tree, tangents: Tree) -> Tree:
  (x, exponent), (dx, dexponent) = primals, tangents
  raised = _traced(x, exponent, is_odd)
  slope = exponent * _traced(x, exponent - 1, not is_odd)
  return raised, slope * dx + raised * log_size(x) * dexponent


def _general(x: jax.Array, exponent: jax.Array) -> jax.Array:
  """x^exponent for x ≥ 0 by logarithm and exponential."""
  # Guarded at the input: the logarithm of 0 or ∞, times an exponent of 0, would
  # be NaN.
  if x.dtype == jnp.float32:
    raised = _exp2(exponent * _log2(_normal(x)))
  else:
    raised = jnp.exp(exponent * jnp.log(_normal(x)))
  at_zero = jnp.where(exponent == 0, jnp.ones_like(exponent), 0)
  return jnp.where(x > 0, raised, at_zero + x)  # a NaN stays one


def _normal(x: jax.Array) -> jax.Array:
  return jnp.clip(x, jnp.finfo(x.dtype).tiny, jnp.finfo(x.dtype).max)


def _times(factor: float | jax.Array, x: jax.Array) -> jax.Array:
  return x if is_number(factor) and factor == 1 else factor * x


def _quarters(x: jax.Array, exponent: float) -> jax.Array:
  """x^exponent for x ≥ 0 by products and square roots."""
  if exponent < 0:
    inverse = 1 / _quarters(_normal(x), -exponent)
    return jnp.where(x > 0, inverse, x)
  whole, rest = divmod(int(4 * exponent), 4)
  factors = [jax.lax.integer_pow(x, whole)] if whole else []
  if rest:
    root = jnp.sqrt(x)
    factors += [root] if rest & 2 else []
    factors += [jnp.sqrt(root)] if rest & 1 else []
  return (
    functools.reduce(jnp.multiply, factors) if factors else jnp.ones_like(x)
  )


def _log2(x: jax.Array) -> jax.Array:
  """Logarithm of normal positive float32 numbers."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  octave = jax.lax.shift_right_arithmetic(
    bits - _SQRT_HALF_BITS, jnp.int32(_MANTISSA_BITS)
  )
  mantissa = jax.lax.bitcast_convert_type(
    bits - jax.lax.shift_left(octave, jnp.int32(_MANTISSA_BITS)), jnp.float32
  )
  fraction = mantissa - 1
  return octave.astype(jnp.float32) + fraction * _polynomial(_LOG2, fraction)


def _exp2(y: jax.Array) -> jax.Array:
  """Two to the power of float32 numbers, kept within the normal range."""
  y = jnp.clip(y, -126.0, 127.9)
  octave = jnp.round(y)
  mantissa = jax.lax.bitcast_convert_type(
    _polynomial(_EXP2, y - octave), jnp.int32
  )
  scaled = mantissa + jax.lax.shift_left(
    octave.astype(jnp.int32), jnp.int32(_MANTISSA_BITS)
  )
  return jax.lax.bitcast_convert_type(scaled, jnp.float32)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
  """Value of a polynomial by Estrin's scheme: short chains, more at once."""
  terms: list[Any] = [jnp.float32(c) for c in coefficients]
  for _ in range(math.ceil(math.log2(len(terms)))):
    pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
    terms = [p[0] + p[1] * x if len(p) == 2 else p[0] for p in pairs]
    x = x * x
  return terms[0]
