"""power_scope: ψ inside a Haiku function."""

import contextlib

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest

from powerprop_jax import nets
from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import powerprop, views


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
  def test_gradients_are_those_of_the_chain_rule(self, alpha):
    """As powerprop's steps with SGD are."""
    net = inside_scope(alpha)
    theta, phi = assert_starts_as_plain(net)
    grads = jax.grad(lambda theta: loss(plain, theta))(theta)
    expected = trees.map_selected(
      lambda g, x: g * reparam.psi_derivative(x, alpha),
      *(select_lib.is_weight, grads, phi),
    )
    found = jax.grad(lambda phi: loss(net, phi))(phi)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)

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

  def test_impossible_alpha_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'alpha must be'):
      inside_scope(0.5).init(KEY, X)

  def test_weights_that_start_at_zero_are_refused(self):
    def forward(x, alpha):
      with nets.power_scope(alpha):
        return hk.Linear(2, w_init=jnp.zeros, name='dead')(x)

    net = hk.transform(forward)
    with self.assertRaisesRegex(ValueError, 'dead/w is initialised to zeros'):
      net.init(KEY, X, 2.0)
    phi = net.init(KEY, X, 1.0)
    chex.assert_tree_all_finite(net.apply(phi, None, X, 1.0))

  @parameterized.product(alpha=(1.7, 1.75), static=(True, False))
  @pytest.mark.slow
  def test_gradient_through_a_step_is_that_of_powerprop(self, alpha, static):
    """Of the loss after a step, as in MAML."""
    alpha = alpha if static else jnp.float32(alpha)
    net, tx = inside_scope(alpha), powerprop.powerprop(optax.sgd(0.05), alpha)

    def after_step(phi):
      grads = jax.grad(lambda phi: loss(net, phi))(phi)
      return loss(net, jax.tree.map(lambda p, g: p - 0.05 * g, phi, grads))

    def after_powerprop(phi):
      opt_state = tx.init(phi)
      theta = views.effective_params(phi, opt_state)
      grads = jax.grad(lambda theta: loss(plain, theta))(theta)
      updates, opt_state = tx.update(grads, opt_state, phi)
      return loss(net, optax.apply_updates(phi, updates))

    phi = net.init(KEY, X)
    expected = jax.grad(after_step)(phi)
    for grad in (jax.grad(after_powerprop), jax.jit(jax.grad(after_powerprop))):
      chex.assert_trees_all_close(grad(phi), expected, rtol=1e-4, atol=1e-5)
