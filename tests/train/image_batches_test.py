"""Batches have the examples they should, cropped as they should be."""

import functools

import image_files
import jax
import numpy as np
import pytest

from powerprop_jax.train.data import splits
from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images import crops, decode, image_set
from powerprop_jax.train.images.stream import Stream
from powerprop_jax.train.runs.errors import UserError

COUNT = image_files.COUNT


class TrainingTest:
  def test_batches_follow_the_order_and_are_cropped_by_it(self, images):
    found = image_files.made(image_files.training(images, key=3), 6)
    order = splits.batch_indices(3, 0, 6, 4, COUNT)
    examples = image_files.examples(COUNT)
    for number, batch in enumerate(found):
      assert image_files.indices(batch.images) == order[number].tolist()
      assert batch.labels.tolist() == (order[number] % 5).tolist()
      assert batch.images.dtype == np.uint8 and batch.labels.dtype == np.int32
      draws = crops.random_draws(3, 4 * number, 4)
      for row, index in enumerate(order[number].tolist()):
        expected = decode.decode_crop(
          examples[index].data,
          functools.partial(crops.random_crop, draws[row]),
          8,
        )
        np.testing.assert_array_equal(batch.images[row], expected)

  def test_crops_differ_between_epochs_and_keys(self, tmp_path):
    pixels = image_files.smooth(0, 60, 80)
    example = image_set.Example(image_files.encode(pixels), 0, 'one')
    images = image_files.make_set(tmp_path, [example])
    first, second = image_files.made(image_files.training(images, 1), 2)
    [other] = image_files.made(image_files.training(images, 1, key=1), 1)
    assert (first.images != second.images).any()
    assert (first.images != other.images).any()

  @pytest.mark.parametrize('count', [2, 3])
  def test_hosts_share_one_batch(self, images, count):
    alone = image_files.made(image_files.training(images, batch_size=6), 5)
    shares = (
      image_files.training(images, 6 // count, host_index=i, host_count=count)
      for i in range(count)
    )
    parts = [image_files.made(share, 5) for share in shares]
    together = jax.tree.map(lambda *each: np.concatenate(each), *parts)
    image_files.assert_equal(together, alone)

  def test_damaged_files_are_replaced_by_the_next_good_one(self, damaged):
    batches = image_files.training(damaged, batch_size=5)
    order = splits.batch_indices(0, 0, 2, 5, COUNT)
    names = []
    for number in range(2):
      batch, skipped = image_batches.make(batches, number)
      replaced = [{2: 4, 3: 4, 9: 0}.get(i, i) for i in order[number].tolist()]
      assert image_files.indices(batch.images) == replaced
      assert batch.labels.tolist() == [i % 5 for i in replaced]
      names += [name for name, _ in skipped]
    assert sorted(names) == ['2.jpg', '3.jpg', '3.jpg', '9.jpg']

  def test_a_set_of_damaged_files_is_refused(self, tmp_path):
    found = [e._replace(data=b'x') for e in image_files.examples(3)]
    images = image_files.make_set(tmp_path, found)
    message = '3 files in a row of tiny train are no images, the last one being'
    with pytest.raises(UserError, match=message):
      image_batches.make(image_files.training(images), 0)

  @pytest.mark.parametrize(
    ('settings', 'message'),
    [
      ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
      ({'image_size': 0}, 'image_size must be at least 1, got 0'),
      ({'key': -1}, 'key must be at least 0, got -1'),
      ({'host_count': 0}, 'host_count must be at least 1, got 0'),
      ({'host_index': 2, 'host_count': 2}, 'host_index must be in .*got 2'),
      ({'scale': (0, 1)}, r'scale must be in \(0, 1\]'),
    ],
  )
  def test_numbers_out_of_range_are_refused(self, images, settings, message):
    with pytest.raises(ValueError, match=message):
      image_files.training(images, **settings)
    with pytest.raises(ValueError, match=r'fraction must be in \(0, 1\]'):
      image_files.evaluation(images, fraction=1.5)


class EvaluationTest:
  @pytest.mark.parametrize('count', [1, 2, 3])
  @pytest.mark.parametrize('batch_size', [1, 4, 20])
  def test_every_example_comes_once(self, images, batch_size, count):
    found = []
    for index in range(count):
      batches = image_files.evaluation(
        images, batch_size, host_index=index, host_count=count
      )
      assert batches.num_batches == -(-COUNT // (batch_size * count))
      for batch in image_files.made(batches, batches.num_batches):
        assert batch.images.shape == (batch_size, 8, 8, 3)
        real = batch.labels >= 0
        assert (batch.labels[~real] == -1).all()
        assert not batch.images[~real].any()
        indices = image_files.indices(batch.images[real])
        assert batch.labels[real].tolist() == [i % 5 for i in indices]
        found += indices
    assert sorted(found) == list(range(COUNT))

  def test_damaged_files_have_no_label(self, damaged):
    batch, skipped = image_batches.make(
      image_files.evaluation(damaged, COUNT), 0
    )
    assert batch.labels.tolist() == [0, 1, -1, -1, 4, 0, 1, 2, 3, -1]
    assert [name for name, _ in skipped] == ['2.jpg', '3.jpg', '9.jpg']
    assert (
      skipped[1][1] == '5 bytes, from 68 65 6c 6c on, are no complete image.'
    )

  def test_images_are_those_of_the_official_sample(self, tfds_dir):
    images = image_set.open_set('imagenet2012', tfds_dir, 'validation')
    batches = image_files.evaluation(images, batch_size=64, image_size=32)
    with Stream(batches) as stream:
      labels = np.concatenate([batch.labels for batch in stream])
      assert stream.num_skipped == 0
    assert sorted(labels[:100].tolist()) == list(range(3, 1000, 10))
    assert (labels[100:] == -1).all() and len(labels) == 128


def test_synthetic_batches_are_one_batch():
  batches = image_batches.synthetic_batches(
    image_batches.Share(6, 8), num_classes=3, num_batches=2
  )
  with Stream(batches) as stream:
    first, second = stream
  image_files.assert_equal([first], [second])
  assert first.images.shape == (6, 8, 8, 3) and first.images.std() > 50
  assert set(first.labels.tolist()) <= {0, 1, 2}
