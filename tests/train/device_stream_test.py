"""Batches lie on devices as they should, ahead of their use."""

import image_files
import pytest

from powerprop_jax.train.images.stream import DeviceStream, Stream
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import sharding


@pytest.mark.parametrize('ahead', [0, 2, 9])
def test_position_is_that_of_the_user(images, ahead):
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
  # Closing loses nothing that was not used.
  next(stream)
  stream.close()
  image_files.assert_equal(image_files.take(stream, 1), expected[3:])


def test_batches_are_divided_over_devices_up_to_the_last(images):
  lies = sharding.batch_sharding(sharding.make_mesh())
  batches = image_files.evaluation(images, batch_size=8)
  with DeviceStream(Stream(batches), lies) as stream:
    found = list(stream)
  image_files.assert_equal(found, image_files.made(batches, 2))
  assert {array.sharding for array in found[0]} == {lies}
  batches = image_files.training(images, batch_size=12)
  with pytest.raises(
    UserError, match=r'12 examples .* among 8 devices.* 8 or 16'
  ):
    DeviceStream(Stream(batches), lies)
  with pytest.raises(ValueError, match='ahead must be at least 0'):
    DeviceStream(Stream(batches), ahead=-1)
