"""The memory of a step, kept from one to the next."""

import ctypes

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
  """Lets this process keep memory that it frees, for what it asks for next.

  On a CPU XLA asks for the temporary memory of every step anew. The system
  gives fresh pages, fills them with zeros when they are first written, and
  takes them back after the step: for a network without its zeros that is up to
  half of the time. Afterwards pages are fresh in the first steps alone. The
  process stays as large as it was at its largest, and that may be more, as
  memory of one size does not always fit into what was freed of another. Results
  are the same.

  To be called before JAX first touches a device, as its threads take their
  memory from elsewhere later: called then, it made steps slower. The programs
  of this library call it. It holds for all that the process computes, also
  without sparsity.

  Returns:
    Whether it is so: only under Linux, with the allocator of glibc.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  # Nothing from outside the heap, nothing given back, one heap for all threads.
  wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
  return all([mallopt(*option) for option in wanted.items()])
