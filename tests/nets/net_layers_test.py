"""The pieces of our networks against Haiku's and against plain JAX."""

import math

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import small

from powerprop_jax.jaxprs.dct import cosine_weight
from powerprop_jax.nets import layers
from powerprop_jax.nets.layers import forms


class PoolTest(parameterized.TestCase):
  @parameterized.product(
    shape=((8, 8), (7, 9), (1, 5)), size=(2, 3), padding=('SAME', 'VALID')
  )
  def test_agrees_with_haiku(self, shape, size, padding):
    if padding == 'VALID' and min(shape) < size:
      return
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    expected = hk.max_pool(x, (size, size, 1), (2, 2, 1), padding)
    chex.assert_trees_all_equal(
      layers.max_pool(x, padding, size=size), expected
    )

  def test_average_is_that_of_haiku(self):
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    expected = hk.avg_pool(x, (2, 2, 1), (2, 2, 1), 'VALID')
    chex.assert_trees_all_close(layers.avg_pool(x), expected, atol=1e-6)


class ConvTest(parameterized.TestCase):
  @parameterized.product(
    size=((8, 8), (9, 7)),
    kernel_size=(1, 3, 4),
    stride=(1, 2, 3),
    padding=('SAME', 'VALID'),
    groups=(1, 3),
  )
  def test_agrees_with_haiku(self, size, kernel_size, stride, padding, groups):
    x = jax.random.normal(jax.random.key(0), (4, *size, 3))
    shape = dict(stride=stride, padding=padding, feature_group_count=groups)
    settings = dict(name='conv', **shape)

    def ours(x):
      return layers.conv(6, kernel_size, **settings)(x)

    def haikus(x):
      w_init = layers.WEIGHT_INIT
      return hk.Conv2D(6, kernel_size, w_init=w_init, **settings)(x)

    ours, haikus = (
      hk.without_apply_rng(hk.transform(forward)) for forward in (ours, haikus)
    )
    theta = ours.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(theta, haikus.init(jax.random.key(1), x))

    def value_and_grads(net):
      loss = lambda theta, x: jnp.sum(jnp.sin(net.apply(theta, x)))
      return jax.jit(jax.value_and_grad(loss, (0, 1)))(theta, x)

    chex.assert_trees_all_close(
      value_and_grads(ours), value_and_grads(haikus), rtol=1e-4, atol=1e-4
    )

  @parameterized.parameters(
    dict(stride=2),
    dict(feature_group_count=3, with_bias=False),
    dict(feature_group_count=3, padding='VALID'),
  )
  def test_a_transform_is_added_to_the_weights(self, **settings):
    def make(has_transform):
      def forward(x):
        with forms.use(forms.Form(has_transform)):
          x = layers.flatten(layers.conv(6, 3, 'conv', **settings)(x))
          return layers.linear(40, 'linear', transform_init=0.5)(x)

      return hk.without_apply_rng(hk.transform(forward))

    x = jax.random.normal(jax.random.key(0), (4, 8, 7, 3))
    net, plain = make(True), make(False)
    theta = net.init(jax.random.key(1), x)
    # Moved by a little, so that no weight is 0.
    theta = jax.tree.map(lambda t, n: t + 0.1 * n, theta, small.grads(0, theta))
    expected = {}
    for module, leaves in theta.items():
      shape = leaves['w'].shape
      rows = cosine_weight(math.prod(shape[:-1]), shape[-1], jnp.float32)
      both = leaves['w'] + leaves['transform_scale'] * rows.reshape(shape)
      bias = {'b': leaves['b']} if 'b' in leaves else {}
      expected[module] = {'w': both} | bias
    chex.assert_trees_all_close(
      net.apply(theta, x), plain.apply(expected, x), rtol=1e-4, atol=1e-4
    )
