"""ψ, its inverse and its derivative: the facts, at the extremes too."""

import itertools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.core import reparam

ALPHAS = (1.0, 1.25, 1.3, 1.5, 2.0, 2.75, 3.0, 4.0, 5.0)
NARROW = (jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
# Compiled in, and traced.
POWERS = (*ALPHAS, *map(jnp.float32, ALPHAS))


def exact_slope(phi, alpha):
  return alpha * np.abs(phi) ** (alpha - 1)


class PsiTest(parameterized.TestCase):
  @parameterized.product(power=POWERS, jit=(True, False))
  def test_inverse_undoes_psi(self, power, jit):
    theta = jnp.linspace(-2.0, 2.0, 41)
    there = lambda x: reparam.psi_inverse(x, power)
    back = lambda x: reparam.psi(x, power)
    if jit:
      there, back = jax.jit(there), jax.jit(back)
    np.testing.assert_allclose(back(there(theta)), theta, rtol=2e-6, atol=1e-12)

  @parameterized.product(power=POWERS)
  def test_formulas_in_double_precision_and_autodiff(self, power):
    phi = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    wide, alpha = phi.astype(np.float64), float(power)
    theta, slope = wide * np.abs(wide) ** (alpha - 1), exact_slope(wide, alpha)
    np.testing.assert_allclose(reparam.psi(phi, power), theta, rtol=3e-6)
    found = reparam.psi_derivative(phi, power)
    np.testing.assert_allclose(found, slope, rtol=3e-6)
    grads = jax.vmap(jax.grad(lambda x: reparam.psi(x, power)))(phi)
    np.testing.assert_allclose(grads, found)

  @parameterized.product(power=POWERS, zero=(0.0, -0.0))
  def test_gradient_at_zero_is_finite(self, power, zero):
    phi = jnp.float32(zero)
    value, slope = jax.jit(jax.value_and_grad(reparam.psi))(phi, power)
    self.assertEqual(value, 0)
    self.assertEqual(slope, 1 if power == 1 else 0)
    self.assertEqual(reparam.psi_derivative(phi, power), slope)

  def test_alpha_one_is_the_identity(self):
    phi = jnp.array([-3e38, -1.0, -1e-37, -0.0, 0.0, 1e-30, 7.0, 3e38])
    for alpha in (1.0, 1, jnp.float32(1)):
      np.testing.assert_array_equal(reparam.psi(phi, alpha), phi)
      np.testing.assert_array_equal(
        reparam.psi_derivative(phi, alpha), jnp.ones(8)
      )

  @parameterized.parameters(1.5, 4.0, 8.0, 1.3)
  def test_keeps_sign_and_order(self, alpha):
    theta = reparam.psi(jnp.arange(-300, 301) / 100, alpha)
    self.assertTrue(jnp.all(jnp.diff(theta) > 0))
    np.testing.assert_array_equal(theta, -theta[::-1])

  @parameterized.parameters(1.0, 1.25, 2.0, 1.3)
  def test_extremes_are_not_nan(self, alpha):
    phi = jnp.array([-jnp.inf, -1e38, -1e-45, 1e-45, 1e38, jnp.inf])
    for power in (alpha, jnp.float32(alpha)):
      self.assertFalse(jnp.any(jnp.isnan(reparam.psi(phi, power))))
      self.assertFalse(jnp.any(jnp.isnan(reparam.psi_inverse(phi, power))))

  @parameterized.product(dtype=NARROW, alpha=(1.5, 2.0, 3.0))
  def test_half_precision_computes_in_float32(self, dtype, alpha):
    phi = jnp.linspace(-2, 2, 33).astype(dtype)
    for power in (alpha, jnp.float32(alpha)):
      for fn in (reparam.psi, reparam.psi_inverse, reparam.psi_derivative):
        found, wide = fn(phi, power), fn(phi.astype(jnp.float32), power)
        self.assertEqual(found.dtype, dtype)
        np.testing.assert_array_equal(found, wide.astype(dtype))
      slope = jax.grad(lambda x, p=power: reparam.psi(x, p).sum())(phi)
      self.assertEqual(slope.dtype, dtype)

  def test_maps_trees_with_one_alpha_or_one_for_each_leaf(self):
    phi = {'a': jnp.float32(2), 'b': jnp.float32(3)}
    self.assertEqual(reparam.psi(phi, 2.0), {'a': 4, 'b': 9})
    self.assertEqual(reparam.psi(phi, {'a': 1.0, 'b': 2.0}), {'a': 2, 'b': 9})

  @parameterized.parameters(1.25, 1.5, 1.75, 2.0, 3.0, 4.25)
  def test_multiples_of_a_quarter_call_no_power_exp_or_log(self, alpha):
    for fn in (reparam.psi, reparam.psi_derivative):
      jaxpr = str(jax.make_jaxpr(lambda x, fn=fn: fn(x, alpha))(jnp.ones(3)))
      for costly in (' pow', ' exp', ' log'):
        self.assertNotIn(f'{costly} ', jaxpr)
        self.assertNotIn(f'{costly}[', jaxpr)

  def test_traced_alpha_calls_no_general_power_and_compiles_once(self):
    jaxpr = str(jax.make_jaxpr(reparam.psi)(jnp.ones(3), jnp.float32(2)))
    self.assertNotIn(' pow ', jaxpr)
    fn = jax.jit(chex.assert_max_traces(reparam.psi, n=1))
    for alpha in (1.0, 1.5, 3.0):
      fn(jnp.ones(3), jnp.float32(alpha))

  @parameterized.parameters(0.99, 0.0, -1.0, float('nan'), float('inf'))
  def test_refuses_bad_alpha(self, alpha):
    for power in (alpha, jnp.float32(alpha), np.float32(alpha)):
      with self.assertRaisesRegex(ValueError, 'alpha must be a finite number'):
        reparam.psi(jnp.ones(2), power)
    with self.assertRaisesRegex(ValueError, r'shape \(2,\)'):
      reparam.psi(jnp.ones(2), jnp.array([alpha, 2.0]))

  @parameterized.parameters(
    jnp.complex64, jnp.int32, jnp.uint8, jnp.int4, jnp.bool_
  )
  def test_refuses_weights_whose_powers_it_would_cut_short(self, dtype):
    x = jnp.ones(2, dtype)
    name = jnp.dtype(dtype).name
    for fn in (reparam.psi, reparam.psi_inverse, reparam.psi_derivative):
      for alpha in (1.0, 2.0, jnp.float32(2)):
        with self.assertRaisesRegex(TypeError, f'got {name}. Convert them to'):
          fn({'w': x}, alpha)
    with self.assertRaisesRegex(TypeError, f'got {name}'):
      reparam.widen(x)
    self.assertEqual(reparam.psi([0.5], 2.0)[0], 0.25)
    with self.assertRaisesRegex(TypeError, 'floating-point weights, got'):
      reparam.psi([x[0].item()], 2.0)  # a Python number


class HigherDerivativesTest(parameterized.TestCase):
  """Against differences in double precision of ψ′ = α |φ|^(α-1)."""

  PHI = np.array([-2.0, -0.5, -0.1, 0.05, 0.3, 1.7], np.float32)
  ALPHAS = (1.0, 1.1, 1.25, 1.3, 1.5, 2.0, 2.5, 3.3)
  POWERS = (*ALPHAS, *map(jnp.float32, ALPHAS))

  @parameterized.product(power=POWERS, jit=(True, False))
  @pytest.mark.slow
  def test_second_and_third_agree_with_differences(self, power, jit):
    alpha = float(power)
    psi = lambda x: reparam.psi(x, power)
    slope = jax.grad(psi)
    second = {
      'grad of grad': jax.grad(slope),
      'jvp of grad': lambda x: jax.jvp(slope, (x,), (jnp.ones_like(x),))[1],
      'grad of jvp': jax.grad(jax.jacfwd(psi)),
      'psi_derivative': jax.grad(lambda x: reparam.psi_derivative(x, power)),
    }
    third = jax.grad(second['grad of grad'])
    both = jax.vmap(lambda x: ({k: f(x) for k, f in second.items()}, third(x)))
    found, found_third = (jax.jit(both) if jit else both)(self.PHI)

    wide, h = self.PHI.astype(np.float64), 1e-5
    ahead, behind = exact_slope(wide + h, alpha), exact_slope(wide - h, alpha)
    expected = (ahead - behind) / (2 * h)
    for name, value in found.items():
      np.testing.assert_allclose(
        value, expected, rtol=1e-5, atol=1e-6, err_msg=name
      )
    expected = (ahead - 2 * exact_slope(wide, alpha) + behind) / h**2
    np.testing.assert_allclose(found_third, expected, rtol=1e-3, atol=1e-4)

  @parameterized.product(power=POWERS)
  @pytest.mark.slow
  def test_at_zero_the_second_is_the_mean_of_both_sides(self, power):
    zeros, found = jnp.array([0.0, -0.0]), lambda x: reparam.psi(x, power)
    for order in (1, 2, 3, 4):
      found = jax.grad(found)
      expected = 1 if order == power == 1 else 0
      np.testing.assert_array_equal(jax.jit(jax.vmap(found))(zeros), expected)

  @parameterized.product(power=(3.0, jnp.float32(3)))
  def test_the_third_of_a_cube_is_6_at_zero_too(self, power):
    third = jax.grad(jax.grad(jax.grad(reparam.psi)))
    for phi in (-1.0, 0.0, 0.5):
      np.testing.assert_allclose(third(jnp.float32(phi), power), 6, rtol=1e-6)

  @parameterized.product(
    alpha=(1.1, 2.0, 3.3), jit=(True, False), names=('a', 'aa', 'pa', 'ppa')
  )
  @pytest.mark.slow
  def test_derivatives_in_alpha_are_right_in_every_order(
    self, alpha, jit, names
  ):
    """Such as d²ψ/dα² for aa, however the derivatives are nested."""
    alpha = np.float32(alpha)
    phi = np.append(self.PHI, 0).astype(np.float32)
    wide, a = phi[:-1].astype(np.float64), float(alpha)
    size, sign, log = np.abs(wide), np.sign(wide), np.log(np.abs(wide))
    expected = {
      'a': sign * size**a * log,
      'aa': sign * size**a * log**2,
      'pa': size ** (a - 1) * (1 + a * log),
      'ppa': sign * size ** (a - 2) * (2 * a - 1 + a * (a - 1) * log),
    }[names]
    for nested in sorted(set(itertools.permutations(names))):
      fn = reparam.psi
      for name in nested:
        fn = jax.grad(fn, 'pa'.index(name))
      fn = (jax.jit if jit else lambda f: f)(jax.vmap(fn, (0, None)))
      np.testing.assert_allclose(
        fn(phi, jnp.asarray(alpha)),
        np.append(expected, 0),
        rtol=2e-5,
        atol=1e-6,
        err_msg=''.join(nested),
      )

  def test_psi_derivative_can_be_differentiated_in_alpha(self):
    found = jax.jacfwd(reparam.psi_derivative, 1)(self.PHI, jnp.float32(1.7))
    size = np.abs(self.PHI)
    expected = size**0.7 * (1 + 1.7 * np.log(size))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    self.assertEqual(jax.grad(reparam.psi_derivative, 1)(0.0, 1.7), 0)

  def test_an_integer_alpha_in_an_array_has_derivatives_in_phi(self):
    slope = jax.grad(lambda phi: reparam.psi(phi, jnp.int32(2)))
    self.assertEqual(slope(0.5), 1)
    self.assertEqual(jax.grad(slope)(0.5), 2)
