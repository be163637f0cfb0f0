"""What is done to images to make a task of them, in NumPy.

Images are [N, H, W, C], uint8 or floating, and keep their type.
"""

import numpy as np

# Images worked on at a time, where there are arrays between.
_BLOCK = 4096
# Shares of red, green and blue in the brightness (ITU-R BT.601).
_BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)


def reorder(images: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Images whose pixel i is the pixel order[i] of the old ones.

  order is a permutation of 0..H·W-1; pixels are counted row by row.

  Example:
    >>> images = np.array([10, 20, 30, 40]).reshape(1, 2, 2, 1)
    >>> reorder(images, np.array([3, 0, 1, 2])).ravel().tolist()
    [40, 10, 20, 30]
  """
  num, height, width, channels = images.shape
  flat = images.reshape(num, height * width, channels)
  return np.take(flat, order, axis=1).reshape(images.shape)


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
  """Images turned about their centre, anticlockwise.

  A pixel of the result is interpolated between the four that it comes to lie
  among; what lies outside counts as 0. Turns of square images by right angles
  are exact.

  Example:
    >>> images = np.array([10, 20, 30, 40]).reshape(1, 2, 2, 1)
    >>> rotate(images, 90).ravel().tolist()
    [20, 40, 10, 30]
  """
  num, height, width, channels = images.shape
  if degrees % 180 == 0 or (degrees % 90 == 0 and height == width):
    return np.rot90(images, int(degrees % 360) // 90, axes=(1, 2)).copy()
  neighbours, shares = _neighbours(height, width, np.deg2rad(degrees))
  flat = images.reshape(num, height * width, channels)
  turned = np.empty_like(flat)
  for start in range(0, num, _BLOCK):
    block = flat[start : start + _BLOCK]
    mixed = sum(
      share[:, None] * np.take(block, neighbour, axis=1)
      for neighbour, share in zip(neighbours, shares, strict=True)
    )
    turned[start : start + _BLOCK] = _like(np.asarray(mixed), images.dtype)
  return turned.reshape(images.shape)


def _neighbours(
  height: int, width: int, angle: float
) -> tuple[np.ndarray, np.ndarray]:
  """Where each pixel comes from: four pixels and their shares, [4, H·W]."""
  down, right = np.mgrid[:height, :width].reshape(2, -1)
  down = down - (height - 1) / 2
  right = right - (width - 1) / 2
  # Rows count downwards, so this is an anticlockwise turn of the image.
  row = np.cos(angle) * down + np.sin(angle) * right + (height - 1) / 2
  column = np.cos(angle) * right - np.sin(angle) * down + (width - 1) / 2
  places, shares = [], []
  for r in (np.floor(row), np.floor(row) + 1):
    for c in (np.floor(column), np.floor(column) + 1):
      share = (1 - np.abs(row - r)) * (1 - np.abs(column - c))
      inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
      place = np.where(inside, r * width + c, 0)
      places.append(place.astype(np.int64))
      shares.append(np.where(inside, share, 0).astype(np.float32))
  return np.stack(places), np.stack(shares)


def fit(
  images: np.ndarray,
  shape: tuple[int, ...] | None,
  is_float: bool = False,
) -> np.ndarray:
  """Images in another shape, without interpolation.

  Colours become their brightness, or grey three equal channels. Images are
  enlarged by the largest whole number with which they fit inside, and what is
  then missing on the sides is filled with 0. Images that are larger than the
  shape lose their margins.

  Args:
    images: [N, H, W, C].
    shape: the new (H, W, C), C being 1 or 3 unless it is that of the images;
      None changes no shape.
    is_float: whether to make float32 of uint8, by division by 255.

  Example:
    >>> images = np.array([1, 2], np.uint8).reshape(1, 1, 2, 1)
    >>> fit(images, (3, 4, 1))[0, :, :, 0].tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0]]
  """
  if shape is not None:
    if len(shape) != 3 or min(shape) < 1:
      raise ValueError(f'shape must be three positive numbers, got {shape}.')
    images = _with_channels(images, shape[2])
    factor = max(
      1, min(shape[axis] // images.shape[axis + 1] for axis in (0, 1))
    )
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = _centred(_centred(images, 1, shape[0]), 2, shape[1])
  if is_float and images.dtype == np.uint8:
    return images.astype(np.float32) / 255
  return images


def _with_channels(images: np.ndarray, channels: int) -> np.ndarray:
  found = images.shape[3]
  if found == channels:
    return images
  if (found, channels) == (1, 3):
    return images.repeat(3, axis=3)
  if (found, channels) == (3, 1):
    grey = np.empty((*images.shape[:3], 1), images.dtype)
    for start in range(0, len(images), _BLOCK):
      block = images[start : start + _BLOCK] @ _BRIGHTNESS
      grey[start : start + _BLOCK, ..., 0] = _like(block, images.dtype)
    return grey
  raise ValueError(
    f'cannot make {channels} channels of {found}; only 3 of 1 and 1 of 3.'
  )


def _centred(images: np.ndarray, axis: int, size: int) -> np.ndarray:
  """Cut or filled up with 0 on both sides of an axis."""
  missing = size - images.shape[axis]
  if missing <= 0:
    start = -missing // 2
    return np.take(images, range(start, start + size), axis=axis)
  width = [(0, 0)] * images.ndim
  width[axis] = (missing // 2, missing - missing // 2)
  return np.pad(images, width)


def _like(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  if dtype.kind in 'iu':
    values = np.rint(values)
  return values.astype(dtype)
