"""Augmented images are pieces of the reflected image, mirrored or not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.train.data import splits


def make_images(num, height=5, width=6, channels=2, dtype=np.uint8):
  shape = (num, height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def candidates(image, padding):
  """Every image that the augmentation may give, by shift and mirroring."""
  height, width, _ = image.shape
  # Reflection without the edge, written out: -2 is 2, height is height - 2.
  rows = [abs(i) for i in range(-padding, height + padding)]
  rows = [i if i < height else 2 * (height - 1) - i for i in rows]
  columns = [abs(i) for i in range(-padding, width + padding)]
  columns = [i if i < width else 2 * (width - 1) - i for i in columns]
  found = {}
  for down in range(2 * padding + 1):
    for right in range(2 * padding + 1):
      piece = image[rows[down : down + height]]
      piece = piece[:, columns[right : right + width]]
      found[down, right, False] = piece
      found[down, right, True] = piece[:, ::-1]
  return found


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('padding', [0, 1, 4])
def test_every_image_is_a_piece_of_its_reflection(padding, dtype):
  images = make_images(20, dtype=dtype)
  found = splits.crop_and_flip(jax.random.key(0), images, padding=padding)
  assert found.dtype == dtype
  assert found.shape == images.shape
  for image, result in zip(images, np.asarray(found), strict=True):
    pieces = candidates(image, padding).values()
    assert any(np.array_equal(result, piece) for piece in pieces)


def test_all_shifts_and_both_sides_are_equally_likely():
  (image,) = make_images(1)
  num = 3_600
  images = np.broadcast_to(image, (num, *image.shape))
  found = splits.crop_and_flip(jax.random.key(1), images, padding=1)
  names = {
    piece.tobytes(): name for name, piece in candidates(image, 1).items()
  }
  counts = dict.fromkeys(names.values(), 0)
  for result in np.asarray(found):
    counts[names[result.tobytes()]] += 1
  assert len(counts) == 18
  # 200 each; five standard deviations are 69.
  assert all(abs(count - num / 18) < 69 for count in counts.values())


def test_key_decides_and_jit_changes_nothing():
  images = jnp.asarray(make_images(8))
  run = functools.partial(splits.crop_and_flip, padding=2)
  first, again = run(jax.random.key(3), images), run(jax.random.key(3), images)
  chex.assert_trees_all_equal(first, again)
  chex.assert_trees_all_equal(jax.jit(run)(jax.random.key(3), images), first)
  assert (run(jax.random.key(4), images) != first).any()


@pytest.mark.parametrize('padding', [-1, 5, 6])
def test_images_too_small_to_be_reflected_are_refused(padding):
  with pytest.raises(ValueError, match=rf'5 × 6, got {padding}'):
    splits.crop_and_flip(jax.random.key(0), make_images(1), padding=padding)
