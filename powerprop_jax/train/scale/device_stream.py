"""Batches of a stream on devices, copied there ahead of their use."""

import collections
from collections.abc import Iterator

import jax

from powerprop_jax.files.tables import Row
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.images.stream import Position, Stream
from powerprop_jax.train.runs import errors


class DeviceStream:
  """The batches of a stream as arrays on devices, some ahead of their use.

  The copy of a batch to the devices goes on while the one before it is used.

  Args:
    stream: the batches of this host, and the counts of skipped files; it is
      ahead of this one.
    sharding: how the examples of a batch are divided, along their first axis,
      over the devices of all hosts; None is the default device.
    ahead: batches on the devices that have not been asked for, at least 0.

  Example:
    >>> from powerprop_jax.train.images import batches
    >>> share = batches.Share(batch_size=2, image_size=8)
    >>> batches = batches.synthetic_batches(share, num_classes=10)
    >>> device_stream = DeviceStream(Stream(batches))
    >>> images, labels = next(device_stream)
    >>> images.shape, device_stream.position()['batches']
    ((2, 8, 8, 3), 1)
  """

  def __init__(
    self,
    stream: Stream,
    sharding: jax.sharding.Sharding | None = None,
    *,
    ahead: int = 2,
  ):
    errors.check_least(0, ahead=ahead)
    if sharding is not None:
      most = len(sharding.device_set)
      parts = most // sharding.shard_shape((most,))[0]
      size = stream.batches.share.total
      errors.check_shares(size, parts, 'devices')
    self.stream = stream
    self._sharding = sharding
    self._ahead = ahead
    self._queue: collections.deque[Arrays] = collections.deque()

  def __iter__(self) -> Iterator[Arrays]:
    return self

  def __next__(self) -> Arrays:
    while len(self._queue) <= self._ahead:
      batch = next(self.stream, None)
      if batch is None:
        break
      self._queue.append(self._put(batch))
    if not self._queue:
      raise StopIteration
    return self._queue.popleft()

  def _put(self, batch: Arrays) -> Arrays:
    if self._sharding is None:
      return jax.device_put(batch)
    total = self.stream.batches.share.total
    return Arrays(
      *(
        jax.make_array_from_process_local_data(
          self._sharding, array, (total, *array.shape[1:])
        )
        for array in batch
      )
    )

  def position(self) -> Position:
    """Where the user of the batches is; see Stream.position."""
    found = self.stream.position()
    return found | {'batches': self.stream.number - len(self._queue)}

  def restore(self, position: Row) -> None:
    """Goes to a position; see Stream.restore."""
    self.stream.restore(position)
    self._queue.clear()

  def close(self) -> None:
    """Ends the workers, and drops what is ahead."""
    self.restore(self.position())

  def __enter__(self) -> 'DeviceStream':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()
