"""The convolution for CPUs against Haiku's, values and both gradients."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers
from powerprop_jax.sparse import plain_convolution


def _transformed(module, kernel_size, stride, padding):
  def forward(x):
    return module(
      5,
      kernel_size,
      stride=stride,
      padding=padding,
      w_init=layers.WEIGHT_INIT,
      name='conv',
    )(x)

  return hk.without_apply_rng(hk.transform(forward))


class ConvolutionTest(parameterized.TestCase):
  @parameterized.product(
    size=((8, 8), (9, 7)),
    kernel_size=(1, 3, 4),
    stride=(1, 2, 3),
    padding=('SAME', 'VALID'),
  )
  def test_agrees_with_haiku(self, size, kernel_size, stride, padding):
    x = jax.random.normal(jax.random.key(0), (4, *size, 3))
    ours, haikus = (
      _transformed(module, kernel_size, stride, padding)
      for module in (layers.Conv2D, hk.Conv2D)
    )
    theta = ours.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(theta, haikus.init(jax.random.key(1), x))

    def value_and_grads(net):
      loss = lambda theta, x: jnp.sum(jnp.sin(net.apply(theta, x)))
      return jax.jit(jax.value_and_grad(loss, (0, 1)))(theta, x)

    chex.assert_trees_all_close(
      value_and_grads(ours), value_and_grads(haikus), rtol=1e-4, atol=1e-4
    )

  def test_gradients_can_be_differentiated_again(self):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    pads = ((1, 1), (1, 1))

    def norm_of_gradient(convolve):
      loss = lambda w: jnp.sum(jnp.sin(convolve(w)))
      return jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(w)

    plain = lambda w: jax.lax.conv_general_dilated(
      x, w, (1, 1), pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    chex.assert_trees_all_close(
      norm_of_gradient(lambda w: plain_convolution.convolve(x, w, 1, pads)),
      norm_of_gradient(plain),
      rtol=1e-3,
      atol=1e-3,
    )
