"""Batches lie on devices as they should, ahead of their use."""

import image_files
import jax
import numpy as np
import pytest

from powerprop_jax.train.images.stream import DeviceStream, Stream
from powerprop_jax.train.runs.errors import UserError


class DeviceStreamTest:
  @pytest.fixture
  def sharding(self):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

  def test_batches_are_divided_over_devices(self, images, sharding):
    batches = image_files.training(images, batch_size=16)
    with DeviceStream(Stream(batches), sharding) as stream:
      found = image_files.take(stream, 3)
    image_files.assert_equal(found, image_files.made(batches, 3))
    for array in (found[0].images, found[0].labels):
      assert array.sharding == sharding
      assert {s.data.shape[0] for s in array.addressable_shards} == {2}

  @pytest.mark.parametrize('ahead', [0, 2, 9])
  def test_position_is_that_of_the_user(self, images, ahead):
    batches = image_files.training(images)
    expected = image_files.made(batches, 4)
    stream = DeviceStream(Stream(batches), ahead=ahead)
    assert stream.position()['batches'] == 0
    image_files.assert_equal(image_files.take(stream, 2), expected[:2])
    position = stream.position()
    assert position['batches'] == 2
    assert stream.stream.number == 2 + ahead
    image_files.assert_equal(image_files.take(stream, 2), expected[2:])
    stream.restore(position)
    image_files.assert_equal(image_files.take(stream, 2), expected[2:])
    # Closing loses nothing that was not used.
    stream.restore(position)
    next(stream)
    stream.close()
    image_files.assert_equal(image_files.take(stream, 1), expected[3:])

  def test_ends_with_the_last_batch(self, images):
    batches = image_files.evaluation(images)
    image_files.assert_equal(
      list(DeviceStream(Stream(batches))), image_files.made(batches, 3)
    )

  def test_indivisible_batch_is_refused(self, images, sharding):
    message = 'batch of 12 examples .* among 8 devices.* 8 or 16'
    with pytest.raises(UserError, match=message):
      DeviceStream(
        Stream(image_files.training(images, batch_size=12)), sharding
      )
    with pytest.raises(ValueError, match='ahead must be at least 0'):
      DeviceStream(Stream(image_files.training(images)), ahead=-1)
