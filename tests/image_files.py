"""Image files and data sets of them, for tests."""

import io

import numpy as np
from PIL import Image

from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images import image_set
from powerprop_jax.train.images.image_set import Example

# Examples of the sets that tests share, the fixtures images and damaged.
COUNT = 10


def smooth(seed, height, width):
  """An image without detail, which survives compression and resizing."""
  small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
  image = Image.fromarray(small).resize(
    (width, height), Image.Resampling.BICUBIC
  )
  return np.asarray(image)


def encode(pixels, file_format='JPEG', mode='RGB', **settings):
  file = io.BytesIO()
  image = Image.fromarray(pixels).convert(mode)
  if file_format == 'JPEG':
    settings = {'quality': 95} | settings
  image.save(file, file_format, **settings)
  return file.getvalue()


def examples(count, num_classes=5, height=40, width=50):
  """JPEG files whose pixels are about 10 times their index."""
  return [
    Example(
      encode(np.full((height, width, 3), 10 * index, np.uint8)),
      index % num_classes,
      f'{index}.jpg',
    )
    for index in range(count)
  ]


def damaged(count=COUNT):
  """Examples of which 2, 3 and 9 are no images."""
  found = examples(count)
  found[2] = found[2]._replace(data=found[2].data[:300])
  found[3] = found[3]._replace(data=b'hello')
  found[9] = found[9]._replace(data=b'')
  return found


def make_set(folder, found, name='tiny', split='train', num_classes=5):
  """Writes examples as the split of a data set, and opens it."""
  image_set.write(folder, name, {split: found}, num_classes)
  return image_set.open_set(name, str(folder), split)


def indices(images):
  """Which of examples() each image of a batch is."""
  return np.rint(images.mean((1, 2, 3)) / 10).astype(int).tolist()


def training(images, batch_size=4, image_size=8, **settings):
  share = take_share(batch_size, image_size, settings)
  return image_batches.training_batches(images, share, **settings)


def evaluation(images, batch_size=4, image_size=8, **settings):
  share = take_share(batch_size, image_size, settings)
  return image_batches.evaluation_batches(images, share, **settings)


def take_share(batch_size, image_size, settings):
  index = settings.pop('host_index', 0)
  count = settings.pop('host_count', 1)
  return image_batches.Share(batch_size, image_size, index, count)


def take(stream, count):
  return [next(stream) for _ in range(count)]


def made(batches, count):
  return [image_batches.make(batches, number)[0] for number in range(count)]


def assert_equal(found, expected):
  for batch, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(batch.images, other.images)
    np.testing.assert_array_equal(batch.labels, other.labels)
