"""The update of powerprop against autodiff, and what it refuses."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax.core import reparam, select
from powerprop_jax.optim import aliases, decay, powerprop, views


def _theta(key=0):
  keys = jax.random.split(jax.random.key(key), 4)
  return {
    'linear_0': {
      'w': jax.random.normal(keys[0], (5, 4)),
      'b': jax.random.normal(keys[1], (4,)),
    },
    'linear_1': {
      'w': jax.random.normal(keys[2], (4, 3)),
      'b': jax.random.normal(keys[3], (3,)),
    },
  }


def _loss(theta):
  x = jnp.linspace(-1, 1, 10).reshape(2, 5)
  for layer in ('linear_0', 'linear_1'):
    b = theta[layer]['b'][None]
    x = jnp.tanh(x @ theta[layer]['w'] + b)
  return jnp.sum((x - 0.3) ** 2)


def _run(tx, phi, opt_state, steps=5):
  @jax.jit
  def step(phi, opt_state):
    grads = jax.grad(_loss)(views.effective_params(phi, opt_state))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  for _ in range(steps):
    phi, opt_state = step(phi, opt_state)
  return phi, opt_state


def _run_autodiff(inner, alpha, phi, steps=5):
  """The naive form as anyone would write it: Optax on ∂L(ψ(φ))/∂φ."""
  psi = lambda x: reparam.psi(x, alpha)
  loss = lambda phi: _loss(_map_weights(psi, phi))
  state = inner.init(phi)
  for _ in range(steps):
    updates, state = inner.update(jax.grad(loss)(phi), state, phi)
    phi = optax.apply_updates(phi, updates)
  return phi


def _map_weights(fn, tree):
  return {
    layer: {'w': fn(leaves['w']), 'b': leaves['b']}
    for layer, leaves in tree.items()
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
    tx = powerprop.powerprop(optax.sgd(0.05), power, form=form)
    start, opt_state = views.init(tx, _theta())
    phi, _ = _run(tx, start, opt_state)
    expected = _run_autodiff(optax.sgd(0.05), alpha, start)
    chex.assert_trees_all_close(phi, expected, rtol=2e-5, atol=1e-6)

  @parameterized.parameters(
    (lambda: optax.adam(0.01),), (lambda: optax.sgd(0.05, 0.9),)
  )
  def test_naive_form_alone_is_autodiff_for_any_optimiser(self, make):
    ends = {}
    for form in ('recommended', 'naive'):
      tx = powerprop.powerprop(make(), 2.0, form=form)
      start, opt_state = views.init(tx, _theta())
      ends[form], _ = _run(tx, start, opt_state)
    expected = _run_autodiff(make(), 2.0, start)
    chex.assert_trees_all_close(ends['naive'], expected, rtol=1e-4, atol=1e-5)
    naive, other = (ends[form]['linear_0']['w'] for form in sorted(ends))
    self.assertGreater(float(jnp.max(jnp.abs(naive - other))), 1e-4)

  def test_recommended_form_multiplies_the_step_on_theta_by_the_slope(self):
    theta, alpha = _theta(), 2.0
    inner = optax.adamw(0.01, weight_decay=0.1)
    tx = powerprop.powerprop(inner, alpha)
    phi, opt_state = views.init(tx, theta)
    grads = jax.grad(_loss)(theta)
    updates, _ = tx.update(grads, opt_state, phi)
    step, _ = inner.update(grads, inner.init(theta), theta)
    np.testing.assert_allclose(
      updates['linear_0']['w'],
      step['linear_0']['w'] * 2 * jnp.abs(phi['linear_0']['w']),
      rtol=1e-4,
    )
    np.testing.assert_allclose(
      updates['linear_0']['b'], step['linear_0']['b'], rtol=1e-6
    )

  def test_alpha_one_is_the_inner_optimiser(self):
    for alpha in (1.0, jnp.float32(1)):
      tx = powerprop.powerprop(optax.adamw(0.01), alpha)
      phi, _ = _run(tx, *views.init(tx, _theta()))
      dense = optax.adamw(0.01)
      expected, _ = _run(dense, *views.init(dense, _theta()))
      chex.assert_trees_all_close(phi, expected, rtol=1e-6)

  def test_a_tree_of_alphas(self):
    alpha = {'linear_0': {'w': 2.0}, 'linear_1': {'w': jnp.float32(3)}}
    tx = powerprop.powerprop(optax.sgd(0.1), alpha)
    theta = _theta()
    phi, opt_state = views.init(tx, theta)
    for layer, power in (('linear_0', 2.0), ('linear_1', 3.0)):
      np.testing.assert_allclose(
        phi[layer]['w'],
        reparam.psi_inverse(theta[layer]['w'], power),
        rtol=1e-5,
      )
    chex.assert_trees_all_close(
      views.effective_params(phi, opt_state), theta, rtol=1e-5
    )
    _run(tx, phi, opt_state)

  def test_a_weight_at_zero_stays_and_its_neighbours_move(self):
    tx = powerprop.powerprop(optax.sgd(0.1), 2.0)
    phi = {'m': {'w': jnp.array([[0.0, 1.0]])}}
    grads = {'m': {'w': jnp.ones((1, 2))}}
    updates, _ = tx.update(grads, tx.init(phi), phi)
    np.testing.assert_allclose(updates['m']['w'], [[0.0, -0.2]])

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_keeps_dtypes_and_is_clean_under_strict_promotion(self, dtype):
    theta = jax.tree.map(lambda x: x.astype(dtype), _theta())
    with jax.numpy_dtype_promotion('strict'):
      for alpha in (1.5, jnp.float32(1.3)):
        inner = optax.chain(decay.decay_theta(1e-3), optax.sgd(0.1))
        tx = optax.chain(
          powerprop.powerprop(inner, alpha), decay.decay_phi(1e-3, 0.1)
        )
        phi, opt_state = views.init(tx, theta)
        updates, _ = tx.update(theta, opt_state, phi)
        chex.assert_trees_all_equal_dtypes(phi, updates, theta)

  def test_donation_leaves_the_callers_arrays_alone(self):
    theta, alpha = _theta(), jnp.float32(2)
    tx = powerprop.powerprop(optax.sgd(0.1), alpha)
    phi, opt_state = views.init(tx, theta)
    step = jax.jit(
      lambda p, s: (jax.tree.map(lambda x: x + 1, p), s), donate_argnums=(0, 1)
    )
    step(phi, opt_state)
    jax.block_until_ready((theta, alpha))
    self.assertFalse(alpha.is_deleted())
    self.assertFalse(any(x.is_deleted() for x in jax.tree.leaves(theta)))


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(0.5, -2.0, float('nan'), float('inf'))
  def test_bad_alpha(self, alpha):
    for power in (alpha, jnp.float32(alpha), {'linear_0': {'w': alpha}}):
      with self.assertRaisesRegex(ValueError, 'at least 1, got'):
        powerprop.powerprop(optax.sgd(0.1), power)

  @parameterized.parameters(
    (jnp.ones(3), r'shape \(3,\)'),
    (1e6, 'alpha must be at most 64'),
    (jnp.float32(65), 'alpha must be at most 64'),
    ({'m': {'w': 2.0}, 'n': {'w': 1e3}}, 'alpha must be at most 64'),
    ({'linear_0': {'w': 2.0}}, "no value for.*'linear_1/w'"),
    (
      {name: {'w': 2.0} for name in ('linear_0', 'linear_1', 'typo')},
      "unknown leaves.*'typo/w'",
    ),
  )
  def test_alpha_that_does_not_fit(self, alpha, message):
    with self.assertRaisesRegex(ValueError, message):
      powerprop.powerprop(optax.sgd(0.1), alpha).init(_theta())

  def test_selecting_nothing(self):
    tx = powerprop.powerprop(optax.sgd(0.1), 2.0, select.by_regex('kernel'))
    with self.assertRaisesRegex(ValueError, r'linear_0/b .*, linear_0/w fl'):
      tx.init(_theta())

  def test_a_dead_leaf(self):
    theta = _theta()
    theta['linear_1']['w'] = jnp.zeros((4, 3))
    for alpha in (2.0, jnp.float32(2)):
      tx = powerprop.powerprop(optax.sgd(0.1), alpha)
      with self.assertRaisesRegex(ValueError, "'linear_1/w' is all zeros"):
        views.init(tx, theta)
    views.init(powerprop.powerprop(optax.sgd(0.1), 1.0), theta)

  def test_weights_at_zero_are_counted(self):
    theta = {'m': {'w': jnp.eye(16), 'b': jnp.zeros(16)}}
    for alpha in (2.0, jnp.float32(2)):
      tx = powerprop.powerprop(optax.sgd(0.1), alpha)
      with pytest.warns(UserWarning, match="240 of 256 weights of 'm/w'"):
        views.init(tx, theta)

  def test_few_zeros_or_none_that_matter_are_not_worth_a_warning(self):
    one = {'m': {'w': jnp.ones((40, 40)).at[0, 0].set(0)}}
    views.init(powerprop.powerprop(optax.sgd(0.1), 2.0), one)
    eye = {'m': {'w': jnp.eye(16)}}
    views.init(powerprop.powerprop(optax.sgd(0.1), 1.0), eye)
    # No connection where the zeros are.
    masks = {'m': {'w': jnp.eye(16, dtype=bool)}}
    power = powerprop.powerprop(optax.sgd(0.1), 2.0)
    views.init(aliases.static(power, masks=masks), eye)

  def test_unknown_form(self):
    with self.assertRaisesRegex(ValueError, "got 'latent'"):
      powerprop.powerprop(optax.sgd(0.1), 2.0, form='latent')

  def test_update_without_parameters(self):
    tx = powerprop.powerprop(optax.sgd(0.1), 2.0)
    with self.assertRaisesRegex(ValueError, 'effective_params'):
      tx.update(_theta(), tx.init(_theta()))


class DecayTest(parameterized.TestCase):
  @parameterized.parameters('theta', 'phi')
  def test_is_the_gradient_of_its_penalty(self, what):
    rate, alpha = 0.3, 2.0
    if what == 'theta':
      inner = optax.chain(decay.decay_theta(rate), optax.sgd(0.1))
      tx, weight = powerprop.powerprop(inner, alpha), reparam.psi
    else:
      tx = optax.chain(
        powerprop.powerprop(optax.sgd(0.1), alpha), decay.decay_phi(rate, 0.1)
      )
      weight = lambda phi, alpha: phi
    phi, opt_state = views.init(tx, _theta())
    zeros = jax.tree.map(jnp.zeros_like, phi)
    updates, _ = tx.update(zeros, opt_state, phi)
    w = phi['linear_0']['w']
    penalty = lambda w: rate / 2 * jnp.sum(weight(w, alpha) ** 2)
    np.testing.assert_allclose(
      updates['linear_0']['w'], -0.1 * jax.grad(penalty)(w), rtol=1e-5
    )
    self.assertFalse(jnp.any(updates['linear_0']['b']))

  def test_decay_of_phi_follows_a_schedule(self):
    rates = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = decay.decay_phi(0.1, rates)
    phi = {'m': {'w': jnp.ones((1, 1))}}
    zeros = {'m': {'w': jnp.zeros((1, 1))}}
    state, shares = tx.init(phi), []
    for _ in range(2):
      updates, state = tx.update(zeros, state, phi)
      shares.append(float(updates['m']['w'][0, 0]))
    np.testing.assert_allclose(shares, [-0.1, -0.05])

  def test_decay_that_chooses_nothing_is_refused(self):
    flax_names = {'Dense_0': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
    for tx in (decay.decay_theta(0.1), decay.decay_phi(0.1, 0.1)):
      with self.assertRaisesRegex(ValueError, 'Dense_0/kernel.*by_regex'):
        tx.init(flax_names)

  @parameterized.parameters(-1.0, float('nan'), float('inf'))
  def test_bad_rates(self, rate):
    for make in (decay.decay_theta, lambda rate: decay.decay_phi(rate, 0.1)):
      with self.assertRaisesRegex(ValueError, 'rate must be finite'):
        make(rate)
