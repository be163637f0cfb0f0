"""A convolution whose gradients stay fast inside compiled loops on a CPU.

XLA reorders the axes of a convolution so that a fast CPU kernel takes it, but
not inside the body of a loop, where a training step of ours runs; there the
gradients of a plain convolution, whose axes come in another order, take 20
times longer (https://github.com/jax-ml/jax/issues/12868). So both gradients are
written here as convolutions whose axes are already in the order that needs no
reordering. The numbers are the same. Other backends have kernels for the
gradients of a convolution, which this form would hide from them.
"""

from collections.abc import Sequence
import functools

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

Pads = tuple[tuple[int, int], tuple[int, int]]


class Conv2D(hk.Module):
  """A convolution over height and width, as hk.Conv2D.

  Its parameters have the names and shapes of those of hk.Conv2D. It cannot be
  differentiated in forward mode (jax.jvp).

  Args:
    num_channels: size of the last axis of its output.
    kernel_size: height and width of the kernel.
    stride: step of the kernel, the same in both directions.
    padding: 'SAME' or 'VALID'.
    with_bias: whether to add a bias, which starts at 0.
    w_init: initialiser of the kernel.
    name: name of the module.
  """

  def __init__(
    self,
    num_channels: int,
    kernel_size: int,
    *,
    stride: int,
    padding: str,
    with_bias: bool = True,
    w_init: hk.initializers.Initializer,
    name: str,
  ):
    super().__init__(name=name)
    self._num_channels = num_channels
    self._window = (kernel_size, kernel_size)
    self._stride = stride
    self._padding = padding
    self._with_bias = with_bias
    self._w_init = w_init

  def __call__(self, x: jax.Array) -> jax.Array:
    """Activations [N, H', W', num_channels] of [N, H, W, C]."""
    shape = (*self._window, x.shape[-1], self._num_channels)
    w = hk.get_parameter('w', shape, x.dtype, init=self._w_init)
    pads = lax.padtype_to_pads(
      x.shape[1:3], self._window, (self._stride, self._stride), self._padding
    )
    y = convolve(x, w, self._stride, tuple(pads))
    if not self._with_bias:
      return y
    b = hk.get_parameter('b', shape[-1:], x.dtype, init=jnp.zeros)
    return y + jnp.broadcast_to(b, y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, w: jax.Array, stride: int, pads: Pads) -> jax.Array:
  """Convolution of images with a kernel.

  Args:
    x: activations [N, H, W, C].
    w: kernel [height, width, C, D].
    stride: step of the kernel, the same in both directions.
    pads: zeros before and after, for the height and for the width.

  Returns:
    Activations [N, H', W', D].
  """
  return _conv(x, w, pads, window_strides=(stride, stride))


def _conv(
  x: jax.Array,
  w: jax.Array,
  pads: Sequence[tuple[int, int]],
  *,
  window_strides: tuple[int, int] = (1, 1),
  lhs_dilation: tuple[int, int] = (1, 1),
  rhs_dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
  return lax.conv_general_dilated(
    x,
    w,
    window_strides,
    pads,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
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
  strides = (stride, stride)
  turned = w[::-1, ::-1].swapaxes(2, 3)
  dx = _conv(grads, turned, to_x, lhs_dilation=strides)
  # Channels take the place of the batch, and the batch that of the channels.
  dw = _conv(
    x.transpose(3, 1, 2, 0),
    grads.transpose(1, 2, 0, 3),
    to_w,
    rhs_dilation=strides,
  )
  return dx, dw.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
