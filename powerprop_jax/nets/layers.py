"""The pieces our networks are made of, with one choice of initialiser.

Weights are drawn as the authors of Powerpropagation draw them (variance scaling
with scale 1 over the fan-in, normal cut at two standard deviations), biases
start at 0. The output layer of every network is called 'logits'.
"""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import convolution

WEIGHT_INIT = hk.initializers.VarianceScaling(1.0, 'fan_in', 'truncated_normal')


def linear(num_units: int, name: str) -> hk.Linear:
  """A fully connected layer, x W + b.

  Args:
    num_units: size of the last axis of its output.
    name: name of the module.

  Returns:
    The Haiku module; use it inside a transformed function.
  """
  return hk.Linear(num_units, w_init=WEIGHT_INIT, name=name)


def conv(
  num_channels: int,
  kernel_size: int,
  name: str,
  *,
  stride: int = 1,
  padding: str = 'SAME',
) -> Callable[[jax.Array], jax.Array]:
  """A convolution over height and width, with a bias.

  On a CPU it is convolution.Conv2D, which has the same parameters and numbers
  as hk.Conv2D and gradients that are fast inside loops.

  Args:
    num_channels: size of the last axis of its output.
    kernel_size: height and width of the kernel.
    name: name of the module.
    stride: step of the kernel, the same in both directions.
    padding: 'SAME' or 'VALID'.

  Returns:
    The Haiku module; use it inside a transformed function.
  """
  on_cpu = jax.default_backend() == 'cpu'
  module = convolution.Conv2D if on_cpu else hk.Conv2D
  return module(
    num_channels,
    kernel_size,
    stride=stride,
    padding=padding,
    w_init=WEIGHT_INIT,
    name=name,
  )


def max_pool(x: jax.Array, padding: str = 'SAME') -> jax.Array:
  """The largest of each 2×2 patch of [N, H, W, C], with stride 2.

  Args:
    x: activations [N, H, W, C].
    padding: 'SAME' rounds an odd size up, 'VALID' rounds it down.

  Returns:
    Activations of about half the height and width.

  Example:
    >>> max_pool(jnp.arange(4.).reshape(1, 2, 2, 1))
    Array([[[[3.]]]], dtype=float32)
  """
  # The larger of slices, not hk.max_pool, whose gradient is 15 times slower on
  # a CPU. Padded with -∞, or cropped, to an even size.
  odd = [size % 2 for size in x.shape[1:3]]
  if padding == 'SAME':
    pads = [(0, 0, 0), (0, odd[0], 0), (0, odd[1], 0), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
  else:
    x = x[:, : x.shape[1] - odd[0], : x.shape[2] - odd[1]]
  rows = jnp.maximum(x[:, ::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def flatten(x: jax.Array) -> jax.Array:
  """[N, ...] as [N, features]."""
  return x.reshape(x.shape[0], -1)


def check_images(images: jax.Array) -> None:
  """Refuses anything but floating-point images [N, H, W, C].

  Args:
    images: what a network was given.

  Raises:
    ValueError: naming the shape or the type that was found.

  Example:
    >>> check_images(jnp.zeros((28, 28, 1)))
    Traceback (most recent call last):
      ...
    ValueError: images must have shape [N, H, W, C], got (28, 28, 1).
  """
  if images.ndim != 4:
    raise ValueError(
      f'images must have shape [N, H, W, C], got {images.shape}.'
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'images must be floating-point in [0, 1], got {images.dtype}. '
      'Divide 8-bit images by 255.'
    )
