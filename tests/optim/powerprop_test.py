"""The update of powerprop against autodiff, and what it refuses."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.core import reparam


def _run_autodiff(inner, alpha, phi, steps=5):
  """The naive form as anyone would write it: Optax on ∂L(ψ(φ))/∂φ."""
  psi = lambda x: reparam.psi(x, alpha)
  loss = lambda phi: small.loss(_map_weights(psi, phi))
  state = inner.init(phi)
  for _ in range(steps):
    updates, state = inner.update(jax.grad(loss)(phi), state, phi)
    phi = optax.apply_updates(phi, updates)
  return phi


def _map_weights(fn, tree):
  return {
    layer: leaves | {'w': fn(leaves['w'])} for layer, leaves in tree.items()
  }


class PowerpropTest(parameterized.TestCase):
  @parameterized.product(
    alpha=(1.0, 1.3, 2.0, 3.0),
    form=('recommended', 'naive'),
    static=(True, False),
  )
  def test_plain_sgd_equals_autodiff_of_the_composition(
    self, alpha, form, static
  ):
    power = alpha if static else jnp.float32(alpha)
    tx = pp.powerprop(optax.sgd(0.05), power, form=form)
    (start, _), *_, (phi, _) = small.run(tx, 5)
    expected = _run_autodiff(optax.sgd(0.05), alpha, start)
    chex.assert_trees_all_close(phi, expected, rtol=2e-5, atol=1e-6)

  @parameterized.parameters(
    (lambda: optax.adam(0.01),), (lambda: optax.sgd(0.05, 0.9),)
  )
  def test_naive_form_alone_is_autodiff_for_any_optimiser(self, make):
    ends = {}
    for form in ('recommended', 'naive'):
      tx = pp.powerprop(make(), 2.0, form=form)
      (start, _), *_, (ends[form], _) = small.run(tx, 5)
    expected = _run_autodiff(make(), 2.0, start)
    chex.assert_trees_all_close(ends['naive'], expected, rtol=1e-4, atol=1e-5)
    naive, other = (ends[form]['m']['w'] for form in sorted(ends))
    self.assertGreater(float(jnp.max(jnp.abs(naive - other))), 1e-4)

  def test_recommended_form_multiplies_the_step_on_theta_by_the_slope(self):
    theta, alpha = small.weights(), 2.0
    inner = optax.adamw(0.01, weight_decay=0.1)
    tx = pp.powerprop(inner, alpha)
    phi, opt_state = pp.init(tx, theta)
    grads = jax.grad(small.loss)(theta)
    updates, _ = tx.update(grads, opt_state, phi)
    step, _ = inner.update(grads, inner.init(theta), theta)
    np.testing.assert_allclose(
      updates['m']['w'], step['m']['w'] * 2 * jnp.abs(phi['m']['w']), rtol=1e-4
    )
    np.testing.assert_allclose(updates['m']['b'], step['m']['b'], rtol=1e-6)

  def test_a_tree_of_alphas(self):
    alpha = {'m': {'w': 2.0}, 'n': {'w': jnp.float32(3)}}
    theta = small.weights()
    phi, opt_state = pp.init(pp.powerprop(optax.sgd(0.1), alpha), theta)
    expected = jax.tree.map(
      lambda t, a: reparam.psi_inverse(t, a),
      theta,
      {'m': {'w': 2.0, 'b': 1.0}, 'n': {'w': 3.0}},
    )
    chex.assert_trees_all_close(phi, expected, rtol=1e-5)
    chex.assert_trees_all_close(
      pp.effective_params(phi, opt_state), theta, rtol=1e-5
    )

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_keeps_dtypes_and_is_clean_under_strict_promotion(self, dtype):
    theta = jax.tree.map(lambda x: x.astype(dtype), small.weights())
    with jax.numpy_dtype_promotion('strict'):
      for alpha in (1.5, jnp.float32(1.3)):
        inner = optax.chain(pp.decay_theta(1e-3), optax.sgd(0.1))
        tx = optax.chain(pp.powerprop(inner, alpha), pp.decay_phi(1e-3, 0.1))
        phi, opt_state = pp.init(tx, theta)
        updates, _ = tx.update(theta, opt_state, phi)
        chex.assert_trees_all_equal_dtypes(phi, updates, theta)

  def test_donation_leaves_the_callers_arrays_alone(self):
    theta, alpha = small.weights(), jnp.float32(2)
    tx = pp.powerprop(optax.sgd(0.1), alpha)
    phi, opt_state = pp.init(tx, theta)
    step = jax.jit(
      lambda p, s: (jax.tree.map(lambda x: x + 1, p), s), donate_argnums=(0, 1)
    )
    step(phi, opt_state)
    jax.block_until_ready((theta, alpha))
    self.assertFalse(alpha.is_deleted())
    self.assertFalse(any(x.is_deleted() for x in jax.tree.leaves(theta)))

  @parameterized.parameters(
    *(
      (kind(alpha), 'at least 1, got')
      for alpha in (0.5, -2.0, float('nan'), float('inf'))
      for kind in (float, jnp.float32, lambda a: {'m': {'w': a}})
    ),
    (jnp.ones(3), r'shape \(3,\)'),
    (1e6, 'alpha must be at most 64'),
    (jnp.float32(65), 'alpha must be at most 64'),
    ({'m': {'w': 2.0}, 'n': {'w': 1e3}}, 'alpha must be at most 64'),
    ({'m': {'w': 2.0}}, "no value for.*'n/w'"),
    (
      {name: {'w': 2.0} for name in ('m', 'n', 'typo')},
      "unknown leaves.*'typo/w'",
    ),
  )
  def test_alpha_that_does_not_fit(self, alpha, message):
    with self.assertRaisesRegex(ValueError, message):
      pp.powerprop(optax.sgd(0.1), alpha).init(small.weights())

  def test_selecting_nothing(self):
    tx = pp.powerprop(optax.sgd(0.1), 2.0, pp.by_regex('kernel'))
    with self.assertRaisesRegex(ValueError, r'm/b .*, m/w fl'):
      tx.init(small.weights())

  def test_weights_at_zero_are_counted(self):
    theta = {'m': {'w': jnp.eye(16), 'b': jnp.zeros(16)}}
    for alpha in (2.0, jnp.float32(2)):
      tx = pp.powerprop(optax.sgd(0.1), alpha)
      with pytest.warns(UserWarning, match="240 of 256 weights of 'm/w'"):
        pp.init(tx, theta)

  def test_few_zeros_or_none_that_matter_are_not_worth_a_warning(self):
    one = {'m': {'w': jnp.ones((40, 40)).at[0, 0].set(0)}}
    pp.init(pp.powerprop(optax.sgd(0.1), 2.0), one)
    eye = {'m': {'w': jnp.eye(16)}}
    pp.init(pp.powerprop(optax.sgd(0.1), 1.0), eye)
    # No connection where the zeros are.
    masks = {'m': {'w': jnp.eye(16, dtype=bool)}}
    power = pp.powerprop(optax.sgd(0.1), 2.0)
    pp.init(pp.static(power, masks=masks), eye)

  def test_unknown_form(self):
    with self.assertRaisesRegex(ValueError, "got 'latent'"):
      pp.powerprop(optax.sgd(0.1), 2.0, form='latent')

  @parameterized.parameters('theta', 'phi')
  def test_is_the_gradient_of_its_penalty(self, what):
    rate, alpha = 0.3, 2.0
    if what == 'theta':
      inner = optax.chain(pp.decay_theta(rate), optax.sgd(0.1))
      tx, weight = pp.powerprop(inner, alpha), reparam.psi
    else:
      tx = optax.chain(
        pp.powerprop(optax.sgd(0.1), alpha), pp.decay_phi(rate, 0.1)
      )
      weight = lambda phi, alpha: phi
    phi, opt_state = pp.init(tx, small.weights())
    zeros = jax.tree.map(jnp.zeros_like, phi)
    updates, _ = tx.update(zeros, opt_state, phi)
    w = phi['m']['w']
    penalty = lambda w: rate / 2 * jnp.sum(weight(w, alpha) ** 2)
    np.testing.assert_allclose(
      updates['m']['w'], -0.1 * jax.grad(penalty)(w), rtol=1e-5
    )
    self.assertFalse(jnp.any(updates['m']['b']))

  def test_decay_of_phi_follows_a_schedule(self):
    rates = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = pp.decay_phi(0.1, rates)
    phi = {'m': {'w': jnp.ones((1, 1))}}
    zeros = {'m': {'w': jnp.zeros((1, 1))}}
    state, shares = tx.init(phi), []
    for _ in range(2):
      updates, state = tx.update(zeros, state, phi)
      shares.append(float(updates['m']['w'][0, 0]))
    np.testing.assert_allclose(shares, [-0.1, -0.05])

  def test_decay_that_chooses_nothing_is_refused(self):
    named = {'Dense_0': {'matrix': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
    for tx in (pp.decay_theta(0.1), pp.decay_phi(0.1, 0.1)):
      with self.assertRaisesRegex(ValueError, 'Dense_0/matrix.*by_regex'):
        tx.init(named)

  @parameterized.parameters(-1.0, float('nan'), float('inf'))
  def test_bad_rates(self, rate):
    for make in (pp.decay_theta, lambda rate: pp.decay_phi(rate, 0.1)):
      with self.assertRaisesRegex(ValueError, 'rate must be finite'):
        make(rate)
