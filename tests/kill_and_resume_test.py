"""A program that is killed continues to what it would have found anyway."""

import json
import os
import re
import signal
import time

import numpy as np
import processes
import pytest

from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.scale import preemption

# By module the arguments, and what exists when it is to be killed.
PROGRAMS = {
  # The state after 2,000 steps depends on every bit of the state before.
  'powerprop_jax.train': (
    'train --loop.num-steps 2000 --loop.eval-every 200',
    'checkpoints/200',
  ),
  'experiments.one_shot_pruning': (
    '--net mlp --alphas 1 2 --keys 0 --kept 1 0.1 --loop.num-steps 400'
    ' --loop.eval-every 40',
    'checkpoints/40',
  ),
  'experiments.weight_distribution': (
    '--nets mlp lenet_300_100 --alphas 1 4 --keys 0 --loop.batch-size 8'
    ' --loop.num-steps 8 --loop.eval-every 2 --loop.steps-per-dispatch 2'
    ' --epsilons 0.001 0.01 --kept 1 0.1',
    'mlp/checkpoints/2',
  ),
  'experiments.sparse_training': (
    '--net mlp --methods dense rigl --densities 0.2 --alphas 1 2 --keys 0 1'
    ' --loop.num-steps 8 --loop.batch-size 8 --loop.eval-every 4'
    ' --loop.steps-per-dispatch 4 --sparse.period 2',
    'combinations/rigl_density_0.2_alpha_1/checkpoints/4',
  ),
  'experiments.continual_permuted': (
    '--net.hidden 16 --net.epochs 2 --packing.densities 0.2 0.5'
    ' --methods efficient_packnet fine_tuning --alphas 1 1.5'
    ' --rates 0.1 0.05 --keys 0',
    'combinations/efficient_packnet_alpha_1_key_0/metrics.jsonl',
  ),
  'experiments.adaptive_alpha': (
    '--preset tiny --methods fixed branch --alphas 2',
    'combinations/mlp_branch/rung_1/metrics.jsonl',
  ),
  'experiments.imagenet_resnet50': (
    '--preset tiny --mesh.devices 1 --data.synthetic'
    ' --data.synthetic-classes 10',
    'checkpoints/4',
  ),
}
# A figure that shows what the clock says.
TIMED = 'experiments.imagenet_resnet50', 'learning_curves.png'


def start(module, out, *more):
  args, _ = PROGRAMS[module]
  command = ('-m', module, *args.split(), '--out', out, *more)
  return processes.started(*command, XLA_FLAGS=os.environ['XLA_FLAGS'])


def run(module, out, *more):
  with start(module, out, *more) as process:
    _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err


def stop(module, out, number):
  """Status and last line of a run that gets a signal when it has begun."""
  _, begun = PROGRAMS[module]
  with start(module, out) as process:
    deadline = time.monotonic() + 300
    while not (out / begun).exists():
      assert process.poll() is None, process.communicate()[1]
      assert time.monotonic() < deadline, f'no {begun} in five minutes'
      time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate()
  return process.returncode, err.splitlines()[-1:]


def found(module, out):
  """What a run has found, by file: records, figures and last states."""
  files = {}
  for path in sorted(out.rglob('*')):
    name = path.relative_to(out).as_posix()
    if path.name in ('results.json', 'weights.json'):
      files[name] = json.loads(path.read_text())
    elif path.name == 'metrics.jsonl':
      files[name] = metrics.read_metrics(path)
      for record in files[name]:
        for clock in ('images_per_second', 'seconds'):
          record.pop(clock, None)
    elif path.suffix == '.npz':
      with np.load(path) as arrays:
        files[name] = in_bytes(arrays)
    elif path.suffix == '.png' and (module, name) != TIMED:
      files[name] = path.read_bytes()
    elif path.name == 'checkpoints':
      state, step, _ = checkpoint.Checkpoints(path).restore_latest(None)
      files[name] = step, in_bytes(state.leaves)
  return files


def in_bytes(arrays):
  return {k: x.tobytes() for k, x in arrays.items() if k != 'about'}


@pytest.mark.parametrize(
  ('module', 'number'),
  [
    *((module, signal.SIGKILL) for module in PROGRAMS),
    ('powerprop_jax.train', signal.SIGTERM),
  ],
)
@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same(tmp_path, module, number):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  run(module, whole)
  status, last_line = stop(module, parts, number)
  assert not (parts / 'complete.json').exists()
  if number == signal.SIGTERM:
    assert status == preemption.EXIT_STATUS
    steps = [path.name for path in (parts / 'checkpoints').iterdir()]
    assert re.fullmatch(
      f'stopped by a signal, saved at step {max(map(int, steps)):,} of 2,000; '
      'run the same command with --resume to continue.',
      *last_line,
    )
  run(module, parts, '--resume')
  expected, resumed = found(module, whole), found(module, parts)
  assert list(resumed) == list(expected)
  assert not [key for key in expected if resumed[key] != expected[key]]
