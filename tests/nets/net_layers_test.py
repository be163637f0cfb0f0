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


class GroupsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4)
  def test_each_group_is_a_convolution_of_its_own(self, groups):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    net = hk.without_apply_rng(
      hk.transform(lambda x: layers.conv(8, 3, 'conv', groups=groups)(x))
    )
    theta = net.init(jax.random.key(1), x)
    self.assertEqual(theta['conv']['w'].shape, (3, 3, 4 // groups, 8))
    parts = []
    for xs, w in zip(
      jnp.split(x, groups, axis=3),
      jnp.split(theta['conv']['w'], groups, axis=3),
      strict=True,
    ):
      dims = ('NHWC', 'HWIO', 'NHWC')
      parts.append(
        jax.lax.conv_general_dilated(
          xs, w, (1, 1), 'SAME', dimension_numbers=dims
        )
      )
    chex.assert_trees_all_close(
      net.apply(theta, x), jnp.concatenate(parts, axis=3), atol=1e-5
    )
