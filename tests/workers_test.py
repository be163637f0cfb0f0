"""Work is done in other processes, each told to use one thread."""

import os

import pytest

from powerprop_jax.train import workers


def settings(name):
  return os.getpid(), os.environ.get(name, '')


def fail(text):
  raise ValueError(text)


def test_every_item_is_done_elsewhere_with_one_thread():
  before = dict(os.environ)
  names = ['XLA_FLAGS', 'NPROC', 'OMP_NUM_THREADS', 'XLA_FLAGS']
  looks = []
  found = list(
    workers.run(
      settings, names, 2, watch=lambda: looks.append(1), interval=0.05
    )
  )
  assert sorted(name for name, _ in found) == sorted(names)
  for name, (process, value) in found:
    assert process != os.getpid()
    one = '--xla_cpu_multi_thread_eigen=false' if name == 'XLA_FLAGS' else '1'
    assert value.endswith(one)
  assert looks
  assert dict(os.environ) == before


def test_failure_of_an_item_is_raised_here():
  with pytest.raises(ValueError, match='no such thing'):
    list(workers.run(fail, ['no such thing'], 1, watch=lambda: None))
