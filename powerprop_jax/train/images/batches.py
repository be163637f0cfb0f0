"""Batches of a set of images too large for memory, in a fixed order.

A batch is a pure function of its number: which examples it has, in what order,
how each is cropped. So a stream of them can start anywhere, and is the same
with any number of worker processes; see image_stream.
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

  Attributes:
    fill: writes the batch of a number into arrays, and gives the files that it
      had to do without; it can be pickled.
    num_batches: how many there are; ENDLESS to train on.
    batch_size: examples in a batch, on this host.
    image_size: side of the images, [batch_size, image_size, image_size, 3].
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
  """One batch.

  Args:
    batches: of which sequence.
    number: which one, in [0, batches.num_batches).

  Returns:
    The batch, uint8 images and int32 labels, and the files it does without.
  """
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
  decoder: Decoder | None = None,
) -> Batches:
  """Endless batches of random crops, mirrored half of the time.

  All examples come once, in a new random order, before any comes again. Batches
  run on over the end of such an epoch, so that each is full and no example is
  left out. The hosts' batches of one number are disjoint parts of one batch
  of host_count * batch_size, which does not depend on how many hosts share it.

  A file that is no image, or a damaged one, is replaced by the next good one in
  the order of the files. With nvImageCodec damage below the crop is no damage.

  Args:
    images: what to train on.
    batch_size: examples in a batch of one host, at least 1.
    image_size: side of the square images, at least 1.
    key: seed of orders and crops, at least 0; the same on all hosts.
    host_index: which part is ours, in [0, host_count).
    host_count: number of hosts, at least 1.
    scale: smallest and largest share of an image's area; see random_crop.
    ratio: smallest and largest width / height of a crop.
    decoder: with what to decode; None is the fastest there is.

  Returns:
    Batches of uint8 images [batch_size, image_size, image_size, 3] and int32
    labels [batch_size].

  Raises:
    ValueError: if a number is out of its range.
  """
  _check_sizes(batch_size, image_size, key, host_index, host_count)
  if not 0 < scale[0] <= scale[1] <= 1:
    raise ValueError(f'scale must be in (0, 1] and ordered, got {scale}.')
  if not 0 < ratio[0] <= ratio[1]:
    raise ValueError(f'ratio must be positive and ordered, got {ratio}.')
  fill = functools.partial(
    _training_batch,
    images,
    batch_size,
    key,
    host_index,
    host_count,
    functools.partial(crops.random_crop, scale=scale, ratio=ratio),
    decoder or decode.fastest(),
  )
  total = batch_size * host_count
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
  decoder: Decoder | None = None,
) -> Batches:
  """Batches with every example once, in the order of the files.

  The last batches are filled up with black images of label -1, so that all
  hosts have as many batches, all of them full. A file that is no image, or a
  damaged one, becomes a black image of label -1 too.

  Args:
    images: what to evaluate on.
    batch_size: examples in a batch of one host, at least 1.
    image_size: side of the square images, at least 1.
    host_index: which part is ours, in [0, host_count).
    host_count: number of hosts, at least 1.
    fraction: side of the square cut out of the centre as a share of the shorter
      side, in (0, 1]; 0.875 is 224 of 256.
    decoder: with what to decode; None is the fastest there is.

  Returns:
    Batches of uint8 images [batch_size, image_size, image_size, 3] and int32
    labels [batch_size].

  Raises:
    ValueError: if a number is out of its range.
  """
  _check_sizes(batch_size, image_size, 0, host_index, host_count)
  if not 0 < fraction <= 1:
    raise ValueError(f'fraction must be in (0, 1], got {fraction}.')
  fill = functools.partial(
    _evaluation_batch,
    images,
    batch_size,
    image_size,
    host_index,
    host_count,
    functools.partial(crops.central_crop, fraction=fraction),
    decoder or decode.fastest(),
  )
  total = batch_size * host_count
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

  Args:
    batch_size: examples in a batch of one host, at least 1.
    image_size: side of the square images, at least 1.
    num_classes: labels are below it.
    key: seed of the batch, at least 0.
    host_count: number of hosts, at least 1.
    num_batches: how often it comes.

  Returns:
    Batches of uint8 images [batch_size, image_size, image_size, 3] and int32
    labels [batch_size].

  Raises:
    ValueError: if a number is out of its range.

  Example:
    >>> batches = synthetic_batches(batch_size=2, image_size=8, num_classes=10)
    >>> make(batches, 0)[0].images.shape
    (2, 8, 8, 3)
  """
  _check_sizes(batch_size, image_size, key, 0, host_count)
  shape = (batch_size, image_size, image_size, 3)
  fill = functools.partial(_synthetic_batch, shape, num_classes, key)
  total = batch_size * host_count
  identity: dict[str, int | str] = {'data': 'synthetic', 'key': key}
  return Batches(fill, num_batches, batch_size, image_size, total, identity)


def _check_sizes(
  batch_size: int, image_size: int, key: int, host_index: int, host_count: int
) -> None:
  for name, value, least in (
    ('batch_size', batch_size, 1),
    ('image_size', image_size, 1),
    ('key', key, 0),
    ('host_count', host_count, 1),
  ):
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
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


def _training_batch(
  images: ImageSet,
  batch_size: int,
  key: int,
  host_index: int,
  host_count: int,
  crop: Callable[[Sequence[float], int, int], Crop],
  decoder: Decoder,
  number: int,
  batch: Arrays,
) -> Skipped:
  total = batch_size * host_count
  first = host_index * batch_size
  indices = splits.batch_indices(key, number, 1, total, images.num_examples)[0]
  indices = indices[first : first + batch_size].tolist()
  draws = crops.random_draws(key, number * total + first, batch_size)
  skipped: Skipped = []
  for row, example in enumerate(_read(images, indices)):
    batch.labels[row] = _first_good(
      images,
      indices[row],
      example,
      functools.partial(crop, draws[row]),
      decoder,
      batch.images[row],
      skipped,
    )
  return skipped


def _read(images: ImageSet, indices: Sequence[int]) -> Iterator[Example]:
  for start in range(0, len(indices), _READ_AT_ONCE):
    yield from image_set.read(images, indices[start : start + _READ_AT_ONCE])


def _first_good(
  images: ImageSet,
  index: int,
  example: Example,
  choose: Callable[[int, int], Crop],
  decoder: Decoder,
  out: np.ndarray,
  skipped: Skipped,
) -> int:
  """Decodes an example, or the next one that can be, and gives its label."""
  for offset in range(1, 1 + min(_MAX_SKIPS, images.num_examples)):
    try:
      decode.decode_crop(example.data, choose, len(out), decoder, out)
      return example.label
    except CorruptImageError as error:
      skipped.append((example.name, str(error)))
    following = (index + offset) % images.num_examples
    [example] = image_set.read(images, [following])
  name, defect = skipped[-1]
  raise UserError(
    f'{offset} files in a row of {images.name} {images.split} are no images, '
    f'the last one being {name}: {defect} Prepare the data set again.'
  )


def _evaluation_batch(
  images: ImageSet,
  batch_size: int,
  image_size: int,
  host_index: int,
  host_count: int,
  choose: Callable[[int, int], Crop],
  decoder: Decoder,
  number: int,
  batch: Arrays,
) -> Skipped:
  first = (number * host_count + host_index) * batch_size
  stop = min(first + batch_size, images.num_examples)
  batch.images[:] = 0
  batch.labels[:] = -1
  skipped: Skipped = []
  for row, example in enumerate(_read(images, range(first, stop))):
    try:
      decode.decode_crop(
        example.data, choose, image_size, decoder, batch.images[row]
      )
      batch.labels[row] = example.label
    except CorruptImageError as error:
      skipped.append((example.name, str(error)))
  return skipped


def _synthetic_batch(
  shape: tuple[int, ...],
  num_classes: int,
  key: int,
  number: int,
  batch: Arrays,
) -> Skipped:
  del number
  for to, of in zip(
    batch, _random_arrays(shape, num_classes, key), strict=True
  ):
    to[:] = of
  return []


@functools.lru_cache(maxsize=4)
def _random_arrays(
  shape: tuple[int, ...], num_classes: int, key: int
) -> Arrays:
  generator = np.random.default_rng(key)
  images = generator.integers(0, 256, shape, np.uint8)
  labels = generator.integers(0, num_classes, shape[0], np.int32)
  return Arrays(images, labels)
