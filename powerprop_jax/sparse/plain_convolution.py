"""A convolution whose gradients stay fast inside compiled loops on a CPU.

XLA reorders the axes of a convolution so that a fast CPU kernel takes it, but
not inside the body of a loop, where a training step of ours runs; there the
gradients of a plain convolution, whose axes come in another order, take 20
times longer (https://github.com/jax-ml/jax/issues/12868). So both gradients are
written here as convolutions whose axes are already in the order that needs no
reordering. The numbers are the same. Other backends have kernels for the
gradients of a convolution, which this form would hide from them.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax


class Window(NamedTuple):
  """How a kernel of this height and width moves over an image."""

  height: int
  width: int
  stride: int  # The same in both directions.
  # Zeros before and after, for the height and for the width.
  pads: tuple[tuple[int, int], tuple[int, int]]

  def out_shape(self, x: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Shape of the convolution of images of shape x [N, H, W, C]."""
    sizes = [
      (size + before + after - length) // self.stride + 1
      for size, (before, after), length in zip(
        x[1:3], self.pads, (self.height, self.width), strict=True
      )
    ]
    return (x[0], *(max(size, 0) for size in sizes), channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, w: jax.Array, window: Window) -> jax.Array:
  """Images [N, H, W, C] convolved with a kernel [height, width, C, D].

  It has no forward-mode derivative.
  """
  return _conv(x, w, (window.stride, window.stride), window.pads)


_conv = functools.partial(
  lax.conv_general_dilated, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
)


def _forward(
  x: jax.Array, w: jax.Array, window: Window
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return convolve(x, w, window), (x, w)


def _backward(
  window: Window, saved: tuple[jax.Array, jax.Array], grads: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  to_x, to_w = [], []
  for axis, (before, _) in enumerate(window.pads):
    size, kernel = x.shape[1 + axis], w.shape[axis]
    # The first to the last position of the kernel.
    span = (grads.shape[1 + axis] - 1) * window.stride + 1
    to_x.append((kernel - 1 - before, size + before - span))
    to_w.append((before, kernel - 1 + span - size - before))
  once, strides = (1, 1), (window.stride, window.stride)
  turned = w[::-1, ::-1].swapaxes(2, 3)
  dx = _conv(grads, turned, once, to_x, lhs_dilation=strides)
  # Channels take the place of the batch, and the batch that of the channels.
  by_channel, as_kernel = x.transpose(3, 1, 2, 0), grads.transpose(1, 2, 0, 3)
  dw = _conv(by_channel, as_kernel, once, to_w, rhs_dilation=strides)
  return dx, dw.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
