"""Convolutions with a sparse kernel, compiled for this processor.

For images [N, H, W, C] in float32 on a CPU, without groups or dilation. Their
source is sparse/native: images.cc, and pixels.cc for few of them.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.sparse import linear, native
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.plain_convolution import Window

# Images side by side in the kernels, and below which pixels are instead.
_TILE, _FEW = 16, 8


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
  if not values.size or 0 in (*x.shape, *shape):
    return jnp.zeros(shape, x.dtype)
  return _convolve(x, values, index, window, x.shape[1:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(
  x: jax.Array,
  values: jax.Array,
  index: Index,
  window: Window,
  size: tuple[int, int],
) -> jax.Array:
  if x.shape[0] >= _FEW:
    return _forward(x, values, index, window, size)[0]
  shape = window.out_shape(x.shape, index.shape[1])
  call = _call('powerprop_pixels_convolve', shape, window, shape)
  y: jax.Array = call(index.offsets, index.positions, values, x)
  return y


def _forward(
  x: jax.Array,
  values: jax.Array,
  index: Index,
  window: Window,
  size: tuple[int, int],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Index]]:
  del size
  shape = window.out_shape(x.shape, index.shape[1])
  sizes = [
    (size - 1) * window.stride + length
    for size, length in zip(
      shape[1:3], (window.height, window.width), strict=True
    )
  ]
  (top, _), (left, _) = window.pads
  packed = _pack(x, sizes, (top, left))
  call = _call('powerprop_images_convolve', shape, window, shape)
  y = call(index.offsets, index.positions, values, packed)
  return y, (packed, values, index)


def _backward(
  window: Window,
  size: tuple[int, int],
  saved: tuple[jax.Array, jax.Array, Index],
  dy: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
  packed_x, values, index = saved
  reach = [(n - 1) // window.stride for n in (window.height, window.width)]
  sizes = [
    before + max(out, (length - 1 + pad) // window.stride + 1)
    for before, out, length, (pad, _) in zip(
      reach, dy.shape[1:3], size, window.pads, strict=True
    )
  ]
  packed_dy = _pack(dy, sizes, reach)
  shape = (dy.shape[0], *size, packed_x.shape[2])
  to_x = _call('powerprop_images_to_input', shape, window, dy.shape)
  to_values = _call(
    'powerprop_images_to_values', values.shape, window, dy.shape
  )
  return (
    to_x(index.in_offsets, index.in_positions, values, index.order, packed_dy),
    to_values(index.offsets, index.positions, packed_dy, packed_x),
    None,
  )


_convolve.defvjp(_forward, _backward)


def _pack(
  x: jax.Array, sizes: Sequence[int], before: Sequence[int]
) -> jax.Array:
  """Images [N, H, W, C] as the kernels take them, [rows, columns, C, N]."""
  num_images, *_, channels = x.shape
  shape = (*sizes, channels, linear.rounded(num_images, _TILE))
  pads = ((before[0], 0), (before[1], 0))
  call = _call(
    'powerprop_images_pack', shape, Window(1, 1, 1, pads), (1, *sizes)
  )
  return call(x)


def _call(
  name: str, shape: Sequence[int], window: Window, out: Sequence[int]
) -> functools.partial[jax.Array]:
  (top, _), (left, _) = window.pads
  settings = {
    'kernel_height': window.height,
    'kernel_width': window.width,
    'stride': window.stride,
    'top': top,
    'left': left,
    'out_height': out[1],
    'out_width': out[2],
  }
  return functools.partial(
    native.call(name, jax.ShapeDtypeStruct(tuple(shape), jnp.float32)),
    **{key: np.int64(value) for key, value in settings.items()},
  )
