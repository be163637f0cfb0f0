"""Small data sets as arrays, and the order in which they are visited.

Data that fits into the device's memory needs no loader: the images are one
array and a batch is a row of indices into it. Three sources have one form:
'digits', which come with scikit-learn; any image data set of TensorFlow
Datasets that lies prepared on disk ('mnist', 'cifar10', …), read without
TensorFlow; and the user's own arrays in a .npz file.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.train.data import sources, text
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError

# Images as they are stored to what the network sees.
Prepare = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data set."""

  # 'digits', 'mnist', 'cifar10', …, as powerprop data lists them, any other
  # prepared image set of TFDS, or FILE.npz; as text 'pydoc' or FILE.txt.
  name: str = 'digits'
  # Folder of data sets. None: $POWERPROP_TFDS_DIR, or ~/tensorflow_datasets.
  dir: str | None = None
  # Training examples, the last ones, held out for validation. None: 240 of the
  # digits, otherwise a tenth, at most 5,000; all that the source sets apart.
  num_validation: int | None = None
  # Of a text: characters that a network sees at a time.
  context: int = 64

  @property
  def is_text(self) -> bool:
    """Whether this is the name of a text."""
    return self.name == text.BUNDLED or self.name.endswith('.txt')


class Splits(NamedTuple):
  """A data set, in memory.

  Attributes:
    train: examples to train on.
    validation: examples to choose settings by.
    test: examples to report.
    num_classes: labels are below it.
    name: what the user called it.
  """

  train: Arrays
  validation: Arrays
  test: Arrays
  num_classes: int
  name: str

  @property
  def is_text(self) -> bool:
    """Whether images are tokens [N, context], and each has a label."""
    return self.train.labels.ndim > 1

  @property
  def example(self) -> jax.Array:
    """The first training image as networks want it, [1, H, W, C], or text."""
    return to_float(self.train.images[:1])


def load(config: DataConfig, *, show_progress: bool = False) -> Splits:
  """Reads a data set into memory, the same way every time.

  Digits are 8×8×1, float32 in [0, 1]: 1,197 to train on, 240 for validation
  and 360 to test on, with the classes in equal shares. TFDS gives uint8, in its
  own order, in which the last 5,000 training examples of MNIST are the
  validation set of the reference recipe. A .npz file holds x_train, y_train,
  x_test and y_test, and maybe x_validation and y_validation; see sources.npz
  for their shapes.

  Returns:
    The splits, none of them empty, as NumPy arrays.

  Example:
    >>> splits = load(DataConfig('digits'))
    >>> [len(split.labels) for split in splits[:3]]
    [1197, 240, 360]
    >>> splits.train.images.shape, splits.num_classes
    ((1197, 8, 8, 1), 10)
  """
  if config.name == 'digits':
    source = sources.digits()
  elif config.name.endswith('.npz'):
    source = sources.npz(config.name)
  elif config.is_text:
    source = text.characters(config.name, config.context)
  else:
    source = sources.named(config.name, config.dir, show_progress)
  train, validation, test, num_classes = source
  if validation is None:
    train, validation = _split_off(train, config)
  elif config.num_validation is not None:
    raise UserError(
      f'{config.name} brings a validation set of {len(validation.labels)} '
      f'examples; leave num_validation out (it is {config.num_validation}).'
    )
  return Splits(train, validation, test, num_classes, config.name)


def _split_off(train: Arrays, config: DataConfig) -> tuple[Arrays, Arrays]:
  size, num = len(train.labels), config.num_validation
  if num is None:
    num = 240 if config.name == 'digits' else min(5000, size // 10)
  if not 0 < num < size:
    raise UserError(
      f'num_validation is {num}, but must be between 1 and {size - 1}: '
      f'{config.name} has {size} examples to train on.'
    )
  return (
    Arrays(train.images[:-num], train.labels[:-num]),
    Arrays(train.images[-num:], train.labels[-num:]),
  )


def check_batch_size(batch_size: int, num_examples: int) -> None:
  """Refuses batches that are larger than the training data, in a UserError."""
  if batch_size > num_examples:
    raise UserError(
      f'a batch of {batch_size:,} is larger than the training data of '
      f'{num_examples:,} examples; choose a smaller batch size.'
    )


def check_images(splits: Splits, option: str) -> None:
  """Refuses an option that is for images where there is text."""
  if splits.is_text:
    raise UserError(
      f'{option} is for images, and {splits.name} is a text. Leave it out.'
    )


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
  """Images as networks want them: uint8 / 255 in float32, others as they are.

  Example:
    >>> to_float(np.array([0, 255], np.uint8))
    Array([0., 1.], dtype=float32)
  """
  images = jnp.asarray(images)
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  return images


def normalise(images: np.ndarray) -> Prepare:
  """The map that gives every channel mean 0 and standard deviation 1.

  The mean and the deviation of each channel are taken over all pixels of the
  training images, [N, H, W, C]. Those of MNIST, in [0, 1], are 0.1307 and
  0.3081.

  Returns:
    A function of images, uint8 or floating, to float32: (x - mean) / deviation,
    after division of uint8 by 255. A constant channel becomes 0.

  Example:
    >>> images = np.array([0., 2., 4.], np.float32).reshape(3, 1, 1, 1)
    >>> normalise(images)(images).ravel().round(4)
    Array([-1.2247,  0.    ,  1.2247], dtype=float32)
  """
  mean, deviation = _moments(images)
  # One multiplication and one addition for every pixel.
  slope = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
  offset = (-mean * slope).astype(np.float32)
  slope = slope.astype(np.float32)

  def prepare(images: Any) -> jax.Array:
    x = to_float(images)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return x * slope.reshape(shape) + offset.reshape(shape)

  return prepare


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each channel, float64[C]."""
  if images.dtype != np.uint8:
    axes = tuple(range(images.ndim - 1))
    mean = np.asarray(np.mean(images, axes, dtype=np.float64))
    return mean, np.asarray(np.std(images, axes, dtype=np.float64))
  # Counting the 256 values needs no copy of the images in floating point.
  levels = np.arange(256) / 255
  channels = images.reshape(-1, images.shape[-1]).T
  counts = np.stack([np.bincount(x, minlength=256) for x in channels])
  share = counts / counts.sum(axis=1, keepdims=True)
  mean = share @ levels
  return mean, np.sqrt(share @ levels**2 - mean**2)


def crop_and_flip(
  key: jax.Array, images: jax.Array, *, padding: int = 4
) -> jax.Array:
  """Shifts each image at random, and mirrors half of them left to right.

  Each image is padded on all sides by reflection, without repeating the edge,
  and a piece of the old size is cut out anywhere. This is the usual
  augmentation of CIFAR. Pixels move and nothing is computed with them, so that
  8-bit images stay 8-bit images.

  Args:
    images: [N, H, W, C], any dtype, H and W greater than padding.
    padding: the largest shift, in pixels, at least 0.

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


def batch_indices(
  key: int, start: int, num_steps: int, batch_size: int, num_examples: int
) -> np.ndarray:
  """Which examples form the batches of a stretch of training steps.

  All examples come once, in a new random order, before any comes again. Batches
  run on over the end of such an epoch, so that each has batch_size examples and
  none is left out. The answer depends on the arguments alone: asking for steps
  [0, 20) gives the same rows as asking for [0, 10) and then [10, 20), and a
  resumed run continues where it was without going through what it has seen.

  Returns:
    int32 [num_steps, batch_size], indices in [0, num_examples), of the steps
    from start on; batch_size may exceed num_examples.

  Example:
    >>> indices = batch_indices(0, 0, 3, 2, num_examples=6)
    >>> sorted(indices.ravel().tolist())
    [0, 1, 2, 3, 4, 5]

  Note:
    NumPy may change its shuffling in a new release; within one version of
    NumPy the order is fixed.
  """
  errors.check_least(0, key=key, start=start, num_steps=num_steps)
  errors.check_least(1, batch_size=batch_size, num_examples=num_examples)
  if num_steps == 0:
    return np.empty((0, batch_size), np.int32)
  first = start * batch_size
  stop = first + num_steps * batch_size
  epochs = range(first // num_examples, (stop - 1) // num_examples + 1)
  parts = []
  for epoch in epochs:
    begin = epoch * num_examples
    order = _order(key, epoch, num_examples)
    parts.append(order[max(0, first - begin) : stop - begin])
  return np.concatenate(parts).reshape(num_steps, batch_size)


# A stretch of steps mostly starts in the epoch where the last one ended.
@functools.lru_cache(maxsize=8)
def _order(key: int, epoch: int, num_examples: int) -> np.ndarray:
  generator = np.random.default_rng((key, epoch))
  order = generator.permutation(num_examples).astype(np.int32)
  order.setflags(write=False)
  return order
