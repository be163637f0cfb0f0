"""Memory that is kept from step to step."""

import ctypes
import os

import processes

from powerprop_jax.sparse import memory

# Fresh pages that the steps after the first ones need, in a program of its own.
_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from powerprop_jax.sparse import keep_memory

kept = keep_memory() if sys.argv[1] == 'keep' else False
step = jax.jit(lambda x: jnp.sin(x)[::-1] @ jnp.ones((1000, 1000)) + x)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = jnp.zeros((10_000, 1000))
for _ in range(20):
  x = step(x).block_until_ready()
first = faults()
for _ in range(5):
  x = step(x).block_until_ready()
print(kept, faults() - first)
"""


def test_later_steps_need_no_fresh_pages():
  runs = {}
  for word in ('keep', 'leave'):
    kept, pages = processes.run('-c', _PROGRAM, word).split()
    runs[word] = kept == 'True', int(pages)
  assert not runs['leave'][0]
  is_glibc = 'CS_GNU_LIBC_VERSION' in getattr(os, 'confstr_names', ())
  assert runs['keep'][0] == is_glibc
  if is_glibc:
    assert runs['leave'][1] > 10 * runs['keep'][1]


def test_other_allocators_are_left_alone(monkeypatch):
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
  assert not memory.keep_memory()
