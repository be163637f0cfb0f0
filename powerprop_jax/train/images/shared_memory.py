"""Memory through which workers hand over arrays, used again and again.

Fresh shared memory costs a worker as much time for each image as resizing it
does: the system clears every page. Here a worker fills a slot of its own, and
the process that started it copies the slot and frees it. Grain's own memory,
fresh for each batch, leaves 0.76 to 0.78 of the images a CPU second, its own
batches of single images 0.67 to 0.79 (AMD EPYC, crops of 224×224, in turns).
"""

import math
from multiprocessing import shared_memory
from typing import Any

import numpy as np

_PAGE = 4096


class SharedSlots:
  """Slots for byte arrays of one shape, per_worker for each of num_workers.

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
