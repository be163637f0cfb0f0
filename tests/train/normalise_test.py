"""Normalised images have mean 0 and deviation 1 in every channel."""

import jax
import numpy as np
import pytest

from powerprop_jax.train.data import splits
from powerprop_jax.train.data.splits import DataConfig


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_moments_are_those_of_all_pixels_of_a_channel(dtype):
  generator = np.random.default_rng(0)
  images = generator.integers(0, 200, (30, 4, 5, 3)).astype(dtype)
  images[..., 1] //= 3
  found = np.asarray(splits.normalise(images)(images))
  x = images.astype(np.float64) / (255 if dtype == np.uint8 else 1)
  expected = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert found.dtype == np.float32


def test_other_images_are_scaled_by_the_moments_of_those_for_training():
  training = np.array([10, 30], np.uint8).reshape(2, 1, 1, 1)
  prepare = jax.jit(splits.normalise(training))
  test = np.array([[20, 50]], np.uint8).reshape(2, 1, 1, 1)
  np.testing.assert_allclose(prepare(test).ravel(), [0, 3], atol=1e-5)


def test_constant_channel_becomes_zero():
  images = np.full((2, 3, 3, 1), 7, np.uint8)
  np.testing.assert_array_equal(splits.normalise(images)(images), 0)


@pytest.mark.parametrize(
  ('name', 'mean', 'deviation'),
  [
    ('mnist', [0.1307], [0.3081]),
    ('cifar10', [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
  ],
)
@pytest.mark.slow
def test_moments_are_the_published_ones(tfds_dir, name, mean, deviation):
  images = splits.load(DataConfig(name, tfds_dir, 1)).train.images
  channels = images.shape[-1]
  pixels = np.stack([np.zeros(channels), np.ones(channels)])
  low, high = splits.normalise(images)(
    pixels.reshape(2, 1, 1, channels).astype(np.float32)
  )[:, 0, 0]
  np.testing.assert_allclose(1 / (high - low), deviation, atol=1e-4)
  np.testing.assert_allclose(-low / (high - low), mean, atol=1e-4)
