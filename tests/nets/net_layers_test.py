"""The pieces of our networks against Haiku's and against plain JAX."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers


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
    settings = dict(stride=stride, padding=padding, name='conv')

    def ours(x):
      return layers.conv(6, kernel_size, groups=groups, **settings)(x)

    def haikus(x):
      more = dict(feature_group_count=groups, w_init=layers.WEIGHT_INIT)
      return hk.Conv2D(6, kernel_size, **settings, **more)(x)

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
