"""Streams of tasks change what they say, nothing else, and copy nothing."""

import tracemalloc

import numpy as np
import pytest
import scipy.ndimage

from powerprop_jax.continual import pixels, task_streams


def part(num=12, shape=(4, 5, 1), num_classes=6, dtype=np.uint8, seed=0):
  generator = np.random.default_rng(seed)
  images = generator.integers(0, 256, (num, *shape)).astype(dtype)
  return images, np.arange(num, dtype=np.int32) % num_classes


def source(**settings):
  parts = [part(seed=seed, **settings) for seed in range(3)]
  return task_streams.from_arrays('source', *parts)


def all_parts(task):
  return [task.train, task.validation, task.test]


def assert_same_examples(found, expected):
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert ours.images.dtype == theirs.images.dtype


def test_permutation_is_a_bijection_and_the_same_for_all_parts():
  places = np.arange(20, dtype=np.float32).reshape(1, 4, 5, 1)
  one = places.repeat(2, -1), np.array([0])  # two channels that stay together
  data = task_streams.from_arrays('places', one, one, one)
  first, *others = task_streams.permuted(data, 5)
  assert_same_examples(all_parts(first), all_parts(data))
  for task in others:
    orders = [p.images.astype(int).reshape(20, 2).T for p in all_parts(task)]
    order = list(orders[0][0])
    assert sorted(order) == list(range(20)) != order
    assert all((found == order).all() for found in orders)
    np.testing.assert_array_equal(task.train.labels, data.train.labels)


def test_permutations_follow_from_the_key_in_streams_of_any_length():
  make = lambda *args, **kwargs: [
    task.train.images for task in task_streams.permuted(*args, **kwargs)
  ]
  data = source()
  short, long = make(data, 2, key=7), make(data, 5, key=7)
  for ours, theirs in zip(short, long, strict=False):
    np.testing.assert_array_equal(ours, theirs)
  assert (make(data, 2, key=8)[1] != short[1]).any()
  assert (long[1] != long[2]).any()
  first = make(data, 2, permutes_first=True)[0]
  assert (first != data.train.images).any()


def test_a_hundred_permuted_tasks_take_the_memory_of_one():
  data = source(num=2_000, shape=(28, 28, 1))
  tracemalloc.start()
  stream = task_streams.permuted(data, 100)
  task_streams.check(stream, num_outputs=10)
  held, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(stream) == 100
  assert held < data.train.images.nbytes


@pytest.mark.parametrize('degrees', [0, 30, -45, 90, 180, 200, 270, 360])
def test_rotation_is_that_of_scipy_and_right_angles_are_exact(degrees):
  images, _ = part(shape=(7, 7, 2))
  expected = scipy.ndimage.rotate(
    images.astype(np.float64),
    degrees,
    axes=(1, 2),
    reshape=False,
    order=1,
    mode='grid-constant',
  )
  found = pixels.rotate(images.astype(np.float64), degrees)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
  if degrees % 90 == 0:
    expected = np.rot90(images, degrees // 90, axes=(1, 2))
    np.testing.assert_array_equal(pixels.rotate(images, degrees), expected)


def test_groups_of_classes_partition_the_examples():
  data = source()
  stream = task_streams.split(data, 3)
  assert [task.classes for task in stream] == [(0, 1), (2, 3), (4, 5)]
  for name in ('train', 'validation', 'test'):
    sizes = [task.size(name) for task in stream]
    assert sum(sizes) == len(getattr(data, name).labels)
  for task in stream:
    assert task.num_classes == 2
    for number, label in enumerate(task.classes):
      np.testing.assert_array_equal(
        task.train.images[task.train.labels == number],
        data.train.images[data.train.labels == label],
      )


def test_labels_of_a_group_stay_if_asked_for():
  stream = task_streams.split(source(), [[5, 0], [2]], relabels=False)
  assert sorted(set(stream[0].train.labels)) == [0, 5]
  assert {task.num_classes for task in stream} == {6}
  # Uneven groups differ by one class.
  sizes = [len(task.classes) for task in task_streams.split(source(), 4)]
  assert sizes == [2, 2, 1, 1]


def test_streams_can_be_made_of_tasks():
  quarter = task_streams.rotated(source(shape=(4, 4, 1)), [90])[0]
  first, second = task_streams.split(quarter, [[1], [2]])
  task = task_streams.permuted(second, 2)[1]
  task_streams.check([quarter, first, second, task])
  assert task.train.labels.tolist() == [0] * task.size('train')
  rows = quarter.source.train.labels == 2
  turned = np.rot90(quarter.source.train.images[rows], axes=(1, 2))
  assert sorted(task.train.images[0].ravel()) == sorted(turned[0].ravel())


def test_images_fit_into_another_shape():
  images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
  grey = pixels.fit(images, (2, 2, 1))[..., 0]
  expected = np.rint(images @ np.array([0.299, 0.587, 0.114]))
  np.testing.assert_array_equal(grey, expected)
  assert grey.dtype == np.uint8
  large = pixels.fit(images, (5, 7, 3))
  np.testing.assert_array_equal(
    large[0, :4, 1:5], images[0].repeat(2, 0).repeat(2, 1)
  )
  assert large[0, 4].sum() == large[0, :, 0].sum() == large[0, :, 5:].sum() == 0
  square = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
  cut = pixels.fit(square, (2, 2, 1))
  np.testing.assert_array_equal(cut[0, ..., 0], [[5, 6], [9, 10]])


def test_different_data_get_one_shape_and_type():
  small = source(shape=(2, 2, 1), dtype=np.float32)
  large = source(shape=(6, 6, 3), num_classes=3)
  stream = sequence(small, large, shape=(4, 4, 1))
  found = [(task.shape, task.dtype.name) for task in stream]
  assert found == [((4, 4, 1), 'float32')] * 2
  assert stream[1].train.images.max() <= 1
  assert sequence(large, large)[0].dtype == np.uint8


def test_sizes_are_known_without_making_images():
  def fail(images):
    raise AssertionError('made an image')

  lazy = task_streams.Task('lazy', source(), 6, fail)
  one = dict(classes=(1,), relabels=True)
  task = task_streams.Task('of lazy', lazy, 6, fail, **one)
  assert task.size('test') == 2
  assert task.labels('test').tolist() == [0, 0]


@pytest.mark.parametrize(
  ('make', 'named'),
  [
    (lambda: task_streams.permuted(source(), 0), 'num_tasks'),
    (lambda: task_streams.permuted(source(), 2, key=-1), 'key'),
    (lambda: task_streams.rotated(source(), []), 'angles'),
    (lambda: task_streams.rotated(source(), [0, 360]), 'all different'),
    (lambda: task_streams.rotated(source(), [float('nan')]), 'nan'),
    (lambda: task_streams.split(source(), 7), 'between 1 and the 6 classes'),
    (lambda: task_streams.split(source(), [[0], []]), 'none empty'),
    (lambda: task_streams.split(source(), [[0], [0]]), 'no label twice'),
    (lambda: task_streams.split(source(), [[0, 9]]), r'labels \[9\]'),
    (lambda: task_streams.sequence({}), 'at least one task'),
    (lambda: sequence(source(), source(shape=(8, 8, 1))), "'b' has images of"),
    (lambda: sequence(source(shape=(4, 4, 2)), shape=GREY), '1 channels of 2'),
    (lambda: sequence(source(), shape=(0, 4, 1)), 'positive'),
    (lambda: task_streams.check([]), 'at least one task'),
    (lambda: task_streams.check([source(), source()]), 'different names'),
    (lambda: task_streams.check([source()], num_outputs=5), 'tells 5 apart'),
    (lambda: arrays(part(), part(shape=(2, 2, 1)), part()), 'of a has images'),
    (lambda: arrays(part(), part(), part(dtype=np.int32)), 'type int32'),
    (lambda: arrays(part(), part(), part(num=0)), 'test of a is empty'),
    (lambda: arrays(*[part()] * 3, num_classes=3), 'labels from 0 to 5'),
    (lambda: arrays(*[(part()[0], part()[1] / 2)] * 3), 'not integers'),
  ],
)
def test_bad_input_is_named(make, named):
  with pytest.raises(ValueError, match=named):
    make()


GREY = (4, 4, 1)


def sequence(*sources, shape=None):
  return task_streams.sequence(dict(zip('ab', sources, strict=False)), shape)


def arrays(*parts, **kwargs):
  return task_streams.from_arrays('a', *parts, **kwargs)
