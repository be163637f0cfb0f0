"""The cheap power against double precision, over the whole range of float32."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.core import powers

_EXPONENTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.3, 2.0, 3.7)
# Compiled in, and traced.
_BOTH = (*_EXPONENTS, *map(jnp.float32, _EXPONENTS))


class PowersTest(parameterized.TestCase):
  @parameterized.product(exponent=_BOTH)
  def test_agrees_with_double_precision(self, exponent):
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-125, 127, 20_000)).astype(np.float32)
    exact = x.astype(np.float64) ** np.float64(np.float32(exponent))
    inside = (exact > 2e-38) & (exact < 3e38)
    found = jax.jit(lambda x: powers.power(x, exponent))(x)
    error = np.abs(np.asarray(found, np.float64) - exact)[inside]
    # Rounding of log2(x), up to 127, is amplified by the exponent.
    self.assertLess((error / exact[inside]).max(), 3e-7 + 6e-6 * exponent)

  @parameterized.parameters(0.25, 0.7, 1.3)
  def test_weights_of_ordinary_size_lose_little(self, exponent):
    x = np.geomspace(1e-6, 10, 20_001).astype(np.float32)
    exact = x.astype(np.float64) ** np.float64(np.float32(exponent))
    found = powers.power(x, jnp.float32(exponent))
    np.testing.assert_allclose(found, exact, rtol=2e-6)

  @parameterized.product(exponent=_BOTH)
  def test_zero_infinity_and_nan(self, exponent):
    x = jnp.array([0.0, jnp.inf, jnp.nan])
    zero, infinity, nan = powers.power(x, exponent)
    self.assertEqual(zero, 1 if exponent == 0 else 0)
    self.assertGreaterEqual(infinity, 1)
    if exponent:
      self.assertTrue(jnp.isnan(nan))

  def test_exponents_zero_and_one_are_exact_enough_to_train_a_baseline(self):
    x = jnp.geomspace(1e-30, 1e30, 1001)
    np.testing.assert_array_equal(powers.power(x, jnp.float32(0)), 1)
    np.testing.assert_allclose(powers.power(x, jnp.float32(1)), x, rtol=1e-5)

  @parameterized.product(exponent=(*_BOTH, 0.3, jnp.float32(0.3)))
  @pytest.mark.slow
  def test_derivatives_of_every_order_are_those_of_the_formula(self, exponent):
    x = np.array([-3.0, -0.5, -1e-3, 1e-3, 0.3, 2.0], np.float32)
    wide, found = x.astype(np.float64), lambda x: powers.power(x, exponent)
    exponent = float(exponent)
    factor, sign = 1.0, 1.0
    for order in range(4):
      expected = factor * sign * np.abs(wide) ** (exponent - order)
      np.testing.assert_allclose(jax.vmap(found)(x), expected, rtol=3e-6)
      self.assertTrue(jnp.isfinite(found(jnp.float32(0))))
      factor, sign = factor * (exponent - order), sign * np.sign(wide)
      found = jax.grad(found)

  @parameterized.parameters(0.0, 0.5, 1.0, 1.3)
  def test_derivatives_in_the_exponent_multiply_by_the_logarithm(self, e):
    x = jnp.array([0.0, 0.2, 3.0])
    by_exponent = jax.jacfwd(lambda e: powers.power(x, e))
    log = np.log([0.2, 3.0])
    expected = np.append(0, np.exp(np.float32(e) * log) * log)
    np.testing.assert_allclose(by_exponent(jnp.float32(e)), expected, rtol=3e-6)
    np.testing.assert_allclose(
      jax.jacfwd(by_exponent)(jnp.float32(e)),
      expected * np.append(0, log),
      rtol=3e-6,
    )

  def test_a_negative_exponent_gives_0_at_0(self):
    x = jnp.array([0.0, -0.0, 4.0, jnp.nan])
    for e in (-0.5, jnp.float32(-0.5)):
      np.testing.assert_allclose(
        powers.power(x, e), [0, 0, 0.5, np.nan], rtol=1e-6
      )
