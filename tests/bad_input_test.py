"""A user's mistake gets one line that names it, status 2, and changes nothing.

Each case is a command line of the main job or of `powerprop`.
"""

import os
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import one_shot_pruning
from powerprop_jax.optim import powerprop, views
from powerprop_jax.prune import one_shot
from powerprop_jax.train import cli, command, json_files

TINY = ['--net=mlp', '--loop.num-steps=40', '--loop.eval-every=20']


def main_job(args):
  return command.run(
    one_shot_pruning.main,
    one_shot_pruning.PRESETS,
    prog='python -m experiments.one_shot_pruning',
    description='The main job.',
    args=args,
  )


def run(args):
  """Runs 'experiment …', the main job, or a command of `powerprop`."""
  args = args.split() if isinstance(args, str) else [str(a) for a in args]
  if args[:1] == ['experiment']:
    # One small lane, unless the case says otherwise: it is built before the
    # folder is looked at.
    return main_job(['--net=mlp', '--alphas', '1', '--keys', '0', *args[1:]])
  return cli.main(args)


def contents(folder):
  """Everything below a folder: bytes of files, None for folders."""
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A folder with a run, a pruning of it, a file, and odd data sets."""
  path = tmp_path_factory.mktemp('world')
  args = ['train', *TINY, '--out', str(path / 'run')]
  assert cli.main(args) == 0
  assert cli.main(['prune', str(path / 'run'), '--kept', '0.5']) == 0
  (path / 'other').mkdir()
  (path / 'other' / 'thesis.tex').write_text('do not lose this')
  (path / 'file').write_text('a file')
  good = {
    'x_train': np.zeros((40, 4, 4), np.uint8),
    'y_train': np.arange(40) % 3,
    'x_test': np.zeros((6, 4, 4), np.uint8),
    'y_test': np.arange(6) % 3,
  }
  for name, changed in {
    'keys': {'images': good.pop('x_test')},
    'shapes': {'x_test': np.zeros((6, 5, 5), np.uint8)},
    'rank': {'x_test': np.zeros(6, np.uint8)},
    'lengths': {'x_test': np.zeros((5, 4, 4), np.uint8)},
    'labels': {
      'x_test': np.zeros((6, 4, 4), np.uint8),
      'y_test': np.array([0, 1, 2, 7, 1, 1]),
    },
    'negative': {
      'x_test': np.zeros((6, 4, 4), np.uint8),
      'y_train': np.full(40, -1),
    },
  }.items():
    np.savez(path / f'{name}.npz', **{**good, **changed})
  (path / 'broken.npz').write_bytes(b'PK not an archive')
  return path


def refusal(args, world, capsys, monkeypatch):
  """The single line with which a command line is refused."""
  monkeypatch.chdir(world)
  before = contents(world)
  capsys.readouterr()
  assert run(args) == 2
  shown = capsys.readouterr()
  assert contents(world) == before
  assert 'Traceback' not in shown.err + shown.out
  (line,) = shown.err.splitlines()
  assert line.startswith('error: ')
  return line


# What is typed, and what the line must name: the thing, then the remedy.
CASES = [
  ('train --alpha 0.5', 'alpha .*0.5', 'at least 1'),
  ('train --alpha nan', 'alpha .*nan', 'at least 1'),
  ('experiment --alphas 1 0.5', 'alpha .*0.5', 'at least 1'),
  ('experiment --alphas 2 0.5', 'alpha .*0.5', 'at least 1'),
  ('experiment --alphas 1 nan', 'alpha .*nan', 'at least 1'),
  ('experiment --alphas', '--alphas', 'at least one'),
  ('prune run --kept 0', '--kept .*got 0', r'\(0, 1\]'),
  ('prune run --kept 0.5 1.5', '--kept .*got 1.5', r'\(0, 1\]'),
  ('prune run --kept nan', '--kept .*got nan', r'\(0, 1\]'),
  ('prune run --kept 1e-13', '--kept .*got 1e-13', r'\(0, 1\]'),
  ('prune run --kept', '--kept', 'at least one'),
  ('experiment --kept 0', '--kept .*got 0', r'\(0, 1\]'),
  ('experiment --kept 1.5', '--kept .*got 1.5', r'\(0, 1\]'),
  ('prune run --output-factor nan', '--output-factor .*nan', 'positive'),
  ('prune run --output-factor 2 --scope global', '--output-factor', 'layer'),
  ('train --data.name mnits', "'mnits'", "did you mean 'mnist'"),
  ('experiment --data.name mnits', "'mnits'", "did you mean 'mnist'"),
  (
    'train --data.name mnist --data.dir nowhere',
    'nowhere',
    'download_and_prep',
  ),
  ('train --data.name nothing.npz', 'nothing.npz', 'path of a .npz'),
  ('train --data.name keys.npz', 'x_test', 'expected are x_train'),
  ('train --data.name shapes.npz', r'\(5, 5, 1\)', 'must agree'),
  ('train --data.name rank.npz', r'x_test .*\(6,\)', 'expected are'),
  ('train --data.name lengths.npz', '5 images .*6 labels', 'must be as many'),
  ('train --data.name labels.npz', 'y_test .*label 7', 'end at 2'),
  ('train --data.name negative.npz', 'y_train .*-1', 'from 0'),
  ('train --data.name broken.npz', 'broken.npz', 'numpy.savez'),
  ('train --data.num-validation 5000', 'num_validation .*5000', '1436'),
  ('train --net lenet', "'lenet'", "mean 'lenet_5'"),
  ('experiment --net lenet', "'lenet'", "mean 'lenet_5'"),
  ('train --key -1', 'key .*-1', 'at least 0'),
  ('experiment --keys 0 -1', 'key .*-1', 'at least 0'),
  ('experiment --lanes-at-once 0', 'lanes_at_once .*0', 'at least 1'),
  ('train --loop.num-steps 0', 'num_steps .*0', 'at least 1'),
  ('experiment --loop.eval-every 0', 'eval_every .*0', 'at least 1'),
  ('train --optimizer.learning-rate -1', 'learning_rate .*-1', 'positive'),
  ('train --optimizer.decay-phi nan', 'decay_phi .*nan', 'at least 0'),
  ('train --out run', 'run already holds a run', 'another --out'),
  ('train --out run --resume', 'num_steps: 40 → 6000', 'another --out'),
  ('experiment --out run', 'run already holds a run', 'another --out'),
  ('experiment --out run --resume', 'not of one_shot', 'another --out'),
  ('experiment --out other', 'other .*thesis.tex', 'another --out'),
  ('train --out other --resume', 'other .*thesis.tex', 'another --out'),
  ('train --out file', 'file is a file', 'another --out'),
  ('train --out file/below', 'file/below', 'another --out'),
  ('prune run', 'run_pruned already holds', 'another --out'),
  ('prune run --out run', 'run already holds', 'another --out'),
  ('prune run --out other', 'other .*thesis.tex', 'another --out'),
  ('prune nowhere', 'nowhere holds no run', 'config.json'),
  ('prune other', 'other holds no run', 'config.json'),
  ('prune run_pruned', 'a run of prune', 'powerprop train'),
  ('report nowhere', 'nowhere holds no run', 'config.json'),
  ('report other', 'other holds no run', 'config.json'),
  ('report file', 'file holds no run', 'config.json'),
  ('', 'no command', 'train, prune, report'),
  ('prun run', "'prun'", "mean 'prune'"),
  ('prune', 'Missing .*RUN', '--help'),
  ('train --alhpa 2', '--alhpa', 'meant: --alpha'),
  ('train --alpha two', '--alpha.*two', '--help'),
  ('train --optimizer.name adamw', "'adamw'", "'sgd', 'adam'"),
  ('experiment --sparsities 0.9', '--sparsities', '--help'),
  ('experiment --preset minst', "'minst'", 'mnist_reference'),
]


@pytest.mark.parametrize(
  ('args', 'thing', 'remedy'), CASES, ids=[case[0] or 'empty' for case in CASES]
)
def test_mistake_is_one_line(args, thing, remedy, world, capsys, monkeypatch):
  line = refusal(args, world, capsys, monkeypatch)
  assert re.search(thing, line), line
  assert re.search(remedy, line), line


def damage(run_path, step):
  """Cuts off the largest file of a checkpoint."""
  files = [p for p in (run_path / 'checkpoints' / step).rglob('*')]
  largest = max((p for p in files if p.is_file()), key=os.path.getsize)
  largest.write_bytes(largest.read_bytes()[:-10])


@pytest.fixture
def damaged(world, tmp_path):
  """A copy of the run whose latest checkpoint is cut off."""
  for path, data in contents(world / 'run').items():
    copy = tmp_path / path.relative_to(world)
    if data is None:
      copy.mkdir(parents=True, exist_ok=True)
    else:
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(data)
  damage(tmp_path / 'run', '40')
  return tmp_path


class DamagedCheckpointTest:
  def test_pruning_falls_back_and_says_so(self, damaged, capsys):
    before = contents(damaged)
    assert run(['prune', damaged / 'run', '--kept', '0.5']) == 0
    shown = capsys.readouterr()
    assert 'checkpoint of step 40' in shown.err
    assert 'continuing from the checkpoint of step 20' in shown.err
    assert 'step 20 of 40' in shown.out
    after = contents(damaged)
    assert {path: after[path] for path in before} == before

  def test_resumed_run_falls_back_and_loses_nothing(
    self, world, damaged, capsys
  ):
    kept = contents(damaged / 'run' / 'checkpoints' / '40')
    args = ['train', *TINY, '--out', damaged / 'run', '--resume']
    assert run(args) == 0
    assert 'step 20' in capsys.readouterr().err
    for name in ('metrics.jsonl', 'results.json'):
      repaired = (damaged / 'run' / name).read_bytes()
      assert repaired == (world / 'run' / name).read_bytes()
    aside = damaged / 'run' / 'checkpoints' / 'damaged' / '40'
    assert list(contents(aside).values()) == list(kept.values())

  def test_run_without_an_intact_checkpoint_is_refused(
    self, damaged, capsys, monkeypatch
  ):
    damage(damaged / 'run', '20')
    monkeypatch.chdir(damaged)
    before = contents(damaged)
    assert run('prune run') == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith('warning: ') for line in warnings)
    assert 'no checkpoint in' in error
    assert 'Nothing was deleted' in error
    assert contents(damaged) == before

  def test_run_without_any_checkpoint_is_refused(
    self, damaged, capsys, monkeypatch
  ):
    (damaged / 'run' / 'checkpoints').rename(damaged / 'elsewhere')
    line = refusal('prune run', damaged, capsys, monkeypatch)
    assert 'has no checkpoint yet' in line
    assert '--resume' in line

  @pytest.mark.parametrize(
    ('name', 'text'),
    [
      ('config.json', '{"format": "anoth'),
      ('config.json', '{}'),
      ('results.json', '{"accuracy": 1}'),
      ('results.json', '[{"acc'),
      ('metrics.jsonl', 'nonsense\n{"step": 1}\n'),
    ],
  )
  def test_report_of_a_spoilt_file_is_refused(
    self, damaged, capsys, monkeypatch, name, text
  ):
    (damaged / 'run' / name).write_text(text)
    line = refusal('report run', damaged, capsys, monkeypatch)
    assert name in line

  def test_report_of_a_program_with_a_page_of_its_own_is_refused(
    self, damaged, capsys, monkeypatch
  ):
    path = damaged / 'run' / 'config.json'
    stored = json_files.read_json(path)
    json_files.write_json(path, {**stored, 'program': 'weight_distribution'})
    line = refusal('report run', damaged, capsys, monkeypatch)
    assert 'a run of weight_distribution' in line
    line = refusal('prune run', damaged, capsys, monkeypatch)
    assert 'a run of weight_distribution' in line


class LibraryTest:
  def test_weights_that_start_at_zero_are_named(self):
    net = hk.without_apply_rng(
      hk.transform(lambda x: hk.Linear(3, w_init=jnp.zeros, name='out')(x))
    )
    theta = net.init(jax.random.key(0), jnp.ones((1, 4)))
    tx = powerprop.powerprop(optax.sgd(0.1), 2.0)
    with pytest.raises(ValueError, match='out/w'):
      views.init(tx, theta)

  def test_pattern_that_matches_nothing_lists_the_leaves(self):
    theta = {'linear': {'w': jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r'logitz.*linear/w'):
      one_shot.prune(theta, 0.5, overrides={'logitz/w$': 0.1})

  @pytest.mark.parametrize('sparsity', [-0.1, 1.0, float('nan')])
  def test_sparsity_out_of_range_is_refused(self, sparsity):
    theta = {'linear': {'w': jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r'\[0, 1\)'):
      one_shot.prune(theta, sparsity)

  def test_tree_of_powers_that_does_not_fit_is_refused(self):
    theta = {'linear': {'w': jnp.ones((3, 2))}}
    tx = powerprop.powerprop(optax.sgd(0.1), {'linaer': {'w': 2.0}})
    with pytest.raises(ValueError, match='linear/w'):
      views.init(tx, theta)
