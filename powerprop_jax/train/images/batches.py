"""Batches of a set of images too large for memory, in a fixed order.

A batch is a pure function of its number: which examples it has, in what order,
how each is cropped. So a stream of them can start anywhere, and is the same
with any number of worker processes; see stream.py.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import sys
from typing import NamedTuple

import numpy as np

from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.images import crops, decode, image_set
from powerprop_jax.train.images.crops import Crop
from powerprop_jax.train.images.decode import CorruptImageError
from powerprop_jax.train.images.image_set import Example, ImageSet
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError

# Numbers of batches that only the patience of the user ends.
ENDLESS = sys.maxsize
# Files that are read before the first of them is decoded: more would leave the
# cache of the processor, with fewer the code that reads them would.
_READ_AT_ONCE = 16
# Damaged files in a row after which the data set is taken to be damaged.
_MAX_SKIPS = 100

# Name and defect of each file that a batch had to do without.
Skipped = list[tuple[str, str]]


class Share(NamedTuple):
  """What a host makes of each batch: so many images of a size.

  Attributes:
    batch_size: examples of this host.
    image_size: side of the images.
    host_index: number of this host.
    host_count: hosts that share a batch, as many examples each.
  """

  batch_size: int
  image_size: int
  host_index: int = 0
  host_count: int = 1

  @property
  def total(self) -> int:
    """Examples in a batch, on all hosts."""
    return self.batch_size * self.host_count

  @property
  def first(self) -> int:
    """How many of them come before those of this host."""
    return self.batch_size * self.host_index

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Shape of the images of this host."""
    return self.batch_size, self.image_size, self.image_size, 3

  def check(self) -> None:
    """Refuses numbers that make no sense."""
    errors.check_least(
      1,
      batch_size=self.batch_size,
      image_size=self.image_size,
      host_count=self.host_count,
    )
    if not 0 <= self.host_index < self.host_count:
      raise ValueError(
        f'host_index must be in [0, host_count), got {self.host_index} and '
        f'host_count {self.host_count}.'
      )


class Batches(NamedTuple):
  """A sequence of batches, none of which has been made yet.

  A batch has uint8 images [batch_size, image_size, image_size, 3] and int32
  labels [batch_size].

  Attributes:
    fill: writes the batch of a number into arrays, and gives the files that it
      had to do without.
    num_batches: how many there are; ENDLESS to train on.
    share: what this host has of each.
    identity: what a position in the sequence is only valid for.
  """

  fill: Callable[[int, Arrays], Skipped]
  num_batches: int
  share: Share
  identity: dict[str, int | str]


def make(batches: Batches, number: int) -> tuple[Arrays, Skipped]:
  """The batch of a number below num_batches, and the files it does without."""
  shape = batches.share.shape
  batch = Arrays(np.empty(shape, np.uint8), np.empty(shape[0], np.int32))
  return batch, batches.fill(number, batch)


def training_batches(
  images: ImageSet,
  share: Share,
  *,
  key: int = 0,
  scale: tuple[float, float] = (0.08, 1.0),
) -> Batches:
  """Endless batches of random crops, mirrored half of the time.

  All examples come once, in a new random order, before any comes again. Batches
  run on over the end of such an epoch, so that each is full and no example is
  left out. The hosts' batches of one number are disjoint parts of one batch,
  which does not depend on how many hosts share it.

  A file that is no image, or a damaged one, is replaced by the next good one in
  the order of the files. With nvImageCodec damage below the crop is no damage.

  Orders and crops follow from the key, the same on all hosts. For the scale see
  random_crop.
  """
  share.check()
  errors.check_least(0, key=key)
  if not 0 < scale[0] <= scale[1] <= 1:
    raise ValueError(f'scale must be in (0, 1] and ordered, got {scale}.')
  decode.fastest()

  def fill(number: int, batch: Arrays) -> Skipped:
    total, first = share.total, share.first
    order = splits.batch_indices(key, number, 1, total, images.num_examples)[0]
    indices = order[first : first + share.batch_size].tolist()
    draws = crops.random_draws(key, number * total + first, share.batch_size)
    skipped: Skipped = []
    for row, example in enumerate(_read(images, indices)):
      choose = functools.partial(crops.random_crop, draws[row], scale=scale)
      tries = 0
      while damaged := _put(example, choose, batch, row):
        skipped += damaged
        tries += 1
        if tries == min(_MAX_SKIPS, images.num_examples):
          name, defect = skipped[-1]
          raise UserError(
            f'{tries} files in a row of {images.name} {images.split} are no '
            f'images, the last one being {name}: {defect} Prepare the data set '
            'again.'
          )
        following = (indices[row] + tries) % images.num_examples
        [example] = image_set.read(images, [following])
    return skipped

  return Batches(fill, ENDLESS, share, _identity(images) | {'key': key})


def evaluation_batches(
  images: ImageSet, share: Share, *, fraction: float = 0.875
) -> Batches:
  """Batches with every example once, in the order of the files.

  The last batches are filled up with black images of label -1, so that all
  hosts have as many batches, all of them full. A file that is no image, or a
  damaged one, becomes a black image of label -1 too.

  The fraction is the side of the square cut out of the centre; see
  central_crop.
  """
  share.check()
  if not 0 < fraction <= 1:
    raise ValueError(f'fraction must be in (0, 1], got {fraction}.')
  decode.fastest()
  choose = functools.partial(crops.central_crop, fraction=fraction)

  def fill(number: int, batch: Arrays) -> Skipped:
    first = number * share.total + share.first
    stop = min(first + share.batch_size, images.num_examples)
    batch.images[:] = 0
    batch.labels[:] = -1
    skipped: Skipped = []
    for row, example in enumerate(_read(images, range(first, stop))):
      skipped += _put(example, choose, batch, row)
    return skipped

  num_batches = -(-images.num_examples // share.total)
  return Batches(fill, num_batches, share, _identity(images))


def synthetic_batches(
  share: Share, num_classes: int, key: int = 0, num_batches: int = ENDLESS
) -> Batches:
  """The same random batch again and again, to measure how fast training is.

  Labels are below num_classes; each host has the same images.

  Example:
    >>> batches = synthetic_batches(Share(2, image_size=8), num_classes=10)
    >>> make(batches, 0)[0].images.shape
    (2, 8, 8, 3)
  """
  share.check()
  errors.check_least(0, key=key)

  def fill(number: int, batch: Arrays) -> Skipped:
    del number
    batch.images[:], batch.labels[:] = _random_arrays(share, num_classes, key)
    return []

  identity: dict[str, int | str] = {'data': 'synthetic', 'key': key}
  return Batches(fill, num_batches, share, identity)


@functools.lru_cache(maxsize=4)
def _random_arrays(share: Share, num_classes: int, key: int) -> Arrays:
  generator = np.random.default_rng(key)
  images = generator.integers(0, 256, share.shape, np.uint8)
  labels = generator.integers(0, num_classes, share.batch_size, np.int32)
  return Arrays(images, labels)


def _identity(images: ImageSet) -> dict[str, int | str]:
  return {
    'data': f'{images.name} {images.split}',
    'num_examples': images.num_examples,
  }


def _read(images: ImageSet, indices: Sequence[int]) -> Iterator[Example]:
  for start in range(0, len(indices), _READ_AT_ONCE):
    yield from image_set.read(images, indices[start : start + _READ_AT_ONCE])


def _put(
  example: Example, choose: Callable[[int, int], Crop], batch: Arrays, row: int
) -> Skipped:
  """Makes an example a row of a batch; says so if its file is damaged."""
  out = batch.images[row]
  try:
    decode.decode_crop(example.data, choose, len(out), out=out)
  except CorruptImageError as error:
    return [(example.name, str(error))]
  batch.labels[row] = example.label
  return []
