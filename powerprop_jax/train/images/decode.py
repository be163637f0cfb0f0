"""From the bytes of an image file to a square of pixels.

OpenCV decodes a JPEG file at a half, a quarter or an eighth of its sides when
the crop to be cut out is large enough for that. Where it is not, nvImageCodec,
if it is installed too, decodes little more than the crop. Both give the same
pixels. A rotation noted in a file is ignored, as TFDS does.
"""

from collections.abc import Callable
import functools
import importlib.util
from typing import Literal, get_args

import numpy as np

from powerprop_jax.train.images import regions
from powerprop_jax.train.images.crops import Crop
from powerprop_jax.train.runs.errors import UserError

Decoder = Literal['nvimgcodec', 'opencv']
# The fastest one first.
DECODERS: tuple[Decoder, ...] = get_args(Decoder)

# JPEG markers that carry the size: start of frame, of any kind of coding.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_REDUCTIONS = (8, 4, 2)


class CorruptImageError(ValueError):
  """A file that is no image, or a damaged one."""


@functools.cache
def installed() -> tuple[Decoder, ...]:
  """The decoders that are installed, the fastest one first."""
  if not importlib.util.find_spec('cv2'):
    return ()
  return DECODERS if regions.is_available() else ('opencv',)


def fastest() -> Decoder:
  """The fastest one of the decoders that are installed.

  Example:
    >>> fastest() in DECODERS
    True
  """
  if installed():
    return installed()[0]
  raise UserError(
    'images are decoded with OpenCV, which is not installed; install it with: '
    "pip install 'powerprop_jax[train]'"
  )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width that the header of a JPEG file states.

  None if it is not a JPEG file, of which the beginning is enough, or its header
  does not say.

  Example:
    >>> jpeg_size(b'no image') is None
    True

  Source:
    ITU-T T.81, annex B.2.
  """
  if data[:2] != b'\xff\xd8':
    return None
  at = 2
  while at + 9 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker in _FRAMES:
      height = int.from_bytes(data[at + 5 : at + 7])
      width = int.from_bytes(data[at + 7 : at + 9])
      return (height, width) if height and width else None
    # A marker may be preceded by any number of 0xFF.
    at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
  return None


def decode(data: bytes, reduction: int = 1) -> np.ndarray:
  """All pixels of an image file, as uint8 [H, W, 3], red, green and blue.

  Grayscale and CMYK are converted. A reduction of 2, 4 or 8 divides the sides.
  By OpenCV, as nvImageCodec is faster with parts alone.

  Raises:
    CorruptImageError: if it is not an image, or a damaged one.
  """
  import cv2

  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  if reduction > 1:
    # By itself it says nothing of colours; that for colours gives blue first.
    flags |= getattr(cv2, f'IMREAD_REDUCED_GRAYSCALE_{reduction}')
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except cv2.error:
    image = None
  if image is None:
    start = data[:4].hex(' ') or 'nothing'
    raise CorruptImageError(
      f'{len(data)} bytes, from {start} on, are no complete image.'
    )
  return image


def decode_crop(
  data: bytes,
  choose: Callable[[int, int], Crop],
  size: int,
  decoder: Decoder | None = None,
  out: np.ndarray | None = None,
) -> np.ndarray:
  """A part of an image file, resized to uint8 [size, size, 3].

  The pixels are interpolated bilinearly. nvImageCodec does not notice damage
  below the part, which is chosen from the height and the width of the image. No
  decoder is fastest(); no out is a new array.

  Raises:
    CorruptImageError: if it is not an image, or a damaged one.

  Example:
    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new('L', (40, 30), color=9).save(file, 'JPEG')
    >>> square = decode_crop(file.getvalue(), lambda h, w: Crop(0, 0, h, w), 2)
    >>> square[..., 0]
    array([[9, 9],
           [9, 9]], dtype=uint8)
  """
  decoder = decoder or fastest()
  if out is None:
    out = np.empty((size, size, 3), np.uint8)
  stated, crop, reduction = jpeg_size(data), None, 1
  if stated is not None:
    crop = choose(*stated)
    # Enough pixels must remain that the crop is not enlarged on that account.
    room = min(crop.height, crop.width) // size
    reduction = next((r for r in _REDUCTIONS if r <= room), 1)
    if decoder == 'nvimgcodec' and reduction == 1:
      part = regions.decode(data, _box(crop, 1))
      if part is not None:
        _resize(part, crop.is_mirrored, out)
        return out
  image = decode(data, reduction)
  found = image.shape[:2]
  if stated and found != tuple(-(-side // reduction) for side in stated):
    raise CorruptImageError(
      f'its header states {stated[0]} × {stated[1]} pixels, but it has '
      f'{found[0]} × {found[1]} when divided by {reduction}.'
    )
  crop = crop or choose(*found)
  top, left, bottom, right = _box(crop, reduction)
  _resize(image[top:bottom, left:right], crop.is_mirrored, out)
  return out


def _box(crop: Crop, reduction: int) -> tuple[int, int, int, int]:
  """(top, left, bottom, right) in an image with its sides divided."""
  top, left = crop.top // reduction, crop.left // reduction
  bottom = max(top + 1, (crop.top + crop.height) // reduction)
  right = max(left + 1, (crop.left + crop.width) // reduction)
  return top, left, bottom, right


def _resize(part: np.ndarray, is_mirrored: bool, out: np.ndarray) -> None:
  import cv2

  if is_mirrored:
    # Before it is resized, while it is in the cache, where out may not be.
    part = cv2.flip(part, 1)
  cv2.resize(part, out.shape[:2], dst=out, interpolation=cv2.INTER_LINEAR)
