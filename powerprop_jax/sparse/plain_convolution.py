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

import jax
from jax import lax

# Zeros before and after, for the height and for the width.
Pads = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, w: jax.Array, stride: int, pads: Pads) -> jax.Array:
  """Images [N, H, W, C] convolved with a kernel [height, width, C, D].

  The stride is the same in both directions. It has no forward-mode derivative.
  """
  return _conv(x, w, (stride, stride), pads)


_conv = functools.partial(
  lax.conv_general_dilated, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
)


def _forward(
  x: jax.Array, w: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return convolve(x, w, stride, pads), (x, w)


def _backward(
  stride: int,
  pads: Pads,
  saved: tuple[jax.Array, jax.Array],
  grads: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  to_x, to_w = [], []
  for axis, (before, _) in enumerate(pads):
    size, kernel = x.shape[1 + axis], w.shape[axis]
    # The first to the last position of the kernel.
    span = (grads.shape[1 + axis] - 1) * stride + 1
    to_x.append((kernel - 1 - before, size + before - span))
    to_w.append((before, kernel - 1 + span - size - before))
  once, strides = (1, 1), (stride, stride)
  turned = w[::-1, ::-1].swapaxes(2, 3)
  dx = _conv(grads, turned, once, to_x, lhs_dilation=strides)
  # Channels take the place of the batch, and the batch that of the channels.
  by_channel, as_kernel = x.transpose(3, 1, 2, 0), grads.transpose(1, 2, 0, 3)
  dw = _conv(by_channel, as_kernel, once, to_w, rhs_dilation=strides)
  return dx, dw.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
