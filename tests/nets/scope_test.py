"""power_scope: ψ inside a Haiku function."""

import contextlib

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import nets
from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import powerprop, views
from powerprop_jax.prune import at_init

LEARNING_RATE = 0.05


def forward(x):
  return hk.nets.MLP([16, 8, 1])(x)


def inside_scope(alpha, select=select_lib.is_weight):
  def scoped(x):
    with nets.power_scope(alpha, select):
      return forward(x)

  return hk.without_apply_rng(hk.transform(scoped))


plain = hk.without_apply_rng(hk.transform(forward))
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 4))
Y = jnp.sum(X, axis=1, keepdims=True)


def loss(net, params):
  return jnp.mean((net.apply(params, X) - Y) ** 2)


def assert_starts_as_plain(net):
  theta, phi = plain.init(KEY, X), net.init(KEY, X)
  chex.assert_trees_all_close(
    net.apply(phi, X), plain.apply(theta, X), rtol=1e-4, atol=1e-6
  )
  return theta, phi


class PowerScopeTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 1.5, 2.0, 3.7)
  def test_the_network_at_step_0_does_not_depend_on_alpha(self, alpha):
    theta, phi = assert_starts_as_plain(inside_scope(alpha))
    latent = trees.map_selected(
      lambda x: reparam.psi_inverse(x, alpha), select_lib.is_weight, theta
    )
    chex.assert_trees_all_close(phi, latent, rtol=1e-6)

  @parameterized.parameters(1.0, 1.5, 2.0, 3.0)
  def test_gradient_descent_takes_the_steps_of_powerprop(self, alpha):
    """SGD on φ by the chain rule, against the recommended step."""
    # In float64: in float32 rounding grows over the steps, differently in
    # different versions of XLA, and would hide a small mistake.
    with jax.enable_x64(True):
      x, y = X.astype(jnp.float64), Y.astype(jnp.float64)
      error = lambda net, params: jnp.mean((net.apply(params, x) - y) ** 2)
      net = inside_scope(alpha)
      sgd = optax.sgd(LEARNING_RATE)
      tx = powerprop.powerprop(sgd, alpha)
      phi = net.init(KEY, x)
      other_phi, opt_state = views.init(tx, plain.init(KEY, x))
      chex.assert_trees_all_close(phi, other_phi, rtol=1e-12)

      @jax.jit
      def step(phi):
        grads = jax.grad(lambda phi: error(net, phi))(phi)
        updates, _ = sgd.update(grads, sgd.init(phi))
        return optax.apply_updates(phi, updates)

      @jax.jit
      def powerprop_step(phi, opt_state):
        theta = views.effective_params(phi, opt_state)
        grads = jax.grad(lambda theta: error(plain, theta))(theta)
        updates, opt_state = tx.update(grads, opt_state, phi)
        return optax.apply_updates(phi, updates), opt_state

      for _ in range(20):
        phi = step(phi)
        other_phi, opt_state = powerprop_step(other_phi, opt_state)
      chex.assert_trees_all_close(phi, other_phi, rtol=1e-9, atol=1e-12)

  def test_only_selected_leaves_are_reparameterised(self):
    phi = inside_scope(2.0, select_lib.by_regex('linear_1/w')).init(KEY, X)
    theta = plain.init(KEY, X)
    self.assertFalse(
      jnp.array_equal(phi['mlp/~/linear_1']['w'], theta['mlp/~/linear_1']['w'])
    )
    phi['mlp/~/linear_1'] = theta['mlp/~/linear_1']
    chex.assert_trees_all_equal(phi, theta)

  def test_effect_ends_with_the_context(self):
    def half(x, scope):
      with scope:
        x = hk.Linear(4, name='inside')(x)
      return hk.Linear(1, name='outside')(x)

    init = hk.transform(half).init
    phi = init(KEY, X, nets.power_scope(2.0))
    theta = init(KEY, X, contextlib.nullcontext())
    chex.assert_trees_all_equal(phi['outside'], theta['outside'])
    chex.assert_trees_all_close(
      reparam.psi(phi['inside']['w'], 2.0), theta['inside']['w'], rtol=1e-6
    )

  def test_scopes_nest(self):
    def nested(x):
      with nets.power_scope(2.0), nets.power_scope(1.5):
        return forward(x)

    assert_starts_as_plain(hk.without_apply_rng(hk.transform(nested)))

  def test_alpha_can_be_traced(self):
    @jax.jit
    def run(alpha):
      net = inside_scope(alpha)
      return net.apply(net.init(KEY, X), X)

    outputs = jax.vmap(run)(jnp.array([1.0, 2.0, 3.0]))
    expected = plain.apply(plain.init(KEY, X), X)
    for output in outputs:
      chex.assert_trees_all_close(output, expected, rtol=1e-4, atol=1e-6)

  def test_batch_norm_network_of_ours_runs_inside(self):
    def scoped(images):
      with nets.power_scope(2.0):
        return nets.AlexNetS(10)(images, is_training=True)

    net = hk.transform_with_state(scoped)
    images = jnp.zeros((2, 8, 8, 1))
    phi, state = jax.eval_shape(net.init, KEY, images)
    logits, _ = jax.eval_shape(net.apply, phi, state, None, images)
    self.assertEqual(logits.shape, (2, 10))

  @parameterized.parameters(0.5, float('nan'))
  def test_impossible_alpha_is_refused(self, alpha):
    with self.assertRaisesRegex(ValueError, 'alpha must be'):
      inside_scope(alpha).init(KEY, X)

  def test_weights_that_start_at_zero_are_refused(self):
    def forward(x, alpha):
      with nets.power_scope(alpha):
        return hk.Linear(2, w_init=jnp.zeros, name='dead')(x)

    net = hk.transform(forward)
    with self.assertRaisesRegex(ValueError, 'dead/w is initialised to zeros'):
      net.init(KEY, X, 2.0)
    phi = net.init(KEY, X, 1.0)
    chex.assert_tree_all_finite(net.apply(phi, None, X, 1.0))


class SecondDerivativeTest(parameterized.TestCase):
  @parameterized.product(alpha=(1.3, 2.6), static=(True, False))
  @pytest.mark.slow
  def test_grasp_inside_the_scope_agrees_with_double_precision(
    self, alpha, static
  ):
    def scores(alpha, x, y):
      net = inside_scope(alpha)
      phi = jax.tree.map(lambda p: p.astype(x.dtype), plain.init(KEY, X))
      loss_fn = lambda phi, x, y: jnp.mean((net.apply(phi, x) - y) ** 2)
      return at_init.grasp(loss_fn, phi, [(x, y)])

    found = scores(alpha if static else jnp.float32(alpha), X, Y)
    with jax.enable_x64(True):
      wide = alpha if static else float(np.float32(alpha))
      exact = scores(wide, X.astype(jnp.float64), Y.astype(jnp.float64))
    largest = max(float(jnp.max(jnp.abs(e))) for e in jax.tree.leaves(exact))
    chex.assert_trees_all_close(found, exact, rtol=1e-4, atol=1e-5 * largest)

  @parameterized.product(alpha=(1.7, 1.75), static=(True, False))
  def test_gradient_through_a_step_agrees_with_differences(self, alpha, static):
    """Of the loss of one task after a step on another, as in MAML."""
    alpha = alpha if static else jnp.float32(alpha)
    phi = np.array([0.9, -0.4, 0.2, -1.1], np.float32)
    tasks = np.array([0.5, 0.3, -0.6, 0.1]), np.array([-0.2, 0.4, 0.7, -0.5])
    tx = powerprop.powerprop(optax.sgd(0.3), alpha)

    def after_step(phi):
      params = {'linear': {'w': phi.reshape(2, 2)}}
      opt_state = tx.init(params)
      loss = lambda theta, task: jnp.sum(
        jnp.sin(theta['linear']['w'] - tasks[task].reshape(2, 2)) ** 2
      )
      grads = jax.grad(loss)(views.effective_params(params, opt_state), 0)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return loss(views.effective_params(params, opt_state), 1)

    def oracle(phi):
      power = float(alpha)
      psi = lambda x: np.sign(x) * np.abs(x) ** power
      slope = power * np.abs(phi) ** (power - 1)
      phi = phi - 0.3 * np.sin(2 * (psi(phi) - tasks[0])) * slope
      return np.sum(np.sin(psi(phi) - tasks[1]) ** 2)

    wide, h = phi.astype(np.float64), 1e-6 * np.eye(4)
    expected = [(oracle(wide + d) - oracle(wide - d)) / 2e-6 for d in h]
    for grad in (jax.grad(after_step), jax.jit(jax.grad(after_step))):
      np.testing.assert_allclose(grad(phi), expected, rtol=1e-4, atol=1e-5)
