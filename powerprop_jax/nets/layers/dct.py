"""Haiku's layers with a fixed cosine transform beside their weight.

Their output is

    y = s D(x) + S(x) + b,

where D is the transform of jaxprs/dct.py, s a trainable number and S the plain
layer, which starts at zero and is meant to be sparse. with_dct does the same to
any function.

By Price and Tanner, Dense for the Price of Sparse, 2021
(https://arxiv.org/abs/2102.07655).
"""

from collections.abc import Callable
import math
from typing import Any

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.core import names
from powerprop_jax.jaxprs import dct
from powerprop_jax.jaxprs.dct import METHODS, Method, WithDct
from powerprop_jax.nets.layers import parts


class DctLinear(hk.Linear):
  """A linear layer plus a fixed cosine transform: y = s D(x) + x W + b.

  Use it in place of hk.Linear; w_init is zeros by default. Its parameters are
  'w', 'b' and 'transform_scale', s, a scalar.

  Args:
    transform_init: initial value of s. 0 gives a plain sparse layer, to which
      training may add the transform.
    method: how the transform is computed, see with_dct. With 'fft' the weight
      comes to a product by itself, so that without_zeros can leave out its
      zeros.

  Example:
    >>> net = hk.without_apply_rng(hk.transform(lambda x: DctLinear(2)(x)))
    >>> theta = net.init(jax.random.key(0), jnp.eye(2))
    >>> net.apply(theta, jnp.eye(2)).round(3)
    Array([[ 0.707,  0.707],
           [ 0.707, -0.707]], dtype=float32)

  Source:
    Price & Tanner, 2021: see the top of this file.
  """

  def __init__(
    self,
    *args: Any,
    transform_init: float = 1.0,
    method: Method = 'auto',
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    names.check_choice('method', method, METHODS)
    self.transform_init, self.method = transform_init, method

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Outputs [..., output_size] of inputs [..., features]."""
    shape = (inputs.shape[-1], self.output_size)
    weight = hk.get_parameter('w', shape, inputs.dtype, init=_init(self))
    multiply = lambda x, w: jnp.dot(x, w, precision=precision)
    return _transformed(self, multiply, inputs, weight)


class DctConv2D(hk.Conv2D):
  """A convolution plus a fixed cosine transform of each patch.

  Use it in place of hk.Conv2D; w_init is zeros by default, and a mask acts on
  the kernel, not on the transform. s and method as in DctLinear. What the
  transform sees at each place is the patch under the kernel in the order (row,
  column, channel), channel fastest, padded with zeros to length n = max(height
  * width * in / groups, out). Output channel o gets coefficient o of the patch
  of its group, whichever group that is. In Haiku's layout the kernel of the
  transform is cosine_weight in the shape of the kernel.

  'auto' is 'matrix': beside the products with the kernel, adding s D to it
  costs little, since it is used at many places; making patches costs more. The
  other way is for large kernels on few places, and for saving memory. On a CPU
  the layer cannot be differentiated in forward mode (plain_convolution.py).

  Note:
    The dilation of the layer is that of the patches too. The published code
    does not pass it on to the transform.

  Example:
    >>> net = hk.without_apply_rng(hk.transform(lambda x: DctConv2D(1, 2)(x)))
    >>> theta = net.init(jax.random.key(0), jnp.ones((1, 2, 2, 1)))
    >>> net.apply(theta, jnp.ones((1, 2, 2, 1)))[0, 0, 0]
    Array([2.], dtype=float32)

  Source:
    Price & Tanner, 2021: see the top of this file.
  """

  def __init__(
    self,
    *args: Any,
    transform_init: float = 1.0,
    method: Method = 'auto',
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    names.check_choice('method', method, METHODS)
    self.transform_init, self.method = transform_init, method

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Activations of an image or a batch of images, in the data format."""
    shape = parts.kernel_shape(self, inputs)
    weight = hk.get_parameter('w', shape, inputs.dtype, init=_init(self))
    weight = parts.masked(self, weight)
    convolve = lambda x, w: parts.convolve(self, x, w, precision)
    return _transformed(self, convolve, inputs, weight)


def _init(module: parts.Layer) -> hk.initializers.Initializer:
  return module.w_init or jnp.zeros


def _transformed(
  module: DctLinear | DctConv2D,
  multiply: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  weight: jax.Array,
) -> jax.Array:
  """multiply(x, weight) and the transform of x, times s, plus the bias."""
  init = hk.initializers.Constant(module.transform_init)
  scale = hk.get_parameter('transform_scale', (), x.dtype, init=init)
  if isinstance(module, DctConv2D) and module.method != 'fft':
    # As with_dct does; it would lose the gradients of plain_convolution.py.
    num_in = math.prod(weight.shape[:-1])
    fixed = dct.cosine_weight(num_in, weight.shape[-1], x.dtype)
    y = multiply(x, weight + scale * fixed.reshape(weight.shape))
  else:
    fn = dct.with_dct(
      lambda theta, x: multiply(x, theta['w']), method=module.method
    )
    y = fn(WithDct({'w': weight}, {'w': scale}), x)
  return parts.add_bias(module, y)
