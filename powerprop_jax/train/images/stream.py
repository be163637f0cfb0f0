"""Batches of images one after the other, made by workers, put on devices.

    images = image_set.open_set('imagenet2012', folder, 'train')
    batches = batches.training_batches(images, Share(256, image_size=224))
    with stream.Stream(batches, num_workers=8) as batches_of_host:
      for images, labels in stream.DeviceStream(batches_of_host, ...):
        ...

A position is a small dictionary that JSON can hold. A stream that is restored
from it goes on as the old one would have, with any number of workers, and with
any number of hosts that have the same batch together. (The state of grain's
iterator would hold for one number of workers only.)
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
from multiprocessing import shared_memory
import signal
import sys
import threading
from types import FrameType
from typing import Any
import weakref

import jax
import numpy as np

from powerprop_jax.files.tables import Row
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images.batches import Batches, Skipped
from powerprop_jax.train.runs import errors, workers
from powerprop_jax.train.runs.errors import UserError

# Batches of a worker under way: grain holds fewer, and does not mind more.
_SLOTS = 6
_PAGE = 4096

# Which worker this process is; set there.
_worker = 0

Position = dict[str, int | str]


class Stream:
  """An iterator over batches, made here or by worker processes.

  Workers run from the first batch until close, the end of the batches, or an
  exception; then the next batch starts them again. Close a stream, or use it in
  a with statement.

  Args:
    num_workers: processes that make batches; 0 makes each when it is asked for.

  Attributes:
    number: how many batches were given.
    skipped: name and defect of each image file that they had to do without.
    num_skipped: how often they had to; a file may be met more than once.

  Example:
    >>> from powerprop_jax.train.images import batches
    >>> share = batches.Share(batch_size=2, image_size=8)
    >>> batches = batches.synthetic_batches(share, num_classes=10)
    >>> with Stream(batches) as stream:
    ...   images, labels = next(stream)
    ...   stream.position()['batches']
    1
  """

  def __init__(self, batches: Batches, *, num_workers: int = 0):
    errors.check_least(0, num_workers=num_workers)
    self.batches = batches
    self.number = 0
    self.skipped: dict[str, str] = {}
    self.num_skipped = 0
    self._num_workers = num_workers
    # Grain's iterator and where its workers put images, while they are open.
    self._iterator: Iterator[_Made] | None = None
    self._slots: SharedSlots | None = None
    self._open = contextlib.ExitStack()
    weakref.finalize(self, self._open.close)

  def __iter__(self) -> Iterator[Arrays]:
    return self

  def __next__(self) -> Arrays:
    if self.number >= self.batches.num_batches:
      self.close()
      raise StopIteration
    try:
      if self._iterator is None:
        self._iterator = self._start()
      with _interrupt_later():
        made = next(self._iterator)
      images = made.images
      if images is None:
        assert self._slots is not None
        images = self._slots.copy_and_free(made.slot)
    except BaseException:
      self.close()
      raise
    self.number += 1
    self.skipped.update(made.skipped)
    self.num_skipped += len(made.skipped)
    return Arrays(images, made.labels)

  def _start(self) -> Iterator['_Made']:
    """Grain's iterator over the batches that are left."""
    try:
      import grain
    except ImportError as error:
      raise UserError(
        'streams of images need grain; install it with: '
        "pip install 'powerprop_jax[train]'"
      ) from error
    from absl import flags

    if not flags.FLAGS.is_parsed():
      # Grain's workers take over flags of this process, so it must have some.
      flags.FLAGS(sys.argv[:1])
    batches = self.batches
    # No more than there are batches: grain refuses a worker without any.
    num_workers = min(self._num_workers, batches.num_batches - self.number)
    if num_workers:
      self._slots = SharedSlots(batches.share.shape, num_workers, _SLOTS)
      self._open.callback(self._slots.close)
    numbers = grain.MapDataset.range(self.number, batches.num_batches)
    # The numbers need no threads to be read.
    dataset = numbers.map(
      functools.partial(_make, batches, self._slots)
    ).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if num_workers:
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers),
        worker_init_fn=_prepare_worker,
      )
    iterator = iter(dataset)
    self._open.callback(iterator.close)
    return iterator

  def position(self) -> Position:
    """The number of batches given, and what they are batches of."""
    return {
      'batches': self.number,
      'global_batch_size': self.batches.share.total,
      **self.batches.identity,
    }

  def restore(self, position: Row) -> None:
    """Goes to a position that a stream of the same batches gave.

    Raises:
      UserError: if it belongs to other batches.
    """
    for name, ours in self.position().items():
      theirs = position.get(name)
      if name != 'batches' and theirs != ours:
        raise UserError(
          f'cannot go on with the data where the checkpoint was: its {name} is '
          f'{theirs!r}, but {ours!r} is asked for. Use the settings of the run '
          'that was saved, or start a new one.'
        )
    number = position.get('batches')
    if not isinstance(number, int) or number < 0:
      raise UserError(
        f'the position of the data has {number!r} batches; needed is a number '
        'from 0 on.'
      )
    self.close()
    self.number = number

  def close(self) -> None:
    """Ends the workers; nothing is lost, as batches can be made again."""
    self._iterator = self._slots = None
    self._open.close()

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


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


class SharedSlots:
  """Slots for byte arrays of one shape, per_worker for each of num_workers.

  Fresh shared memory costs a worker as much time for each image as resizing it
  does: the system clears every page. Here a worker fills a slot of its own, and
  the process that started it copies the slot and frees it. Grain's own memory,
  fresh for each batch, leaves 0.76 to 0.78 of the images a CPU second, its own
  batches of single images 0.67 to 0.79 (AMD EPYC, crops of 224×224, in turns).

  It can be pickled; the copy in another process sees the same memory, and ends
  with that process. Memory that no slot has used yet takes no room.

  Example:
    >>> slots = SharedSlots((2, 3), num_workers=1, per_worker=2)
    >>> [slots.take(0), slots.take(0), slots.take(0)]
    [0, 1, None]
    >>> slots.view(1)[:] = 7
    >>> slots.copy_and_free(1).tolist(), slots.take(0)
    ([[7, 7, 7], [7, 7, 7]], 1)
    >>> slots.close()
  """

  def __init__(self, shape: tuple[int, ...], num_workers: int, per_worker: int):
    count = num_workers * per_worker
    self._shape = shape
    self._per_worker = per_worker
    # Where the first array begins: behind a byte for each slot, 1 if taken.
    self._start = -(-count // _PAGE) * _PAGE
    # An object that is pickled by its name.
    self._memory: Any = shared_memory.SharedMemory(
      create=True, size=self._start + count * math.prod(shape)
    )

  def take(self, worker: int) -> int | None:
    """A free slot of a worker, taken from then on; None if it has none."""
    first = worker * self._per_worker
    for slot in range(first, first + self._per_worker):
      if not self._memory.buf[slot]:
        self._memory.buf[slot] = 1
        return slot
    return None

  def view(self, slot: int) -> np.ndarray:
    """The array in a slot, uint8; it must be gone when the slots are closed."""
    start = self._start + slot * math.prod(self._shape)
    return np.ndarray(self._shape, np.uint8, self._memory.buf, start)

  def copy_and_free(self, slot: int) -> np.ndarray:
    """A copy of the array in a slot, which is free from then on."""
    copy = self.view(slot).copy()
    self._memory.buf[slot] = 0
    return copy

  def close(self) -> None:
    """Gives the memory back, once all processes have."""
    self._memory.close()
    self._memory.unlink()


@dataclasses.dataclass
class _Made:
  """A batch on its way; grain would take a tuple of arrays apart.

  The images are None if they are in the slot.
  """

  images: np.ndarray | None
  labels: np.ndarray
  skipped: Skipped
  slot: int = -1


def _make(batches: Batches, slots: SharedSlots | None, number: int) -> _Made:
  slot = None if slots is None else slots.take(_worker)
  if slots is None or slot is None:
    (images, labels), skipped = image_batches.make(batches, number)
    return _Made(images, labels, skipped)
  labels = np.empty(batches.share.batch_size, np.int32)
  skipped = batches.fill(number, Arrays(slots.view(slot), labels))
  return _Made(None, labels, skipped, slot)


def _prepare_worker(index: int, count: int) -> None:
  """Makes a worker keep to one core and end with this process, only then."""
  del count
  global _worker
  _worker = index
  workers.follow_parent()
  # A scheduler may send these to all processes; the first one ends the others.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  with contextlib.suppress(ImportError):
    import cv2

    cv2.setNumThreads(0)


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
  """Lets Ctrl-C wait for the end of a block; a second one does not wait.

  Grain's thread hands over batches in a queue of Python's. Where its reader is
  interrupted between taking one and saying that there is room, the thread waits
  for ever, and grain's close waits for the thread.
  """
  handler = signal.default_int_handler
  if (
    threading.current_thread() is not threading.main_thread()
    or signal.getsignal(signal.SIGINT) is not handler
  ):
    yield
    return
  caught = []

  def catch(number: int, frame: FrameType | None) -> None:
    del frame
    caught.append(number)
    signal.signal(signal.SIGINT, handler)

  signal.signal(signal.SIGINT, catch)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
    if caught:
      raise KeyboardInterrupt
