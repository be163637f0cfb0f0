"""Layers that add a fixed cosine transform to a sparse trainable weight.

A very sparse layer passes on little of what it gets. Here its output is

    y = s D(x) + S(x) + b,

where D is a fixed orthonormal cosine transform, which connects every input with
every output at no cost in parameters, s a trainable number and S the sparse
layer, which starts at zero.

By Price and Tanner, Dense for the Price of Sparse, 2021
(https://arxiv.org/abs/2102.07655).

The transform can be applied in two ways, equal up to rounding. 'matrix' has D
as a constant of the size of the dense weight: since everything is linear, the
layer is then one product with S + s D. 'fft' computes D(x) in O(n log n), next
to S(x). 'auto' chooses when the program is traced, from the shapes.
"""

import math
from typing import Any

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import jax.typing

from powerprop_jax.core import names
from powerprop_jax.jaxprs.dct import METHODS, cosine_weight, transform
from powerprop_jax.nets.layers import parts
from powerprop_jax.sparse import kernel_choice
from powerprop_jax.sparse.linear import Kernel
from powerprop_jax.sparse.weight import Condensed, Support

# 'auto' in a layer: 'fft' for at least this many entries of the shorter side of
# the weight per vector that is multiplied; see DctLinear.
_ENTRIES_PER_VECTOR = 8

# Kernels for 'fft', which saves the memory of a dense copy.
_NOT_DENSE: tuple[Kernel, ...] = ('native', 'loops')


class DctLinear(hk.Linear):
  """A linear layer plus a fixed cosine transform: y = s D(x) + x W + b.

  Use it in place of hk.Linear; w_init is zeros by default. Its parameters are
  'w', 'b' and 'transform_scale', s, a scalar. With a support it holds only the
  connections of W, as CondensedLinear does, and the network needs
  hk.transform_with_state.

  'auto' chooses 'fft' if the connections of W are multiplied without a dense
  copy (kernel_choice.py), or if the shorter side of W is at least 8 times the
  number of vectors in x; otherwise 'matrix'. This is what was faster on two CPU
  cores: the cost of 'matrix' over the same layer without transform goes with
  the size of W, that of 'fft' with the size of x. Where few connections make
  the sparse product very cheap, the transform can cost more than that product.
  The rule has not been measured on other backends, where it is the same.

  Args:
    transform_init: initial value of s. 0 gives a plain sparse layer, to which
      training may add the transform.
    method: 'matrix', 'fft' or 'auto'. 'fft' never makes an array of the size of
      W if there is a support.
    support: where the connections of W are, of shape [in, out]; None for a
      dense W, which the training loop masks.

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
    method: str = 'auto',
    support: Support | None = None,
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    names.check_choice('method', method, METHODS)
    self._transform_init = transform_init
    self._method = method
    self._support = support

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Outputs [..., output_size] of inputs [..., features]."""
    shape = (inputs.shape[-1], self.output_size)
    weight = _weight(self, shape, inputs.dtype, self._support)
    scale = _transform_scale(inputs.dtype, self._transform_init)
    method = self._method
    product: Kernel = 'dense'
    if isinstance(weight, Condensed) and method != 'matrix':
      among = kernel_choice.KERNELS if method == 'auto' else _NOT_DENSE
      product = weight.kernel(inputs, among=among)
    if method == 'auto':
      num_vectors = math.prod(inputs.shape[:-1])
      is_long = min(shape) >= _ENTRIES_PER_VECTOR * num_vectors
      method = 'fft' if is_long or product != 'dense' else 'matrix'
    if method == 'matrix':
      kernel = scale * cosine_weight(*shape, inputs.dtype) + _dense(weight)
      y = jnp.dot(inputs, kernel, precision=precision)
    else:
      y = scale * transform(inputs, self.output_size, method='fft')
      if isinstance(weight, Condensed):
        y += weight.multiply(inputs, product, precision=precision)
      else:
        y += jnp.dot(inputs, weight, precision=precision)
    return parts.add_bias(self, y)


class DctConv2D(hk.Conv2D):
  """A convolution plus a fixed cosine transform of each patch.

  Use it in place of hk.Conv2D; w_init is zeros by default, and a mask acts on
  the kernel, not on the transform. s, method and support as in DctLinear.
  What the transform sees at each place is the patch under the kernel in the
  order (row, column, channel), channel fastest, padded with zeros to length
  n = max(height * width * in / groups, out). Output channel o gets coefficient
  o of the patch of its group, whichever group that is. In Haiku's layout the
  kernel of the transform is cosine_weight in the shape of the kernel.

  'auto' is 'matrix': beside the products with the kernel, adding s D to it
  costs little, since it is used at many places; making patches costs more. The
  other way is for large kernels on few places, and for saving memory. On a CPU
  the layer cannot be differentiated in forward mode (plain_convolution.py).

  Args:
    method: 'matrix', 'fft' or 'auto'. 'fft' never makes an array of the size of
      the kernel if there are a support and no groups.
    support: where the connections of the kernel are, of its shape [height,
      width, in / groups, out]; None for a dense kernel.

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
    method: str = 'auto',
    support: Support | None = None,
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    names.check_choice('method', method, METHODS)
    if support is not None:
      parts.check_no_mask(self)
    self._transform_init = transform_init
    self._method = method
    self._support = support

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Activations of an image or a batch of images, in the data format."""
    shape = parts.kernel_shape(self, inputs)
    weight = _weight(self, shape, inputs.dtype, self._support)
    scale = _transform_scale(inputs.dtype, self._transform_init)
    if self._method == 'fft':
      y = self._by_patches(inputs, weight, scale, precision)
    else:
      num_in = math.prod(shape[:-1])
      fixed = cosine_weight(num_in, shape[-1], inputs.dtype).reshape(shape)
      kernel = parts.masked(self, _dense(weight)) + scale * fixed
      y = parts.convolve(self, inputs, kernel, precision)
    return parts.add_bias(self, y)

  def _by_patches(
    self,
    inputs: jax.Array,
    weight: jax.Array | Condensed,
    scale: jax.Array,
    precision: lax.PrecisionLike,
  ) -> jax.Array:
    """The layer without bias, the transform computed from patches."""
    num_groups, num_out = self.feature_group_count, self.output_channels
    patches = parts.patches(self, inputs)
    y = transform(patches, num_out, method='fft')
    # Every group's patch has all coefficients; a group keeps those of its own
    # channels.
    y = y.reshape(*y.shape[:-1], num_groups, num_out // num_groups)
    y = scale * jnp.einsum('...ggo->...go', y).reshape(*y.shape[:-3], num_out)
    by_product = isinstance(weight, Condensed) and num_groups == 1
    if isinstance(weight, Condensed) and by_product:
      x = patches[..., 0, :]
      y += weight.multiply(x, weight.kernel(x, among=_NOT_DENSE))
    if self.channel_index != -1:
      y = jnp.moveaxis(y, -1, -3)
    if by_product:
      return y
    kernel = parts.masked(self, _dense(weight))
    return y + parts.convolve(self, inputs, kernel, precision)


def _weight(
  module: parts.Layer,
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike,
  support: Support | None,
) -> jax.Array | Condensed:
  init = module.w_init or jnp.zeros
  if support is None:
    return hk.get_parameter('w', shape, dtype, init=init)
  return parts.condensed_weight(shape, dtype, init, support)


def _dense(weight: jax.Array | Condensed) -> jax.Array:
  return weight.dense() if isinstance(weight, Condensed) else weight


def _transform_scale(dtype: jax.typing.DTypeLike, value: float) -> jax.Array:
  """The parameter s of the module that calls."""
  init = hk.initializers.Constant(value)
  return hk.get_parameter('transform_scale', (), dtype, init=init)
