"""The pieces our networks are made of, with one choice of initialiser.

Weights are drawn as the authors of Powerpropagation draw them (variance scaling
with scale 1 over the fan-in, normal cut at two standard deviations), biases
start at 0. The output layer of every network is called 'logits'.

How the layers hold their weights is up to whoever makes the network: forms.py.
"""

from collections.abc import Callable
import functools
from typing import Any, TypedDict, Unpack

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.nets.layers import dct, forms, parts

WEIGHT_INIT = hk.initializers.VarianceScaling(1.0, 'fan_in', 'truncated_normal')

_Layer = Callable[[jax.Array], jax.Array]


class Conv2D(hk.Conv2D):
  """hk.Conv2D, on a CPU with gradients that are fast inside loops.

  Parameters and numbers are those of hk.Conv2D. On a CPU it cannot be
  differentiated in forward mode (sparse/plain_convolution.py).
  """

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Activations of an image or a batch of images, in the data format."""
    shape = parts.kernel_shape(self, inputs)
    init = parts.usual_init(self, shape)
    w = hk.get_parameter('w', shape, inputs.dtype, init=init)
    y = parts.convolve(self, inputs, parts.masked(self, w), precision)
    return parts.add_bias(self, y)


class Settings(TypedDict, total=False):
  """Of a layer; what is left out is as in Haiku.

  Attributes:
    with_bias: whether to add a bias; one that a norm follows has no use.
    w_init: WEIGHT_INIT.
    transform_init: the first scale of the transform, in a form that has one; 1.
  """

  with_bias: bool
  w_init: hk.initializers.Initializer | None
  transform_init: float


class ConvSettings(Settings, total=False):
  """Of a convolution.

  Attributes:
    feature_group_count: number of groups of channels that are convolved apart
      from each other; it divides the channels of the input and of the output.
      As many as the input has channels is a depthwise convolution.
  """

  stride: int
  padding: str
  feature_group_count: int


def linear(num_units: int, name: str, **settings: Unpack[Settings]) -> _Layer:
  """A fully connected layer, x W + b, of the form in use (forms.py)."""
  return _layer(hk.Linear, dct.DctLinear, num_units, name=name, **settings)


def conv(
  num_channels: int,
  kernel_size: int,
  name: str,
  **settings: Unpack[ConvSettings],
) -> _Layer:
  """A convolution over height and width, of the form in use (forms.py)."""
  return _layer(
    Conv2D, dct.DctConv2D, num_channels, kernel_size, name=name, **settings
  )


def _layer(
  plain: Callable[..., _Layer],
  transformed: Callable[..., _Layer],
  *shape: int,
  name: str,
  w_init: hk.initializers.Initializer | None = None,
  transform_init: float = 1.0,
  **settings: Any,
) -> _Layer:
  """A layer of the plain or the transformed kind."""
  form = forms.current()
  usual = jnp.zeros if form.has_transform else w_init or WEIGHT_INIT
  first = form.w_init or usual
  if form.variance != 1:
    first = functools.partial(_scaled, first, form.variance**0.5)
  settings |= {'name': name, 'w_init': first}
  if form.has_transform:
    settings |= {'transform_init': transform_init, 'method': form.method}
    return transformed(*shape, **settings)
  return plain(*shape, **settings)


def _scaled(
  init: hk.initializers.Initializer, factor: float, *args: Any
) -> jax.Array:
  return factor * init(*args)


def norm(name: str) -> hk.BatchNorm:
  """Batch normalisation of the deep networks: decay 0.9, epsilon 1e-5.

  These are the values of the code of RigL, and PyTorch's defaults, which that
  of SNFS uses. The running statistics leave out their starting value (they are
  unbiased after one step), so a network that has not taken a step in training
  has none, and cannot be evaluated.
  """
  return hk.BatchNorm(True, True, decay_rate=0.9, eps=1e-5, name=name)


def dropout(x: jax.Array, rate: float) -> jax.Array:
  """Zeroes a random share of x and scales the rest to keep the mean.

  The share is the multiple of 1/256 next to rate, in [0, 1), and below 1: a
  byte decides for each entry, which takes a third of the time of 32 bits.

  In init it does nothing, so that the weights a key gives do not depend on it.
  """
  if hk.running_init():
    return x
  key = hk.maybe_next_rng_key()
  if key is None:
    raise ValueError(
      f'{hk.current_name()} drops activations at random in training and was '
      'given no key. Call net.apply(theta, net_state, key, images, '
      'is_training=True) with a fresh key at every step.'
    )
  num_dropped = min(round(256 * rate), 255)  # Of 256.
  shape = (*x.shape[:-1], -(-x.shape[-1] // 4))
  four = lax.bitcast_convert_type(jax.random.bits(key, shape), jnp.uint8)
  random = four.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
  kept = x * (256 / (256 - num_dropped))
  return jnp.where(random >= num_dropped, kept, jnp.zeros_like(x))


def max_pool(
  x: jax.Array, padding: str = 'SAME', *, size: int = 2
) -> jax.Array:
  """The largest of each size×size patch of [N, H, W, C], with stride 2.

  'SAME' pads, so that half an odd height rounds up; 'VALID' does not, and takes
  only the patches inside.

  Example:
    >>> max_pool(jnp.arange(4.).reshape(1, 2, 2, 1))
    Array([[[[3.]]]], dtype=float32)
  """
  pads = jax.lax.padtype_to_pads(
    x.shape, (1, size, size, 1), (1, 2, 2, 1), padding
  )
  lowest = jnp.array(-jnp.inf, x.dtype)
  x = jax.lax.pad(x, lowest, [(*pad, 0) for pad in pads])
  return _pool(x, size, jnp.maximum)


def avg_pool(x: jax.Array) -> jax.Array:
  """The mean of each 2×2 patch of [N, H, W, C], with stride 2, not padded.

  Example:
    >>> avg_pool(jnp.arange(4.).reshape(1, 2, 2, 1))
    Array([[[[1.5]]]], dtype=float32)
  """
  return _pool(x, 2, jnp.add) / 4


def _pool(
  x: jax.Array, size: int, combine: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  # Combined slices, not hk.max_pool, whose gradient is 15 times slower on a
  # CPU.
  for axis in (1, 2):
    last = x.shape[axis] - size + 1
    slices = [
      jax.lax.slice_in_dim(x, start, start + last, 2, axis)
      for start in range(size)
    ]
    x = functools.reduce(combine, slices)
  return x


def flatten(x: jax.Array) -> jax.Array:
  """[N, ...] as [N, features]."""
  return x.reshape(x.shape[0], -1)


def check_images(images: jax.Array) -> None:
  """Refuses anything but floating-point images [N, H, W, C].

  Example:
    >>> check_images(jnp.zeros((28, 28, 1)))
    Traceback (most recent call last):
      ...
    ValueError: images must have shape [N, H, W, C], got (28, 28, 1).
  """
  if images.ndim != 4:
    hint = ' Rows of a table are rows[:, None, None, :].'
    raise ValueError(
      f'images must have shape [N, H, W, C], got {images.shape}.'
      f'{hint if images.ndim == 2 else ""}'
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'images must be floating-point in [0, 1], got {images.dtype}. '
      'Divide 8-bit images by 255.'
    )
