"""A weight as its connections, to multiply vectors and convolve images with."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.sparse import convolution, kernel_choice, linear
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.kernel_choice import Task
from powerprop_jax.sparse.linear import Kernel
from powerprop_jax.sparse.plain_convolution import Window


class Condensed(NamedTuple):
  """A weight of this shape as its connections, inside a layer.

  Values [nnz] are sorted by output; where they are is said for the weight as a
  matrix [..., out].
  """

  values: jax.Array
  where: Index
  shape: tuple[int, ...]

  def dense(self) -> jax.Array:
    """The weight as a dense array, zero where there is no connection."""
    return linear.dense(self.values, self.where).reshape(self.shape)

  def kernel(self, x: jax.Array, *, name: str = '') -> Kernel:
    """The kernel for multiply; the name as in kernel_choice.choose."""
    size, num_vectors = self.values.size, math.prod(x.shape[:-1])
    task = Task(*self.where.shape, size, num_vectors, str(x.dtype))
    return kernel_choice.choose(task, name=name)

  def multiply(self, x: jax.Array, kernel: Kernel) -> jax.Array:
    """Vectors [..., in] times the weight as a matrix, [..., out]."""
    if kernel == 'dense':
      return jnp.dot(x, linear.dense(self.values, self.where))
    return linear.product(x, self.values, self.where, kernel)

  def convolve(
    self, x: jax.Array, window: Window, *, name: str
  ) -> jax.Array | None:
    """Images [N, H, W, C] convolved by connections; None if dense is faster."""
    is_pointwise = window.height == window.width == 1
    if is_pointwise and not any(map(any, window.pads)):
      x = x[:, :: window.stride, :: window.stride]
      return self.multiply(x, self.kernel(x, name=name))
    dtype = str(jnp.promote_types(x.dtype, jnp.float32))
    places = math.prod(window.out_shape(x.shape, 1))
    size = self.values.size
    task = Task(*self.where.shape, size, places, dtype, is_convolution=True)
    if kernel_choice.choose(task, name=name) != 'native':
      return None
    wide, values = (a.astype(jnp.float32) for a in (x, self.values))
    y = convolution.convolve(wide, values, self.where, window)
    return y.astype(x.dtype)
