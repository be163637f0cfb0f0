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
from powerprop_jax.train.images.decode import CorruptImageError, Decoder
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


class Batches(NamedTuple):
  """A sequence of batches, none of which has been made yet.

  A batch has uint8 images [batch_size, image_size, image_size, 3] and int32
  labels [batch_size].

  Attributes:
    fill: writes the batch of a number into arrays, and gives the files that it
      had to do without.
    num_batches: how many there are; ENDLESS to train on.
    batch_size: examples in a batch, on this host.
    image_size: side of the images.
    global_batch_size: examples in a batch, on all hosts.
    identity: what a position in the sequence is only valid for.
  """

  fill: Callable[[int, Arrays], Skipped]
  num_batches: int
  batch_size: int
  image_size: int
  global_batch_size: int
  identity: dict[str, int | str]


def make(batches: Batches, number: int) -> tuple[Arrays, Skipped]:
  """The batch of a number below num_batches, and the files it does without."""
  shape = (batches.batch_size, batches.image_size, batches.image_size, 3)
  batch = Arrays(np.empty(shape, np.uint8), np.empty(shape[0], np.int32))
  return batch, batches.fill(number, batch)


def training_batches(
  images: ImageSet,
  *,
  batch_size: int,
  image_size: int,
  key: int = 0,
  host_index: int = 0,
  host_count: int = 1,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Batches:
  """Endless batches of random crops, mirrored half of the time.

  All examples come once, in a new random order, before any comes again. Batches
  run on over the end of such an epoch, so that each is full and no example is
  left out. The hosts' batches of one number are disjoint parts of one batch
  of host_count * batch_size, which does not depend on how many hosts share it.

  A file that is no image, or a damaged one, is replaced by the next good one in
  the order of the files. With nvImageCodec damage below the crop is no damage.

  The batch_size is that of one host, of which this is number host_index; orders
  and crops follow from the key, the same on all hosts. For scale and ratio see
  random_crop.
  """
  _check_sizes(batch_size, image_size, key, host_index, host_count)
  if not 0 < scale[0] <= scale[1] <= 1:
    raise ValueError(f'scale must be in (0, 1] and ordered, got {scale}.')
  if not 0 < ratio[0] <= ratio[1]:
    raise ValueError(f'ratio must be positive and ordered, got {ratio}.')
  decoder = decode.fastest()
  total = batch_size * host_count
  first = host_index * batch_size

  def fill(number: int, batch: Arrays) -> Skipped:
    order = splits.batch_indices(key, number, 1, total, images.num_examples)[0]
    indices = order[first : first + batch_size].tolist()
    draws = crops.random_draws(key, number * total + first, batch_size)
    skipped: Skipped = []
    for row, example in enumerate(_read(images, indices)):
      choose = functools.partial(
        crops.random_crop, draws[row], scale=scale, ratio=ratio
      )
      tries = 0
      while not _put(example, choose, decoder, batch, row, skipped):
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

  identity = _identity(images) | {'key': key}
  return Batches(fill, ENDLESS, batch_size, image_size, total, identity)


def evaluation_batches(
  images: ImageSet,
  *,
  batch_size: int,
  image_size: int,
  host_index: int = 0,
  host_count: int = 1,
  fraction: float = 0.875,
) -> Batches:
  """Batches with every example once, in the order of the files.

  The last batches are filled up with black images of label -1, so that all
  hosts have as many batches, all of them full. A file that is no image, or a
  damaged one, becomes a black image of label -1 too.

  The settings are those of training_batches, but for fraction: the side of the
  square cut out of the centre; see central_crop.
  """
  _check_sizes(batch_size, image_size, 0, host_index, host_count)
  if not 0 < fraction <= 1:
    raise ValueError(f'fraction must be in (0, 1], got {fraction}.')
  decoder = decode.fastest()
  choose = functools.partial(crops.central_crop, fraction=fraction)
  total = batch_size * host_count

  def fill(number: int, batch: Arrays) -> Skipped:
    first = number * total + host_index * batch_size
    stop = min(first + batch_size, images.num_examples)
    batch.images[:] = 0
    batch.labels[:] = -1
    skipped: Skipped = []
    for row, example in enumerate(_read(images, range(first, stop))):
      _put(example, choose, decoder, batch, row, skipped)
    return skipped

  num_batches = -(-images.num_examples // total)
  identity = _identity(images)
  return Batches(fill, num_batches, batch_size, image_size, total, identity)


def synthetic_batches(
  *,
  batch_size: int,
  image_size: int,
  num_classes: int,
  key: int = 0,
  host_count: int = 1,
  num_batches: int = ENDLESS,
) -> Batches:
  """The same random batch again and again, to measure how fast training is.

  Labels are below num_classes; each host has the same images.

  Example:
    >>> batches = synthetic_batches(batch_size=2, image_size=8, num_classes=10)
    >>> make(batches, 0)[0].images.shape
    (2, 8, 8, 3)
  """
  _check_sizes(batch_size, image_size, key, 0, host_count)

  def fill(number: int, batch: Arrays) -> Skipped:
    del number
    found = _random_arrays(batch.images.shape, num_classes, key)
    batch.images[:], batch.labels[:] = found
    return []

  total = batch_size * host_count
  identity: dict[str, int | str] = {'data': 'synthetic', 'key': key}
  return Batches(fill, num_batches, batch_size, image_size, total, identity)


@functools.lru_cache(maxsize=4)
def _random_arrays(
  shape: tuple[int, ...], num_classes: int, key: int
) -> Arrays:
  generator = np.random.default_rng(key)
  images = generator.integers(0, 256, shape, np.uint8)
  labels = generator.integers(0, num_classes, shape[0], np.int32)
  return Arrays(images, labels)


def _check_sizes(
  batch_size: int, image_size: int, key: int, host_index: int, host_count: int
) -> None:
  sizes = {'batch_size': batch_size, 'image_size': image_size}
  errors.check_least(1, **sizes, host_count=host_count)
  errors.check_least(0, key=key)
  if not 0 <= host_index < host_count:
    raise ValueError(
      f'host_index must be in [0, host_count), got {host_index} and '
      f'host_count {host_count}.'
    )


def _identity(images: ImageSet) -> dict[str, int | str]:
  return {
    'data': f'{images.name} {images.split}',
    'num_examples': images.num_examples,
  }


def _read(images: ImageSet, indices: Sequence[int]) -> Iterator[Example]:
  for start in range(0, len(indices), _READ_AT_ONCE):
    yield from image_set.read(images, indices[start : start + _READ_AT_ONCE])


def _put(
  example: Example,
  choose: Callable[[int, int], Crop],
  decoder: Decoder,
  batch: Arrays,
  row: int,
  skipped: Skipped,
) -> bool:
  """Makes an example a row of a batch, unless its file is damaged."""
  out = batch.images[row]
  try:
    decode.decode_crop(example.data, choose, len(out), decoder, out)
  except CorruptImageError as error:
    skipped.append((example.name, str(error)))
    return False
  batch.labels[row] = example.label
  return True
