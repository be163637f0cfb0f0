"""Which images are trained and evaluated on, from settings."""

import dataclasses
from typing import NamedTuple

from powerprop_jax.train.images import batches, image_set
from powerprop_jax.train.images.batches import Batches, Share
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError

# Batches that an evaluation on random images takes.
_SYNTHETIC_TEST = 4


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
  """Where images come from."""

  # Name of a TFDS image classification set.
  name: str = 'imagenet2012'
  # Folder of the prepared data sets. Default: ~/tensorflow_datasets.
  dir: str | None = None
  # Split to train on, as TFDS writes it: 'train', 'train[:90%]', …
  train: str = 'train'
  # Split to evaluate on.
  test: str = 'validation'
  # Side of the square images that the network sees.
  image_size: int = 224
  # Smallest share of an image's area that a training crop shows, in (0, 1].
  smallest_crop: float = 0.08
  # Processes that decode, on each host; 0 decodes between steps.
  workers: int = 8
  # Examples in a batch of evaluation, on all hosts together. Default: those of
  # training.
  test_batch: int | None = None
  # One batch of random pixels again and again instead, to measure the speed.
  synthetic: bool = False
  # Classes that random images pretend to have.
  synthetic_classes: int = 1000
  # Training examples that random images pretend to be.
  synthetic_examples: int = 1_281_167


class Images(NamedTuple):
  """The batches of one host.

  Attributes:
    num_examples: of the training split.
    num_classes: labels are below it.
    train: endless.
    test: every example of the other split once.
  """

  num_examples: int
  num_classes: int
  train: Batches
  test: Batches


def open_images(
  config: ImagesConfig,
  batch_size: int,
  *,
  key: int = 0,
  host_index: int = 0,
  host_count: int = 1,
) -> Images:
  """Finds the data set and describes the batches of this host.

  The batch_size counts the examples of all hosts together.

  Example:
    >>> config = ImagesConfig(synthetic=True, image_size=8)
    >>> open_images(config, 4).train.share.total
    4
  """
  _check(config)
  sizes = batch_size, config.test_batch or batch_size
  for size in sizes:
    errors.check_shares(size, host_count, 'hosts')
  own, own_test = (
    Share(size // host_count, config.image_size, host_index, host_count)
    for size in sizes
  )
  if config.synthetic:
    classes = config.synthetic_classes
    return Images(
      config.synthetic_examples,
      classes,
      batches.synthetic_batches(own, classes, key),
      batches.synthetic_batches(own_test, classes, key, _SYNTHETIC_TEST),
    )
  train = image_set.open_set(config.name, config.dir, config.train)
  test = image_set.open_set(config.name, config.dir, config.test)
  scale = (config.smallest_crop, 1.0)
  return Images(
    train.num_examples,
    train.num_classes,
    batches.training_batches(train, own, key=key, scale=scale),
    batches.evaluation_batches(test, own_test),
  )


def _check(config: ImagesConfig) -> None:
  errors.check_positive(
    config,
    *('image_size', 'test_batch', 'synthetic_classes', 'synthetic_examples'),
    prefix='--data.',
  )
  errors.check(config, '--data.workers', config.workers >= 0, 'at least 0')
  if not 0 < config.smallest_crop <= 1:
    raise UserError(
      f'--data.smallest-crop must be in (0, 1], got {config.smallest_crop:g}.'
    )
