"""The program for ImageNet as two processes is the program as one."""

import json
import sys

import image_files
import numpy as np
import processes
import pytest

from powerprop_jax.train.images import image_set
from powerprop_jax.train.runs import metrics

PROGRAM = ('-m', 'experiments.imagenet_resnet50')
# RigL and powerprop on real files: six steps, rewired after two and four.
SETTINGS = [
  *('--preset', 'tiny', '--recipe.num-steps', '6', '--eval-every', '6'),
  *('--save-every', '3', '--recipe.ema', '0', '--recipe.schedule.warmup', '0'),
  *('--recipe.schedule.drops', '2', '--data.name', 'tiny'),
]
DEVICES = '--xla_force_host_platform_device_count'


def run(num_devices, *arguments):
  # To compile takes most of the time.
  return processes.run(
    *arguments,
    XLA_FLAGS=f'{DEVICES}={num_devices}',
    JAX_DISABLE_MOST_OPTIMIZATIONS='1',
  )


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
  processes.free_port()
  data = tmp_path / 'data'
  found = image_files.examples(24)
  image_set.write(data, 'tiny', {'train': found, 'validation': found[:8]}, 5)
  one, two = tmp_path / 'one', tmp_path / 'two'
  settings = [*SETTINGS, '--data.dir', str(data), '--out']
  # Two devices, of one process or of one each.
  run(2, *PROGRAM, *settings, one)
  hosts = (*processes.TWO_HOSTS, '--', sys.executable)
  output = run(1, *hosts, *PROGRAM, *settings, two)
  # A single report, by the first process, in a folder that is like the other.
  assert output.count('Report: ') == 1
  names = {path.relative_to(one).parts[0] for path in one.rglob('*')}
  assert names == {path.relative_to(two).parts[0] for path in two.rglob('*')}
  assert 'complete.json' in names and 'best.npz' in names
  records = [metrics.read_metrics(out / 'metrics.jsonl') for out in (one, two)]
  assert [r['step'] for r in records[0]] == [1, 2, 3, 4, 5, 6, 6]
  for ours, theirs in zip(*records, strict=True):
    assert set(ours) == set(theirs)
    for name in set(ours) - {'images_per_second'}:
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
  results = [
    json.loads((out / 'results.json').read_text()) for out in (one, two)
  ]
  assert results[0][0]['density'] == results[1][0]['density'] < 0.25
  with np.load(one / 'best.npz') as a, np.load(two / 'best.npz') as b:
    assert set(a.files) == set(b.files)
    masks = [name for name in a.files if name.startswith('masks/')]
    assert any(not a[name].all() for name in masks)
    for name in masks:
      np.testing.assert_array_equal(a[name], b[name])
    for name in (n for n in a.files if n.startswith(('theta/', 'net_state/'))):
      np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-4)
