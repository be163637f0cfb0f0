"""Normalised images have mean 0 and deviation 1 in every channel."""

import jax
import numpy as np
import pytest

from powerprop_jax.train.data import splits
from powerprop_jax.train.data.splits import DataConfig


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_images_are_scaled_by_the_moments_of_those_for_training(dtype):
  images = np.random.default_rng(0).integers(0, 200, (40, 4, 5, 3))
  images[..., 1] //= 3
  images[..., 2] = 7  # A constant channel becomes 0.
  images = images.astype(dtype)
  found = jax.jit(splits.normalise(images[:30]))(images)
  x = images[:30].astype(np.float64)
  expected = (images - x.mean((0, 1, 2))) / np.maximum(x.std((0, 1, 2)), 1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert found.dtype == np.float32


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
  ends = np.linspace([0.0] * len(mean), 1, 2).reshape(2, 1, 1, -1)
  prepare = splits.normalise(images)
  low, high = prepare(ends.astype(np.float32)).reshape(2, -1)
  np.testing.assert_allclose(1 / (high - low), deviation, atol=1e-4)
  np.testing.assert_allclose(-low / (high - low), mean, atol=1e-4)
