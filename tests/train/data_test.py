"""Data is what it says it is, and comes in a reproducible order."""

import hashlib
import json
import re
import shutil

import image_files
import numpy as np
import pytest

from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs.errors import UserError


def digest(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def refusal(config):
  """The message with which a configuration is refused: a single line."""
  with pytest.raises(UserError) as caught:
    data.load(config)
  assert '\n' not in str(caught.value)
  return str(caught.value)


class DigitsTest:
  def test_they_are_what_they_are_and_their_split_never_changes(self):
    splits = data.load(DataConfig())
    assert (splits.name, splits.num_classes) == ('digits', 10)
    total = np.zeros(10)
    for split, size in zip(splits[:3], (1197, 240, 360), strict=True):
      assert split.images.shape == (size, 8, 8, 1)
      assert split.images.dtype == np.float32
      assert (split.images.min(), split.images.max()) == (0, 1)
      assert (split.labels.shape, split.labels.dtype) == ((size,), np.int32)
      counts = np.bincount(split.labels, minlength=10)
      total += counts
      assert np.abs(counts - size * np.array(CLASS_SIZES) / 1797).max() <= 1
    assert total.tolist() == CLASS_SIZES
    rows = np.concatenate([s.images.reshape(-1, 64) for s in splits[:3]])
    assert len(np.unique(rows, axis=0)) == 1797
    assert [digest(split.labels) for split in splits[:3]] == DIGEST_LABELS
    assert digest(splits.test.images) == DIGEST_TEST_IMAGES

  def test_size_of_validation_can_be_chosen(self):
    splits = data.load(DataConfig(num_validation=37))
    assert len(splits.validation.labels) == 37
    assert len(splits.train.labels) == 1400


CLASS_SIZES = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
DIGEST_LABELS = ['c7437d81a8614edb', '7dcb6dcbeea83bff', '65f5f3d5ddd68e84']
DIGEST_TEST_IMAGES = '293d111bff44e04f'


def make_arrays(train=40, test=10, shape=(5, 4), dtype=np.uint8):
  rng = np.random.default_rng(0)
  arrays = {}
  for name, size in (('train', train), ('test', test)):
    arrays[f'x_{name}'] = rng.integers(0, 256, (size, *shape)).astype(dtype)
    arrays[f'y_{name}'] = np.arange(size) % 3
  return arrays


class NpzTest:
  def load(self, tmp_path, arrays):
    np.savez(tmp_path / 'my.npz', **arrays)
    return data.load(DataConfig(str(tmp_path / 'my.npz')))

  @pytest.mark.parametrize(
    ('shape', 'expected'),
    [((5, 4), (5, 4, 1)), ((5, 4, 3), (5, 4, 3)), ((7,), (1, 1, 7))],
  )
  @pytest.mark.parametrize('dtype', [np.uint8, np.float64, np.float16])
  def test_arrays_come_as_saved(self, tmp_path, shape, expected, dtype):
    arrays = make_arrays(shape=shape, dtype=dtype)
    splits = self.load(
      tmp_path, arrays | {'y_train': arrays['y_train'][:, None]}
    )
    assert splits.num_classes == 3
    assert splits.train.images.shape == (36, *expected)
    assert splits.validation.images.shape == (4, *expected)
    kind = np.uint8 if dtype == np.uint8 else np.float32
    assert splits.train.images.dtype == kind
    both = np.concatenate([splits.train.images, splits.validation.images])
    assert (both.reshape(arrays['x_train'].shape) == arrays['x_train']).all()
    assert (splits.test.labels == arrays['y_test']).all()
    assert splits.test.labels.dtype == np.int32

  def test_own_validation_is_used(self, tmp_path):
    arrays = make_arrays()
    arrays['x_validation'] = arrays['x_test'][:3]
    arrays['y_validation'] = arrays['y_test'][:3]
    splits = self.load(tmp_path, arrays)
    assert len(splits.train.labels) == 40
    assert (splits.validation.images[..., 0] == arrays['x_test'][:3]).all()


class TfdsFolderTest:
  """What is refused before TFDS is asked, and so without a network."""

  def test_missing_data_set_says_what_is_there(self, tmp_path):
    for name in ('cifar10/3.0.2', 'cifar10/3.0.1', 'emnist/letters/3.1.0'):
      (tmp_path / name).mkdir(parents=True)
      (tmp_path / name / 'dataset_info.json').write_text('{}')
    message = refusal(DataConfig('mnist', str(tmp_path)))
    assert 'it has cifar10, emnist/letters' in message

  @pytest.mark.parametrize('info', ['{}', '{"fileFormat": "tfrecord"}'])
  def test_tfrecord_is_refused(self, tmp_path, info):
    told = {
      'mnist': f'download it: powerprop data get mnist --dir {tmp_path}',
      'stl10': "in another folder, prepare it .*file_format='array_record'",
    }
    for name, how in told.items():
      (tmp_path / name / '3.0.1').mkdir(parents=True)
      (tmp_path / name / '3.0.1/dataset_info.json').write_text(info)
      message = refusal(DataConfig(name, str(tmp_path)))
      assert 'holds tfrecord files' in message
      assert re.search(how, message)


class TfdsTest:
  @pytest.mark.slow
  def test_mnist_is_the_official_one(self, tfds_dir):
    splits = data.load(DataConfig('mnist', tfds_dir))
    sizes = [len(split.labels) for split in splits[:3]]
    assert (splits.num_classes, sizes) == (10, [55_000, 5_000, 10_000])
    assert splits.train.images.shape == (55_000, 28, 28, 1)
    assert splits.train.images.dtype == np.uint8
    assert splits.train.labels[:8].tolist() == [4, 1, 0, 7, 8, 1, 2, 7]
    labels = np.concatenate([splits.train.labels, splits.validation.labels])
    assert np.bincount(labels).tolist() == [
      5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    images = np.concatenate([splits.train.images, splits.validation.images])
    assert round(images.mean() / 255, 4) == 0.1307
    assert round(images.std() / 255, 4) == 0.3081

  @pytest.mark.slow
  def test_cifar10_is_read(self, tfds_dir):
    splits = data.load(DataConfig('cifar10', tfds_dir, num_validation=1))
    assert splits.train.images.shape == (49_999, 32, 32, 3)
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10

  def test_images_of_many_sizes_are_refused(self, tmp_path):
    image_files.make_set(tmp_path, image_files.examples(2))
    message = refusal(DataConfig('tiny', str(tmp_path)))
    assert 'images of shape (None, None, 3)' in message

  def test_damaged_files_are_refused(self, tfds_dir, tmp_path):
    shutil.copytree(f'{tfds_dir}/mnist', tmp_path / 'mnist')
    version = tmp_path / 'mnist/3.0.1'
    version.chmod(0o755)
    for record in version.glob('*test*'):
      record.chmod(0o644)
      record.write_bytes(record.read_bytes()[:100_000])
    assert 'cannot read the split test' in refusal(
      DataConfig('mnist', str(tmp_path))
    )
    for record in version.glob('*train*'):
      record.unlink()
    message = refusal(DataConfig('mnist', str(tmp_path)))
    assert 'cannot read the split train' in message
    assert 'Delete that folder and download it: powerprop' in message

  @pytest.mark.slow
  def test_newest_version_is_read(self, tfds_dir, tmp_path):
    shutil.copytree(f'{tfds_dir}/mnist', tmp_path / 'mnist')
    (tmp_path / 'mnist').chmod(0o755)
    older = tmp_path / 'mnist/2.10.0'
    older.mkdir()
    info = {'fileFormat': 'tfrecord'}
    (older / 'dataset_info.json').write_text(json.dumps(info))
    splits = data.load(DataConfig('mnist', str(tmp_path)))
    assert len(splits.test.labels) == 10_000


def slow_stream(key, num_examples, length):
  """The stream of indices, epoch after epoch."""
  orders = (
    np.random.default_rng((key, epoch)).permutation(num_examples)
    for epoch in range(-(-length // num_examples))
  )
  return [int(row) for order in orders for row in order][:length]


class BatchIndicesTest:
  @pytest.mark.parametrize('seed', range(20))
  def test_equals_the_slow_stream(self, seed):
    rng = np.random.default_rng(seed)
    key, start, num_steps = (int(x) for x in rng.integers(0, 30, 3))
    batch_size, num_examples = (int(x) for x in rng.integers(1, 40, 2))
    indices = data.batch_indices(
      key, start, num_steps, batch_size, num_examples
    )
    assert indices.dtype == np.int32
    stop = (start + num_steps) * batch_size
    expected = slow_stream(key, num_examples, stop)[start * batch_size :]
    assert indices.tolist() == (
      np.reshape(expected, (num_steps, batch_size)).tolist()
    )

  def test_starting_late_costs_nothing(self):
    late = data.batch_indices(0, 10**9, 3, 60, 55_000)
    again = data.batch_indices(0, 10**9 + 1, 2, 60, 55_000)
    assert (late[1:] == again).all()

  def test_result_may_be_changed(self):
    data.batch_indices(0, 0, 1, 6, 6)[:] = 0
    assert sorted(data.batch_indices(0, 0, 1, 6, 6)[0]) == list(range(6))

  @pytest.mark.parametrize(
    ('name', 'value'),
    [
      *(('key', -1), ('start', -1), ('num_steps', -1)),
      *(('batch_size', 0), ('num_examples', 0)),
    ],
  )
  def test_out_of_range_is_refused(self, name, value):
    names = ('start', 'num_steps', 'batch_size', 'num_examples')
    arguments = {'key': 0} | dict.fromkeys(names, 1)
    with pytest.raises(ValueError, match=f'{name} must be at least'):
      data.batch_indices(**(arguments | {name: value}))
