"""A program that is killed continues to what it would have found anyway."""

import json
import os
import re
import signal
import time
from typing import NamedTuple

import numpy as np
from orbax import checkpoint as ocp
import processes
import pytest

from powerprop_jax.train.runs import metrics
from powerprop_jax.train.scale import preemption


class Program(NamedTuple):
  """A program, and what exists in its folder when it is to be killed."""

  module: str
  args: str
  begun: str
  # A figure that shows what the clock says.
  timed: str = ''


PROGRAMS = {
  'train': Program(
    'powerprop_jax.train',
    # The state after 2,000 steps depends on every bit of the state before.
    'train --loop.num-steps 2000 --loop.eval-every 200',
    'checkpoints/200',
  ),
  'one_shot_pruning': Program(
    'experiments.one_shot_pruning',
    '--net mlp --alphas 1 2 --keys 0 --kept 1 0.1 --loop.num-steps 400'
    ' --loop.eval-every 40',
    'checkpoints/40',
  ),
  'weight_distribution': Program(
    'experiments.weight_distribution',
    '--nets mlp lenet_300_100 --alphas 1 4 --keys 0 --loop.batch-size 8'
    ' --loop.num-steps 8 --loop.eval-every 2 --loop.steps-per-dispatch 2'
    ' --epsilons 0.001 0.01 --kept 1 0.1',
    'mlp/checkpoints/2',
  ),
  'sparse_training': Program(
    'experiments.sparse_training',
    '--net mlp --methods dense rigl --densities 0.2 --alphas 1 2 --keys 0 1'
    ' --loop.num-steps 8 --loop.batch-size 8 --loop.eval-every 4'
    ' --loop.steps-per-dispatch 4 --sparse.period 2',
    'combinations/rigl_density_0.2_alpha_1/checkpoints/4',
  ),
  'continual_permuted': Program(
    'experiments.continual_permuted',
    '--net.hidden 16 --net.epochs 2 --packing.densities 0.2 0.5'
    ' --methods efficient_packnet fine_tuning --alphas 1 1.5'
    ' --rates 0.1 0.05 --keys 0',
    'combinations/efficient_packnet_alpha_1_key_0/metrics.jsonl',
  ),
  'adaptive_alpha': Program(
    'experiments.adaptive_alpha',
    '--preset tiny --methods fixed branch --alphas 2',
    'combinations/mlp_branch/rung_1/metrics.jsonl',
  ),
  'imagenet_resnet50': Program(
    'experiments.imagenet_resnet50',
    '--preset tiny --mesh.devices 1 --data.synthetic'
    ' --data.synthetic-classes 10',
    'checkpoints/4',
    timed='learning_curves.png',
  ),
}


def start(program, out, *more):
  command = ('-m', program.module, *program.args.split(), '--out', out, *more)
  return processes.started(*command, XLA_FLAGS=os.environ['XLA_FLAGS'])


def run(program, out, *more):
  with start(program, out, *more) as process:
    _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err


def stop(program, out, number):
  """Status and last line of a run that gets a signal when it has begun."""
  with start(program, out) as process:
    deadline = time.monotonic() + 300
    while not (out / program.begun).exists():
      assert process.poll() is None, process.communicate()[1]
      assert time.monotonic() < deadline, f'no {program.begun} in five minutes'
      time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate()
  return process.returncode, err.splitlines()[-1:]


def found(of, out):
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
        files[name] = {
          leaf: arrays[leaf].tobytes()
          for leaf in arrays.files
          if leaf != 'about'
        }
    elif path.suffix == '.png' and name != of.timed:
      files[name] = path.read_bytes()
    elif path.name == 'checkpoints':
      last = max(int(p.name) for p in path.iterdir() if p.name.isdigit())
      files[f'{name}/{last}'] = state_in(path / str(last))
  return files


def state_in(folder):
  """The bytes of each leaf of a checkpoint."""
  _, text = json.loads((folder / 'powerprop_jax.json').read_text())
  leaves = json.loads(text)['leaves'].items()
  how = ocp.RestoreArgs(restore_type=np.ndarray)
  names = {name: how for name, leaf in leaves if 0 not in leaf['shape']}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    state = checkpointer.restore(
      folder / 'state', args=ocp.args.PyTreeRestore(restore_args=names)
    )
  return {name: value.tobytes() for name, value in state.items()}


@pytest.mark.parametrize(
  ('name', 'number'),
  [*((name, signal.SIGKILL) for name in PROGRAMS), ('train', signal.SIGTERM)],
)
@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same(tmp_path, name, number):
  program = PROGRAMS[name]
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  run(program, whole)
  status, last_line = stop(program, parts, number)
  assert not (parts / 'complete.json').exists()
  if number == signal.SIGTERM:
    assert status == preemption.EXIT_STATUS
    steps = [path.name for path in (parts / 'checkpoints').iterdir()]
    assert re.fullmatch(
      f'stopped by a signal, saved at step {max(map(int, steps)):,} of 2,000; '
      'run the same command with --resume to continue.',
      *last_line,
    )
  run(program, parts, '--resume')
  expected, resumed = found(program, whole), found(program, parts)
  assert list(resumed) == list(expected)
  differ = [key for key in expected if resumed[key] != expected[key]]
  assert not differ
