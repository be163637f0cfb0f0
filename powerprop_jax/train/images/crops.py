"""Which part of an image of any size becomes a square one.

Crops are chosen from the size of an image alone, before it is decoded, so that
a decoder may leave out the detail that the crop does not need.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

_TRIES = 10
# Random numbers that a random crop takes: four for each try, one to mirror it.
_NUM_DRAWS = 4 * _TRIES + 1


class Crop(NamedTuple):
  """A rectangle of an image, in pixels; mirrored, left and right swap."""

  top: int
  left: int
  height: int
  width: int
  is_mirrored: bool = False


def random_draws(key: int, start: int, count: int) -> list[list[float]]:
  """Numbers for random_crop, for count images of a stream, from start on.

  They are uniform in [0, 1), and depend on the key and on the number of the
  image alone. Drawing for many images at once takes a twentieth of the time
  that a generator for each takes.

  Example:
    >>> random_draws(0, 3, 2) == random_draws(0, 0, 5)[3:]
    True
  """
  # Apart from the orders of data.batch_indices, whose seeds are (key, epoch).
  bits = np.random.PCG64(np.random.SeedSequence(key, spawn_key=(1,)))
  bits.advance(start * _NUM_DRAWS)
  return np.random.Generator(bits).random((count, _NUM_DRAWS)).tolist()


def random_crop(
  draws: Sequence[float],
  height: int,
  width: int,
  *,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
  """A random rectangle, mirrored half of the time, to train on.

  The share of the area is uniform in scale and the logarithm of width / height
  uniform in that of ratio; the place is uniform among those that fit. If ten
  such rectangles do not fit, the largest one in the centre whose width / height
  is in ratio is taken. The draws are those of one image, from random_draws.

  Example:
    >>> [draws] = random_draws(key=0, start=0, count=1)
    >>> random_crop(draws, 100, 100, scale=(1, 1), ratio=(1, 1))[:4]
    (0, 0, 100, 100)

  Source:
    Szegedy et al., Going Deeper with Convolutions, 2015, section 6
    (https://arxiv.org/abs/1409.4842).
  """
  is_mirrored = draws[-1] < 0.5
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for at in range(0, 4 * _TRIES, 4):
    share, shape, down, right = draws[at : at + 4]
    area = height * width * (scale[0] + share * (scale[1] - scale[0]))
    aspect = math.exp(low + shape * (high - low))
    columns = max(1, round(math.sqrt(area * aspect)))
    rows = max(1, round(math.sqrt(area / aspect)))
    if rows <= height and columns <= width:
      top = int(down * (height - rows + 1))
      left = int(right * (width - columns + 1))
      return Crop(top, left, rows, columns, is_mirrored)
  rows = max(1, min(height, round(width / ratio[0])))
  columns = max(1, min(width, round(height * ratio[1])))
  return _centre(height, width, rows, columns)._replace(is_mirrored=is_mirrored)


def central_crop(height: int, width: int, *, fraction: float = 0.875) -> Crop:
  """The square in the centre, to evaluate on.

  Its side is a fraction, in (0, 1], of the shorter side of the image. Resized
  to 224 × 224, the default is what is left of an image whose shorter side was
  resized to 256 when its central 224 × 224 pixels are cut out.

  Example:
    >>> central_crop(256, 512)
    Crop(top=16, left=144, height=224, width=224, is_mirrored=False)
  """
  side = max(1, round(fraction * min(height, width)))
  return _centre(height, width, side, side)


def _centre(height: int, width: int, rows: int, columns: int) -> Crop:
  return Crop((height - rows) // 2, (width - columns) // 2, rows, columns)
