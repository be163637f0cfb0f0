"""ψ, its inverse and its derivative: the facts, at the extremes too."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import reparam

ALPHAS = (1.0, 1.25, 1.3, 1.5, 2.0, 2.75, 3.0, 4.0, 5.0)


class PsiTest(parameterized.TestCase):
  @parameterized.product(alpha=ALPHAS, static=(True, False), jit=(True, False))
  def test_inverse_undoes_psi(self, alpha, static, jit):
    theta = jnp.linspace(-2.0, 2.0, 41)
    power = alpha if static else jnp.float32(alpha)
    there = lambda x: reparam.psi_inverse(x, power)
    back = lambda x: reparam.psi(x, power)
    if jit:
      there, back = jax.jit(there), jax.jit(back)
    np.testing.assert_allclose(back(there(theta)), theta, rtol=2e-6, atol=1e-12)

  @parameterized.product(alpha=ALPHAS, static=(True, False))
  def test_formula_in_double_precision(self, alpha, static):
    phi = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    power = alpha if static else jnp.float32(alpha)
    wide = phi.astype(np.float64)
    alpha = float(np.float32(alpha)) if not static else alpha
    np.testing.assert_allclose(
      reparam.psi(phi, power), wide * np.abs(wide) ** (alpha - 1), rtol=3e-6
    )
    np.testing.assert_allclose(
      reparam.psi_derivative(phi, power),
      alpha * np.abs(wide) ** (alpha - 1),
      rtol=3e-6,
    )

  @parameterized.product(alpha=ALPHAS, static=(True, False))
  def test_derivative_agrees_with_autodiff_and_differences(self, alpha, static):
    power = alpha if static else jnp.float32(alpha)
    phi = jnp.array([-1.5, -0.5, -1e-3, 1e-3, 0.3, 2.0])
    slope = jax.vmap(jax.grad(lambda x: reparam.psi(x, power)))(phi)
    np.testing.assert_allclose(slope, reparam.psi_derivative(phi, power))
    wide, h = np.float64(phi), 1e-6
    f = lambda x: np.sign(x) * np.abs(x) ** alpha
    numeric = (f(wide + h) - f(wide - h)) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-4)

  @parameterized.product(alpha=ALPHAS, static=(True, False), zero=(0.0, -0.0))
  def test_gradient_at_zero_is_finite(self, alpha, static, zero):
    power = alpha if static else jnp.float32(alpha)
    phi = jnp.float32(zero)
    value, slope = jax.jit(jax.value_and_grad(reparam.psi))(phi, power)
    self.assertEqual(value, 0)
    self.assertEqual(slope, 1 if alpha == 1 else 0)
    self.assertEqual(reparam.psi_derivative(phi, power), slope)

  @parameterized.parameters(1.0, 1.5, 2.0)
  def test_derivative_in_alpha_is_theta_log_phi(self, alpha):
    phi = jnp.array([-2.0, 0.0, 0.5])
    total = lambda a: jnp.sum(reparam.psi(phi, a))
    expected = sum(
      np.sign(x) * abs(x) ** alpha * np.log(abs(x)) for x in (-2.0, 0.5)
    )
    np.testing.assert_allclose(jax.grad(total)(alpha), expected, rtol=1e-5)

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

  @parameterized.product(
    dtype=(jnp.bfloat16, jnp.float16), alpha=(1.5, 2.0, 3.0)
  )
  def test_half_precision_computes_in_float32(self, dtype, alpha):
    phi = jnp.linspace(-2, 2, 33).astype(dtype)
    for power in (alpha, jnp.float32(alpha)):
      theta = reparam.psi(phi, power)
      self.assertEqual(theta.dtype, dtype)
      wide = reparam.psi(phi.astype(jnp.float32), power)
      np.testing.assert_array_equal(theta, wide.astype(dtype))
      slope = jax.grad(lambda x, p=power: reparam.psi(x, p).sum())(phi)
      self.assertEqual(slope.dtype, dtype)

  def test_maps_trees_with_one_alpha_or_one_for_each_leaf(self):
    phi = {'a': jnp.array([2.0]), 'b': jnp.array([3.0])}
    chex.assert_trees_all_close(
      reparam.psi(phi, 2.0), {'a': jnp.array([4.0]), 'b': jnp.array([9.0])}
    )
    chex.assert_trees_all_close(
      reparam.psi(phi, {'a': 1.0, 'b': 2.0}),
      {'a': jnp.array([2.0]), 'b': jnp.array([9.0])},
    )

  @parameterized.parameters(1.25, 1.5, 1.75, 2.0, 3.0, 4.25)
  def test_multiples_of_a_quarter_call_no_power_exp_or_log(self, alpha):
    for fn in (reparam.psi, reparam.psi_derivative):
      jaxpr = str(jax.make_jaxpr(lambda x, fn=fn: fn(x, alpha))(jnp.ones(3)))
      for costly in (' pow', ' exp', ' log'):
        self.assertNotIn(f'{costly} ', jaxpr)
        self.assertNotIn(f'{costly}[', jaxpr)

  def test_traced_alpha_calls_no_general_power(self):
    jaxpr = str(jax.make_jaxpr(reparam.psi)(jnp.ones(3), jnp.float32(2)))
    self.assertNotIn(' pow ', jaxpr)

  def test_changing_traced_alpha_does_not_compile_again(self):
    fn = jax.jit(chex.assert_max_traces(reparam.psi, n=1))
    for alpha in (1.0, 1.5, 3.0):
      fn(jnp.ones(3), jnp.float32(alpha))

  @parameterized.parameters(0.99, 0.0, -1.0, float('nan'), float('inf'))
  def test_refuses_bad_alpha(self, alpha):
    for power in (alpha, jnp.float32(alpha), np.float32(alpha)):
      with self.assertRaisesRegex(ValueError, 'alpha must be a finite number'):
        reparam.psi(jnp.ones(2), power)

  def test_refuses_an_array_of_alphas(self):
    with self.assertRaisesRegex(ValueError, r'shape \(2,\)'):
      reparam.psi(jnp.ones(2), jnp.array([1.0, 2.0]))
