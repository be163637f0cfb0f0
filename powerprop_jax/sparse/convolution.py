"""Convolutions with a sparse kernel, compiled for this processor.

For images [N, H, W, C] in float32 on a CPU, without groups or dilation. Their
source is sparse/native/convolution.cc.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.sparse import native
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.plain_convolution import Window


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolve(
  x: jax.Array, values: jax.Array, index: Index, window: Window
) -> jax.Array:
  """Convolution of images [N, H, W, C] with a sparse kernel, [N, H', W', D].

  All are float32. The values [nnz] of the connections are sorted by output
  channel, the index is one of the kernel as a matrix [height * width * C, D].
  It can be differentiated in reverse mode, once, with respect to x and values.
  Under vmap it goes through the batch one by one.
  """
  shape = window.out_shape(x.shape, index.shape[1])
  call = _call('powerprop_convolve', shape, window)
  return call(index.offsets, index.positions, values, x)


def _forward(
  x: jax.Array, values: jax.Array, index: Index, window: Window
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Index]]:
  return convolve(x, values, index, window), (x, values, index)


def _backward(
  window: Window, saved: tuple[jax.Array, jax.Array, Index], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x, values, index = saved
  to_x = _call('powerprop_convolution_to_input', x.shape, window)
  to_values = _call('powerprop_convolution_to_values', values.shape, window)
  return (
    to_x(index.in_offsets, index.in_positions, values, index.order, dy),
    to_values(index.offsets, index.positions, dy, x),
    None,
  )


convolve.defvjp(_forward, _backward)


def _call(
  name: str, shape: tuple[int, ...], window: Window
) -> functools.partial[jax.Array]:
  (top, _), (left, _) = window.pads
  settings = {
    'kernel_height': window.height,
    'kernel_width': window.width,
    'stride': window.stride,
    'top': top,
    'left': left,
  }
  return functools.partial(
    native.call(name, jax.ShapeDtypeStruct(shape, jnp.float32)),
    **{key: np.int64(value) for key, value in settings.items()},
  )
