"""Memory through which workers hand over arrays, used again and again.

Fresh shared memory costs a worker as much time for each image as resizing it
does: the system clears every page. Here a worker fills a slot of its own, and
the process that started it copies the slot and frees it.
"""

import math
from multiprocessing import shared_memory
from typing import Any

import numpy as np

_PAGE = 4096


class SharedSlots:
  """Slots for byte arrays of one shape, some for each worker.

  It can be pickled; the copy in another process sees the same memory, and ends
  with that process. Memory that no slot has used yet takes no room.

  Args:
    shape: of the array in a slot.
    num_workers: processes that fill slots, at least 1.
    per_worker: slots of each, at least 1.

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
    size = _start(count) + count * math.prod(shape)
    # An object that is pickled by its name.
    self._memory: Any = shared_memory.SharedMemory(create=True, size=size)
    self._shape = shape
    self._count = count
    self._per_worker = per_worker

  def take(self, worker: int) -> int | None:
    """A free slot of a worker, which is not free from then on.

    Args:
      worker: which one, in [0, num_workers).

    Returns:
      The slot; None if it has no free one.
    """
    first = worker * self._per_worker
    for slot in range(first, first + self._per_worker):
      if not self._memory.buf[slot]:
        self._memory.buf[slot] = 1
        return slot
    return None

  def view(self, slot: int) -> np.ndarray:
    """The array in a slot, uint8; it must be gone when the slots are closed."""
    start = _start(self._count) + slot * math.prod(self._shape)
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


def _start(count: int) -> int:
  """Where the first array begins: behind a byte for each slot, 1 if taken."""
  return -(-count // _PAGE) * _PAGE
