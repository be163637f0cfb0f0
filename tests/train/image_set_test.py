"""Sets of image files are found, read and written."""

import pathlib

import image_files
import numpy as np
import pytest
import tensorflow_datasets as tfds

from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images import image_set
from powerprop_jax.train.runs.errors import UserError

COUNT = image_files.COUNT


class SetTest:
  def test_examples_come_as_written(self, images):
    assert images.num_examples == COUNT and images.num_classes == 5
    found = image_set.read(images, [7, 0, 7])
    expected = image_files.examples(COUNT)
    assert found == [expected[7], expected[0], expected[7]]
    folder = pathlib.Path(images.path).parents[1]
    part = image_set.open_set('tiny', str(folder), 'train[20%:50%]')
    assert part.num_examples == 3
    assert image_set.read(part, [0]) == [expected[2]]
    # TFDS itself reads the same.
    builder = tfds.builder_from_directory(images.path)
    example = builder.as_data_source(split='train')[3]
    assert example['label'] == 3 and example['image'].shape == (40, 50, 3)
    assert abs(example['image'].mean() - 30) < 1

  def test_other_sets_of_tfds(self, tfds_dir):
    images = image_set.open_set('cifar10', tfds_dir, 'test')
    assert (images.num_examples, images.num_classes) == (10_000, 10)
    batches = image_files.evaluation(images, image_size=32, fraction=1.0)
    batch, skipped = image_batches.make(batches, 0)
    builder = tfds.builder_from_directory(images.path)
    for row, example in enumerate(
      builder.as_data_source(split='test').__getitems__(range(4))
    ):
      np.testing.assert_array_equal(batch.images[row], example['image'])
      assert batch.labels[row] == example['label']
    assert skipped == []

  def test_what_is_missing_is_named(self, images, tmp_path):
    folder = str(pathlib.Path(images.path).parents[1])
    for name, split, message in (
      ('tyny', 'train', "did you mean 'tiny'"),
      ('tiny', 'test', "tiny has no split 'test'; there are: train"),
      ('tiny', 'train[5:', r'cannot take .train\[5:. of tiny'),
      ('tiny', 'train[:0]', r'train\[:0\] of tiny in .*no examples'),
    ):
      with pytest.raises(UserError, match=message):
        image_set.open_set(name, folder, split)
    with pytest.raises(UserError, match=r'train of tiny in .* has no examples'):
      image_files.make_set(tmp_path, [])

  @pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
      ('label', 'name', 'features are .*; needed are .image. and .label.'),
      ('uint8', 'uint16', 'type uint16; needed are single images of 8'),
    ],
  )
  def test_other_features_are_refused(self, tmp_path, old, new, message):
    image_set.write(tmp_path, 'tiny', {'train': image_files.examples(1)}, 5)
    file = tmp_path / 'tiny/1.0.0/features.json'
    file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
    with pytest.raises(UserError, match=message):
      image_set.open_set('tiny', str(tmp_path), 'train')

  def test_damaged_records_are_refused(self, tmp_path):
    images = image_files.make_set(tmp_path, image_files.examples(20))
    [file] = pathlib.Path(images.path).glob('*array_record*')
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match='cannot read the split train in'):
      image_set.read(images, [0])

  @pytest.mark.parametrize('label', [-1, 5])
  def test_class_out_of_range_is_refused(self, tmp_path, label):
    found = image_files.examples(3)
    found[1] = found[1]._replace(label=label)
    batches = image_files.training(image_files.make_set(tmp_path, found))
    message = f'1.jpg of tiny train has the label {label}, but .* 0 to 4'
    with pytest.raises(UserError, match=message):
      image_batches.make(batches, 0)
