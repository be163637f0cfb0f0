"""Streams are the same with any number of workers, which end with them."""

import json
import multiprocessing
import os
import pathlib
import signal
import time

import image_files
import numpy as np
import processes
import pytest

from powerprop_jax.train.data import splits
from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images.stream import Stream
from powerprop_jax.train.runs.errors import UserError

COUNT = image_files.COUNT


class StreamTest:
  @pytest.mark.slow
  def test_any_number_of_workers_gives_the_same(self, damaged):
    batches = image_files.training(damaged)
    with Stream(batches) as alone:
      expected = image_files.take(alone, 7)
      skipped = alone.skipped, alone.num_skipped
    assert set(skipped[0]) == {'2.jpg', '3.jpg', '9.jpg'}
    order = splits.batch_indices(0, 0, 7, 4, COUNT).ravel().tolist()
    assert skipped[1] == sum({2: 2, 3: 1, 9: 1}.get(i, 0) for i in order)
    image_files.assert_equal(expected, image_files.made(batches, 7))
    with Stream(batches, num_workers=2) as stream:
      image_files.assert_equal(image_files.take(stream, 5), expected[:5])
      position = json.loads(json.dumps(stream.position()))
      assert len(multiprocessing.active_children()) == 2
      # Goes on with other workers, or none, and so does this one.
      with Stream(batches, num_workers=1) as other:
        other.restore(position)
        image_files.assert_equal(image_files.take(other, 2), expected[5:])
      image_files.assert_equal(image_files.take(stream, 2), expected[5:])
      assert (stream.skipped, stream.num_skipped) == skipped
    assert not multiprocessing.active_children()

  @pytest.mark.slow
  def test_workers_end_with_the_batches_and_when_one_fails(self, tmp_path):
    found = image_files.examples(6)
    found[5] = found[5]._replace(label=7)
    images = image_files.make_set(tmp_path, found)
    part = images._replace(split='train[:5]', num_examples=5)
    batches = image_files.evaluation(part, 1)
    stream = Stream(batches, num_workers=2)
    image_files.assert_equal(list(stream), image_files.made(batches, 5))
    assert not multiprocessing.active_children()
    assert list(stream) == []
    stream = Stream(image_files.evaluation(images, 5), num_workers=1)
    assert next(stream).labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r'5.jpg of tiny train has the label 7'):
      next(stream)
    assert not multiprocessing.active_children()

  @pytest.mark.parametrize('start', [0, 1, 9, 1000])
  def test_restored_stream_goes_on(self, images, start):
    batches = image_files.training(images, key=5)
    stream = Stream(batches)
    position = stream.position() | {'batches': start}
    next(stream)
    stream.restore(position)
    assert stream.position() == position
    expected = [image_batches.make(batches, start + i)[0] for i in range(2)]
    image_files.assert_equal(image_files.take(stream, 2), expected)

  def test_position_holds_for_other_hosts_with_the_same_batch(self, images):
    stream = Stream(image_files.training(images, batch_size=4))
    next(stream)
    half = image_files.training(
      images, batch_size=2, host_index=1, host_count=2
    )
    other = Stream(half)
    other.restore(stream.position())
    np.testing.assert_array_equal(next(stream).images[2:], next(other).images)

  @pytest.mark.parametrize(
    ('change', 'message'),
    [
      ({'global_batch_size': 8}, 'its global_batch_size is 8, but 4 is asked'),
      ({'key': 1}, 'its key is 1, but 0 is asked'),
      ({'data': 'mnist train'}, "its data is 'mnist train', but 'tiny train'"),
      ({'num_examples': 9}, 'its num_examples is 9, but 10'),
      ({'batches': -1}, 'has -1 batches'),
      ({'batches': None}, 'has None batches'),
    ],
  )
  def test_other_position_is_refused(self, images, change, message):
    stream = Stream(image_files.training(images))
    with pytest.raises(UserError, match=message):
      stream.restore(stream.position() | change)

  def test_negative_number_of_workers_is_refused(self, images):
    with pytest.raises(ValueError, match='num_workers must be at least 0'):
      Stream(image_files.training(images), num_workers=-1)


@pytest.mark.parametrize('times', [1, 2])
def test_an_interrupt_waits_for_a_batch_a_second_one_does_not(times):
  made = []

  def fill(number, batch):
    for _ in range(times):
      signal.raise_signal(signal.SIGINT)
    made.append(number)
    return []

  share = image_batches.Share(2, 8)
  batches = image_batches.synthetic_batches(share, num_classes=3)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      next(Stream(batches._replace(fill=fill)))
    assert made == ([0] if times == 1 else [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, before)


PROGRAM = """
import multiprocessing, signal, sys, time
from powerprop_jax.train.images import batches, image_set, stream

if __name__ == '__main__':
  # A shell that runs the tests in the background has Ctrl-C ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  images = image_set.open_set('tiny', sys.argv[1], 'train')
  batches = batches.training_batches(images, batches.Share(4, 8))
  stream = stream.Stream(batches, num_workers=2)
  next(stream)
  print(*[p.pid for p in multiprocessing.active_children()], flush=True)
  if sys.argv[2] == 'raise':
    raise ValueError('something else')
  while True:
    next(stream)
"""


@pytest.mark.parametrize(
  ('end', 'status'),
  [
    (signal.SIGINT, -signal.SIGINT),
    (signal.SIGKILL, -signal.SIGKILL),
    ('raise', 1),
  ],
  ids=['interrupted', 'killed', 'failed'],
)
@pytest.mark.slow
def test_no_process_and_no_memory_is_left(images, tmp_path, end, status):
  (tmp_path / 'program.py').write_text(PROGRAM)
  folder = pathlib.Path(images.path).parents[1]
  memory = pathlib.Path('/dev/shm')
  before = set(memory.glob('psm_*'))
  with processes.started(tmp_path / 'program.py', folder, end) as program:
    workers = [int(word) for word in program.stdout.readline().split()]
    assert len(workers) == 2, program.stderr.read()
    if end == signal.SIGINT:  # as Ctrl-C in a terminal: to all of them
      os.killpg(program.pid, end)
    elif end != 'raise':
      program.send_signal(end)
    program.communicate(timeout=60)
    assert program.returncode == status
    for _ in range(300):
      left = [worker for worker in workers if is_running(worker)]
      shared = set(memory.glob('psm_*')) - before
      if not left and not shared:
        return
      time.sleep(0.1)
  raise AssertionError(f'left are the processes {left} and the memory {shared}')


def is_running(process):
  try:
    state = pathlib.Path(f'/proc/{process}/stat').read_text()
  except FileNotFoundError:
    return False
  # One that has ended but that nobody has waited for is none.
  return state.rsplit(')')[1].split()[0] != 'Z'
