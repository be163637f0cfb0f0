"""Random changes to training images that leave their class alone.

Pure functions of a key and a batch, as make_step wants them. They move pixels
and compute nothing with them, so that 8-bit images stay 8-bit images.
"""

import jax
import jax.numpy as jnp


def crop_and_flip(
  key: jax.Array, images: jax.Array, *, padding: int = 4
) -> jax.Array:
  """Shifts each image at random, and mirrors half of them left to right.

  Each image is padded on all sides by reflection, without repeating the edge,
  and a piece of the old size is cut out anywhere. This is the usual
  augmentation of CIFAR.

  Args:
    key: PRNG key.
    images: [N, H, W, C], any dtype, H and W greater than padding.
    padding: the largest shift, in pixels, at least 0.

  Raises:
    ValueError: if the images are too small to be reflected, or padding is
      negative.

  Example:
    >>> images = jnp.arange(4, dtype=jnp.uint8).reshape(1, 2, 2, 1)
    >>> crop_and_flip(jax.random.key(0), images, padding=0).ravel()  # mirrored
    Array([1, 0, 3, 2], dtype=uint8)
  """
  num, height, width, channels = images.shape
  if not 0 <= padding < min(height, width):
    raise ValueError(
      f'padding must be at least 0 and less than the sides of the images, '
      f'{height} × {width}, got {padding}.'
    )
  shift_key, flip_key = jax.random.split(key)
  sides = (padding, padding)
  padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)), mode='reflect')
  shifts = jax.random.randint(shift_key, (num, 2), 0, 2 * padding + 1)
  cut = jax.vmap(
    lambda image, shift: jax.lax.dynamic_slice(
      image, (shift[0], shift[1], 0), (height, width, channels)
    )
  )(padded, shifts)
  is_mirrored = jax.random.bernoulli(flip_key, shape=(num, 1, 1, 1))
  return jnp.where(is_mirrored, cut[:, :, ::-1], cut)
