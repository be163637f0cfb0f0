"""A user's mistake gets one line that names it, status 2, and changes nothing.

Each case is a command line of a program, in a folder with files to get wrong.
"""

import functools
import json
import os
import re
import shutil
import sys

import numpy as np
import programs
import pytest

from experiments.dct_plus_sparse import patterns
from powerprop_jax.files import json_files
from powerprop_jax.train.cli import main

TINY = ['--net=mlp', '--loop.num-steps=40', '--loop.eval-every=20']


# What all cases of a program begin with: one small lane, as it is built before
# the folder is looked at; and short runs.
FIRST = {
  'one_shot_pruning': '--net=mlp --alphas 1 --keys 0',
  'adaptive_alpha': '--preset tiny',
  'dct_plus_sparse': '--net=mlp --loop.num-steps=4 --loop.batch-size=8'
  ' --loop.eval-every=2 --loop.steps-per-dispatch=2 --sparse.period=1',
  'imagenet_resnet50': '--preset tiny --mesh.devices 1',
}


def run(args):
  """Runs 'experiment …', the main job, 'NAME: …', or a command of powerprop."""
  args = args.split() if isinstance(args, str) else [str(a) for a in args]
  first = args[0] if args else ''
  if first == 'experiment':
    first = 'one_shot_pruning:'
  if not first.endswith(':'):
    return main.main(args)
  program = programs.module(first[:-1])
  args = [*FIRST.get(first[:-1], '').split(), *args[1:]]
  if first == 'launch:':
    return program.run(args)
  return programs.run(program, *args)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A folder with a run, a pruning of it, a file, and odd data sets."""
  path = tmp_path_factory.mktemp('world')
  args = ['train', *TINY, '--out', str(path / 'run')]
  assert main.main(args) == 0
  assert main.main(['prune', str(path / 'run'), '--kept', '0.5']) == 0
  for name in ('net.safetensors', 'net.npz'):
    to = ['--format', name[4:], '--out', str(path / name)]
    assert main.main(['export', str(path / 'run'), '--kept', '0.5', *to]) == 0
  to = ['--format', 'jax', '--out', str(path / 'program.npz')]
  assert main.main(['export', str(path / 'run'), *to]) == 0
  only_latest = shutil.ignore_patterns('20')
  for name, spoil in SPOILT_RUNS.items():
    shutil.copytree(path / 'run', path / name, ignore=only_latest)
    spoil(path / name)
  for name, spoil in SPOILT_FILES.items():
    original, how = spoil
    (path / name).write_bytes(how((path / original).read_bytes()))
  for name, sweep in SWEEPS.items():
    (path / name).write_text(
      sweep if isinstance(sweep, str) else json.dumps(sweep)
    )
  (path / 'loop').symlink_to('loop')
  (path / 'dangling').symlink_to('gone')
  (path / 'späces_✓').mkdir()
  (path / 'späces_✓' / 'notes').write_text('mine')
  (path / 'empty.npz').write_bytes(b'')
  np.save(path / 'array.npy', np.zeros(3))
  (path / 'array.npy').rename(path / 'array.npz')
  (path / 'other').mkdir()
  (path / 'other' / 'thesis.tex').write_text('do not lose this')
  (path / 'file').write_text('a file')
  for name, changed in ODD_DATA.items():
    np.savez(path / f'{name}.npz', **GOOD_DATA | changed)
  images = {k: v for k, v in GOOD_DATA.items() if k != 'x_test'}
  np.savez(path / 'keys.npz', images=GOOD_DATA['x_test'], **images)
  (path / 'broken.npz').write_bytes(b'PK not an archive')
  return path


def edited(*within, **fields):
  """Changes fields of config.json or of what is within; None takes one out."""

  def spoil(path):
    stored = where = json_files.read_json(path / 'config.json')
    for name in within:
      where = where[name]
    for name, value in fields.items():
      where[name] = value
      if value is None:
        del where[name]
    json_files.write_json(path / 'config.json', stored)

  return spoil


networks = functools.partial(edited, 'contents', 'networks')


def replaced(name, content):
  """Replaces a file; a folder takes its place for None."""

  def spoil(path):
    (path / name).unlink()
    if content is None:
      (path / name).mkdir()
    else:
      (path / name).write_bytes(content)

  return spoil


SPOILT_RUNS = {
  'cut_config': replaced('config.json', b'{"format": "powerp'),
  'empty_config': replaced('config.json', b''),
  'list_config': replaced('config.json', b'[]'),
  'binary_config': replaced('config.json', b'\xff\xfe\x00'),
  'folder_config': replaced('config.json', None),
  'other_format': edited(format='version 2'),
  'no_program': edited(program=None),
  'no_settings': edited(config=None),
  'no_command': edited(command=None),
  'odd_program': edited(program=['train']),
  'of_0.1.0': edited(contents=None),
  'of_another': edited(program='another', contents={}),
  'no_net': networks(net=None),
  'no_data': networks(data=None),
  'odd_net': networks(net=3),
  'unknown_net': networks(net='lenet'),
  'larger_net': networks(net='lenet_300_100'),
  'odd_alpha': networks(alphas=['two']),
  'more_keys': networks(keys=[0, 1]),
  'odd_steps': networks(num_steps='many'),
  'unknown_field': networks(num_stepps=3),
  'gone_data': networks(data={'name': 'gone.npz'}),
  'no_pages': edited('contents', 'page', sections='none'),
  'odd_figure': edited(
    'contents', 'page', 'sections', 1, 'figures', 0, draw='learning_curve'
  ),
  'odd_options': edited(
    *('contents', 'page', 'sections', 1, 'figures', 0, 'options'), titel=''
  ),
  'null_results': replaced('results.json', b'null'),
  'binary_results': replaced('results.json', b'\xff\xfe\x00'),
  'odd_weights': replaced('weights.json', b'3'),
  'cut_weights': replaced('weights.json', b'[{"leaf"'),
  'odd_metrics': replaced('metrics.jsonl', b'{"step": "x"}\n{"step": 2}\n'),
  'folder_metrics': replaced('metrics.jsonl', None),
  'folder_page': replaced('report.html', None),
  'folder_figure': replaced('learning_curves.png', None),
}
cut = lambda data: data[: len(data) // 2]
flipped = lambda at: (
  lambda data: data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
)
SPOILT_FILES = {
  'cut.safetensors': ('net.safetensors', cut),
  'cut_net.npz': ('net.npz', cut),
  'flipped.safetensors': ('net.safetensors', flipped(-900)),
  'flipped_net.npz': ('net.npz', flipped(-2_000)),
  'flipped_header': ('net.safetensors', flipped(3)),
  'flipped_magic.npz': ('net.npz', flipped(1)),
  'huge_header': ('net.npz', lambda _: (2**62).to_bytes(8, 'little') + b'{}'),
  'empty': ('net.npz', lambda _: b''),
}
GOOD_DATA = {
  'x_train': np.zeros((40, 4, 4), np.uint8),
  'y_train': np.arange(40) % 3,
  'x_test': np.zeros((6, 4, 4), np.uint8),
  'y_test': np.arange(6) % 3,
}
ODD_DATA = {
  'shapes': {'x_test': np.zeros((6, 5, 5), np.uint8)},
  'rank': {'x_test': np.zeros(6, np.uint8)},
  'lengths': {'x_test': np.zeros((5, 4, 4), np.uint8)},
  'labels': {'y_test': np.array([0, 1, 2, 7, 1, 1])},
  'negative': {'y_train': np.full(40, -1)},
  'onehot': {'y_train': np.eye(3, dtype=int)[np.arange(40) % 3]},
  'float_labels': {'y_train': np.zeros(40)},
  'text_labels': {'y_train': np.array(['a'] * 40)},
  'huge_labels': {'y_train': np.full(40, 10**7)},
  'object_labels': {'y_train': np.array([None] * 40)},
  'complex': {'x_train': np.zeros((40, 4, 4), complex)},
  'infinite': {'x_train': np.full((40, 4, 4), np.inf)},
  'large': {'x_train': np.full((40, 4, 4), 1e300)},
  'other_type': {'x_train': np.zeros((40, 4, 4), np.float32)},
  'five_axes': {'x_train': np.zeros((40, 4, 4, 1, 1), np.uint8)},
  'no_features': {'x_train': np.zeros((40, 0), np.float32)},
  'no_examples': {'x_train': np.zeros((0, 4, 4), np.uint8)},
  'good': {},
  'whole_images': {'x_train': np.zeros((40, 4, 4), int)},
  'no_labels': {'y_test': np.zeros(0, int)},
  'validation': {
    **{'x_validation': np.zeros((4, 4, 4), np.uint8)},
    **{'y_validation': np.arange(4) % 3},
  },
  'half': {'x_validation': np.zeros((4, 4, 4), np.uint8)},
  'table': {
    **{'x_train': np.zeros((40, 5), np.float32)},
    **{'x_test': np.zeros((6, 5), np.float32)},
  },
}
SWEEP = {
  'program': 'experiments.one_shot_pruning',
  'out': 'runs/sweep',
  'vary': {'keys': [0, 1]},
}
SWEEPS = {
  'sweep.json': SWEEP,
  'cut.json': '{"program":',
  'list.json': '[1]',
  'no_program.json': {'out': 'x', 'vary': {}},
  'odd_program.json': SWEEP | {'program': 3},
  'unknown_program.json': SWEEP | {'program': 'experiments.nothing'},
  'relative_program.json': SWEEP | {'program': '.nothing'},
  'no_such_program.json': SWEEP | {'program': 'json'},
  'unknown_option.json': SWEEP | {'vary': {'alhpa': [1]}},
  'odd_value.json': SWEEP | {'vary': {'keys': ['a']}},
  'no_value.json': SWEEP | {'vary': {'keys': []}},
  'list_vary.json': SWEEP | {'vary': ['keys']},
  'odd_args.json': SWEEP | {'args': '--resume'},
  'twice.json': SWEEP | {'vary': {'keys': [1, '1']}},
  'unknown_field.json': SWEEP | {'vray': {}},
  'help.json': SWEEP | {'args': ['--help']},
  'in_file.json': SWEEP | {'out': 'file/below'},
  'unknown_preset.json': SWEEP | {'vary': {'preset': ['no']}},
}


def refusal(args, world, capsys, monkeypatch):
  """The single line with which a command line is refused."""
  monkeypatch.chdir(world)
  before = programs.contents(world)
  capsys.readouterr()
  assert run(args) == 2
  shown = capsys.readouterr()
  assert programs.contents(world) == before
  assert 'Traceback' not in shown.err + shown.out
  (line,) = shown.err.splitlines()
  assert line.startswith('error: ')
  return line


# What is typed, and what the line must name: the thing, then the remedy.
CASES = [
  ('train --alpha 0.5', 'alpha .*0.5', 'at least 1'),
  ('train --alpha nan', 'alpha .*nan', 'at least 1'),
  ('experiment --alphas 1 0.5', 'alpha .*0.5', 'at least 1'),
  ('experiment --alphas 1 nan', 'alpha .*nan', 'at least 1'),
  ('experiment --alphas 1 inf', 'alpha .*inf', 'finite'),
  ('experiment --alphas', '--alphas', 'at least one'),
  ('prune run --kept 0', '--kept .*got 0', r'\(0, 1\]'),
  ('prune run --kept 0.5 1.5', '--kept .*got 1.5', r'\(0, 1\]'),
  ('prune run --kept nan', '--kept .*got nan', r'\(0, 1\]'),
  ('prune run --kept 1e-13', '--kept .*got 1e-13', r'\(0, 1\]'),
  ('prune run --kept', '--kept', 'at least one'),
  ('experiment --kept 0', '--kept .*got 0', r'\(0, 1\]'),
  ('prune run --output-factor nan', '--output-factor .*nan', 'positive'),
  ('prune run --output-factor 2 --scope global', '--output-factor', 'layer'),
  ('train --data.name mnits', "unknown data set 'mnits', did you mean 'mnist'",
   'fashion_mnist', '.npz'),
  ('train --data.name mnist --data.dir nowhere', '--data.dir',
   'mnist is not prepared in nowhere', 'does not exist',
   "t.builder.'mnist', data_dir='nowhere'",
   "file_format='array_record'.*download_and_prepare"),
  ('train --data.name nothing.npz', 'nothing.npz', 'path of a .npz'),
  ('train --data.name keys.npz', 'lacks x_test: it has ', 'are x_train'),
  ('train --data.name shapes.npz', r'\(5, 5, 1\)', 'must agree'),
  ('train --data.name rank.npz', r'x_test .*\(6,\)', 'expected are'),
  ('train --data.name lengths.npz', '5 images .*6 labels', 'must be as many'),
  ('train --data.name labels.npz', 'y_test .*label 7', 'end at 2'),
  ('train --data.name negative.npz', 'y_train .*from -1 to -1', 'from 0'),
  ('train --data.name broken.npz', 'broken.npz', 'numpy.savez'),
  ('train --data.num-validation 1437', 'num_validation is 1437', '1436'),
  ('train --data.num-validation -1', 'num_validation is -1', '1436'),
  ('train --data.name validation.npz --data.num-validation 5',
   'leave num_validation out'),
  ('train --net lenet', "'lenet'", "mean 'lenet_5'"),
  ('train --key -1', 'key .*-1', 'at least 0'),
  ('experiment --keys 0 -1', 'key .*-1', 'at least 0'),
  (f'experiment --keys 0 {10**30}', 'key .*at least 0 and below 2.32'),
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
  ('train --out file', 'file is a file', 'another --out'),
  ('train --out file/below', 'file/below', 'another --out'),
  ('prune run', 'run_pruned already holds', 'another --out'),
  ('prune run --out run', 'run already holds', 'another --out'),
  ('prune run --out other', 'other .*thesis.tex', 'another --out'),
  ('prune nowhere', 'nowhere holds no run', 'config.json'),
  ('prune other', 'other holds no run', 'config.json'),
  ('prune run_pruned', 'a run of prune', 'no networks of its own'),
  ('prune of_0.1.0', 'version 0.1.0', '--resume'),
  ('report of_0.1.0', 'version 0.1.0', '--resume'),
  ('export of_another', 'a run of another', 'no networks of its own'),
  ('report of_another', 'a run of another', '--resume: '),
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
  # Numbers.
  ('train --alpha 1e6', 'alpha must be at most 64, got 1e'),
  ('train --alpha inf', 'alpha must be a finite number .* got inf'),
  ('train --alpha -inf', 'alpha .*got -inf'),
  ('train --alpha', "value for argument '--alpha'"),
  ('train --alpha 2,5', "--alpha: .*'2,5'"),
  ('train --key 1.5', "--key: .*'1.5'"),
  ('train --key 4294967296', 'key .*below 2.32, got 4294967296'),
  ('train --loop.num-steps 1e3', "--loop.num-steps: .*'1e3'"),
  ('train --loop.batch-size 0', 'batch_size .*0', 'at least 1'),
  ('train --loop.batch-size 1198', '1,198 .*1,197 examples'),
  ('train --loop.steps-per-dispatch 0', 'steps_per_dispatch .*got 0'),
  ('train --optimizer.learning-rate inf', 'learning_rate .*got inf'),
  ('train --optimizer.momentum 1', r'momentum .*\[0, 1\), got 1'),
  ('train --optimizer.name adam --optimizer.momentum 0.9', 'leave it 0'),
  ('train --optimizer.nesterov', 'nesterov needs a momentum'),
  ('train --optimizer.schedule linear', "'linear' .*'cosine'"),
  ('train --optimizer.stair-steps 0', 'stair_steps .*got 0'),
  ('train --optimizer.stair-factor 0', r'stair_factor .*\(0, 1\), got 0'),
  ('train --optimizer.stair-factor 1', r'stair_factor .*\(0, 1\), got 1'),
  ('train --optimizer.decay-theta inf', 'decay_theta .*got inf'),
  ('train --optimizer.decay-theta -1', 'decay_theta .*finite and at least 0'),
  ('train --optimizer.form naive --optimizer.decay-theta 1', 'recommended'),
  ('train --data.num-validation 0', 'num_validation is 0'),
  ('train --data.num-validation x', "--data.num-validation: .*'x'"),
  # Words.
  ('train --net LENET_5', "'LENET_5'.* lenet_5,"),
  ('train --net lenet_5', '16×16, got 8×8. Use mnist_cnn'),
  ('train --preset digits', "unknown preset 'digits'"),
  ('train --resume=maybe', 'maybe'),
  ('train --kept 0.5', '--kept'),
  ('train run', 'Unrecognized options: run'),
  ('train -x', 'Unrecognized options: -x'),
  ('TRAIN', "unknown command 'TRAIN'"),
  ('--alpha 2', "unknown command '--alpha'"),
  # Data.
  ('train --data.name mnist --data.dir file', 'mnist is not prepared in file'),
  ('train --data.name imagenet2012', 'train/images reads it in batches'),
  ('train --data imagenet2012', 'meant: .*--data.name'),
  ('train --data.name other', "unknown data set 'other'"),
  ('train --data.name .npz', 'no file .npz'),
  ('train --data.name empty.npz', 'not a .npz archive'),
  ('train --data.name array.npz', 'not a .npz archive'),
  ('train --data.name net.npz', 'lacks x_train'),
  ('train --data.name onehot.npz', r'shape \(40, 3\); expected .*argmax'),
  ('train --data.name float_labels.npz',
   r'type float64; labels are integers.* .*astype\(int\)'),
  ('train --data.name text_labels.npz', 'labels are integers'),
  ('train --data.name huge_labels.npz', 'labels from 10000000'),
  ('train --data.name object_labels.npz', 'savez.*arrays of numbers'),
  ('train --data.name no_labels.npz', 'y_test of .* is empty'),
  ('train --data.name whole_images.npz', 'type int64; images are uint8'),
  ('train --data.name complex.npz', 'complex128'),
  ('train --data.name infinite.npz', 'NaN or infinite'),
  ('train --data.name large.npz', 'NaN or infinite .*float32'),
  ('train --data.name other_type.npz', 'float32; they must agree'),
  ('train --data.name five_axes.npz', r'\(40, 4, 4, 1, 1\)'),
  ('train --data.name no_features.npz', 'x_train .*empty'),
  ('train --data.name no_examples.npz', 'x_train .*empty'),
  ('train --data.name half.npz', 'lacks y_validation'),
  ('train --data.name table.npz --net lenet_5 --loop.batch-size 4',
   'got 1×1.* features, lenet_300_100 or mlp'),
  # Folders.
  ('train --out run/config.json', 'config.json is a file'),
  ('train --out dangling', 'cannot use dangling'),
  ('train --out loop', 'cannot use loop'),
  ('train --out /dev/null/run', 'cannot use /dev/null/run'),
  ('train --out späces_✓', r'späces_✓ is not empty .*notes'),
  ('train --out run --resume --alpha 3', 'alpha: 2.0 → 3.0'),
  ('train --out cut_config --resume', 'cannot read cut_config/config.json'),
  ('train --out list_config --resume', 'not written by this version'),
  ('train --out no_program --resume', "'program' is missing"),
  ('train --out no_settings --resume', "'config' is missing"),
  ('train --out run_pruned --resume', 'a run of prune, not of train'),
  # Prune.
  ('prune run --kept 95', 'got 95. A sparsity of 0.9'),
  ('prune run --kept x', "--kept: .*'x'"),
  ('prune run --scope layers', "'layers' .*'global'"),
  ('prune run --output-factor inf', '--output-factor .*got inf'),
  ('prune run --alpha 2', '--alpha'),
  ('prune net.npz', 'net.npz holds no run'),
  ('prune loop', 'loop holds no run'),
  ('prune run --out run/checkpoints', 'not empty and holds no run'),
  ('prune run --kept 0.4 --out run_pruned --resume', 'kept: .0.5. → .0.4.'),
  ('prune empty_config', 'cannot read empty_config/config.json'),
  ('prune binary_config', 'cannot read binary_config/config.json'),
  ('prune folder_config', 'Is a directory'),
  ('prune other_format', 'not written by this version'),
  ('prune no_command', "'command' is missing"),
  ('prune odd_program', "'program' is missing or spoilt"),
  ('prune no_net', "no_net/config.json: .*'net' missing"),
  ('prune no_data', "no_data/config.json: .*'data' missing"),
  ('prune odd_net', 'net must be str, got 3'),
  ('prune unknown_net', "unknown network 'lenet'"),
  ('prune larger_net', 'no network lenet_300_100'),
  ('prune odd_alpha', "alphas must be .*got 'two'"),
  ('prune more_keys', 'of 2 networks, its latest checkpoint of 1'),
  ('prune odd_steps', "num_steps must be .*got 'many'"),
  ('prune unknown_field', 'num_stepps'),
  ('prune gone_data', 'no file gone.npz'),
  # Report.
  ('report run extra', 'extra'),
  ('report loop', 'loop holds no run'),
  ('report cut_config', 'cannot read cut_config/config.json'),
  ('report no_net', "no_net/config.json: .*'net' missing"),
  ('report no_pages', "sections must be list or tuple, got 'none'"),
  ('report odd_figure', "draw learning_curves .* no 'learning_curve'"),
  ('report odd_options', 'draw learning_curves .*titel'),
  ('report null_results', 'results.json is not a list of records'),
  ('report binary_results', 'cannot read binary_results/results.json'),
  ('report odd_weights', 'weights.json is not a list of records'),
  ('report cut_weights', 'cannot read cut_weights/weights.json'),
  ('report odd_metrics', 'line 1 of odd_metrics/metrics.jsonl'),
  ('report folder_metrics', 'Is a directory'),
  ('report folder_figure', 'folder_figure/learning_curves.png: Is a dir'),
  # Export.
  ('export run --out file', '--overwrite'),
  ('export run --out other', 'is a folder'),
  ('export run --out file/below', 'no folder file'),
  ('export run --format onnx --out x', "'onnx'", 'safetensors, npz, scipy, j'),
  ('export run --alpha 3 --out x', 'Its pairs of α and key are: 2 0'),
  ('export run --key 7 --out x', 'none of the networks'),
  ('export run --kept 0 --out x', '--kept .*got 0'),
  ('export run --format safetensor --out x', "Did you mean 'safetensors'"),
  ('export run --fromat npz', '--fromat'),
  ('export run --output-factor -1 --out x', '--output-factor'),
  ('export run --scope global --output-factor 2 --out x', '--output-factor'),
  ('export run --format jax --batch 0 --out x', '--batch must be at least 1'),
  ('export nowhere --out x', 'holds no run'),
  ('export run --kept nan --out x', '--kept .*got nan'),
  ('export run --batch 3 --out x', '--batch is for --format jax'),
  ('export run_pruned --out x', 'a run of prune'),
  ('export odd_net --out x', 'net must be str'),
  # Bench.
  ('bench run --batches 1 1', '--batches must differ'),
  ('bench run --batches 0', '--batches must be at least 1'),
  ('bench run --repeats 0', '--repeats must be at least 1'),
  ('bench nowhere', 'there is no'),
  ('bench other', 'holds no run'),
  ('bench file', 'as an exported network'),
  ('bench program.npz', 'program'),
  ('bench run --repeats 1.5', "--repeats: .*'1.5'"),
  ('bench run --out file', 'file exists'),
  ('bench run --out nowhere/table', 'no folder nowhere'),
  ('bench net.npz --kept 0.5', '--kept'),
  ('bench cut.safetensors', 'damaged or cut off'),
  ('bench cut_net.npz', 'damaged or cut off'),
  ('bench flipped.safetensors', 'flipped.safetensors as an exported network'),
  ('bench flipped_net.npz', 'damaged or cut off'),
  ('bench flipped_header', 'damaged or cut off'),
  ('bench flipped_magic.npz', 'damaged or cut off'),
  ('bench huge_header', 'header too large'),
  ('bench empty', 'header too small'),
  ('bench labels.npz', "no array 'about'"),
  ('bench loop', 'there is no loop'),
  # Other programs.
  ('experiment --alphas 2 65', 'alpha must be at most 64, got 65'),
  ('experiment --loop.batch-size 5000', '5,000 .*1,197'),
  ('experiment --scopes local', "'local'"),
  ('sparse_training: --alphas 1e6', 'alpha must be at most 64'),
  ('sparse_training: --densities 0', r'densities .*\(0, 1\], got 0'),
  ('sparse_training: --densities 0.0001', 'would lose all of them'),
  ('sparse_training: --methods rigll', 'rigll'),
  ('sparse_training: --methods rigl rigl', '--methods must differ'),
  ('sparse_training: --keys -1', 'at least 0'),
  ('sparse_training: --workers 0', '--workers'),
  ('sparse_training: --num-test 0', '--num-test'),
  ('sparse_training: --lanes-at-once 0', 'lanes_at_once'),
  ('sparse_training: --net mlpp', "Did you mean 'mlp'"),
  ('sparse_training: --sparse.period 5000', 'nothing would ever be rewired'),
  ('sparse_training: --alphas 2 --sparse.regrow zero',
   "regrow='zero' would start"),
  ('sparse_training: --data.name mnits', 'mnits'),
  ('sparse_training: --data.name good.npz --augment --loop.batch-size 4',
   'padding'),
  ('sparse_training: --densities 0.1 0.1', r'ities must .*, got \(0.1, 0.1\)'),
  ('sparse_training: --loop.batch-size 2000', '2,000 .*1,197'),
  ('sparse_training: --sparse.drop-fraction nan', 'drop_fraction .*got nan'),
  ('sparse_training: --sparse.ablation 0.5', 'constant_fan_in'),
  ('sparse_training: --out run --resume', 'a run of train, not of sparse'),
  ('class_specialisation: --alpha 1e6', 'alpha must be at most 64'),
  ('class_specialisation: --density 0', r'\(0, 1\], got 0'),
  ('class_specialisation: --net=mlp --density 0.0001', 'lose all of them'),
  ('class_specialisation: --methods rigll', 'rigll'),
  ('class_specialisation: --methods rigl rigl', '--methods must differ'),
  ('class_specialisation: --keys -1', 'at least 0'),
  ('class_specialisation: --net mlpp', "Did you mean 'mlp'"),
  ('class_specialisation: --out file', 'file is a file'),
  ('dct_plus_sparse: --alphas 100', 'alpha must be at most 64'),
  ('dct_plus_sparse: --dct-init-scale nan', '--dct-init-scale .*got nan'),
  *((f'dct_plus_sparse: --networks dct --supports {name}',
     f'transform start at zero, where {name} cannot rank them')
    for name in patterns.SCORED),
  ('dct_plus_sparse: --supports epq', 'epq'),
  ('dct_plus_sparse: --supports erk erk', '--supports must differ'),
  ('dct_plus_sparse: --networks dct dct', '--networks must differ'),
  ('dct_plus_sparse: --densities 0', r'\(0, 1\], got 0'),
  ('dct_plus_sparse: --densities 0.0005 --supports uniform',
   'would lose all of them'),
  ('dct_plus_sparse: --densities 0.0001 --supports snip',
   '1 connections for 2 layers'),
  ('dct_plus_sparse: --dct-init-scale 0 --alphas 2', '--dct-init-scale'),
  ('dct_plus_sparse: --score.rounds 0', 'rounds must be at least 1'),
  ('dct_plus_sparse: --score.num-batches 1000', '--score.num-batches'),
  ('dct_plus_sparse: --timed-steps -1', '--timed-steps'),
  ('dct_plus_sparse: --workers 0', '--workers'),
  ('dct_plus_sparse: --net mlpp', "Did you mean 'mlp'"),
  ('dct_plus_sparse: --sparse.period 5000', 'nothing would ever be rewired'),
  ('dct_plus_sparse: --dct-optimizer.learning-rate 0', 'learning_rate'),
  ('dct_plus_sparse: --loop.batch-size 5000', '5,000 .*1,197'),
  ('adaptive_alpha: --alphas 1e6', 'alpha must be at most 64'),
  ('adaptive_alpha: --race.candidates 1e6', 'candidate must be at most 64'),
  ('adaptive_alpha: --batch-size 5000', 'a batch of 5,000 .*240 examples'),
  ('adaptive_alpha: --epsilons nan', '--epsilons .*got nan'),
  ('adaptive_alpha: --control.period 0', 'period must be at least 1 .*got 0'),
  ('adaptive_alpha: --methods fixed fixed', '--methods'),
  ('adaptive_alpha: --nets mlpp', 'mlpp'),
  ('adaptive_alpha: --epochs 0', 'epochs must be at least 1'),
  ('adaptive_alpha: --epochs 1', 'too few for a race'),
  ('adaptive_alpha: --control.initial-alpha 1', 'must start in'),
  ('adaptive_alpha: --control.epsilon 0', 'epsilon must be positive'),
  ('adaptive_alpha: --control.alpha-max 1000', 'alpha_max must be at most 64'),
  ('adaptive_alpha: --race.candidates 0.5 2', 'at least 1, got 0.5'),
  ('adaptive_alpha: --control.warm-up -1', 'warm_up must be at least 0'),
  ('adaptive_alpha: --race.candidates', 'at least one'),
  ('adaptive_alpha: --race.candidates 2 2', 'must differ'),
  ('adaptive_alpha: --race.final-share 1.5', 'final_share'),
  ('adaptive_alpha: --race.kept 0', r'\(0, 1\]'),
  ('adaptive_alpha: --branch.trunk-share 1', r'trunk_share .*\(0, 1\)'),
  ('adaptive_alpha: --branch.candidates 100', 'at most 64, got 100'),
  ('adaptive_alpha: --workers 0', '--workers'),
  ('continual_permuted: --alphas 1e6', 'alpha must be at most 64'),
  ('continual_permuted: --net.batch-size 99999', '99,999 .*1,197'),
  ('continual_permuted: --methods packnett', 'packnett'),
  ('continual_permuted: --methods ewc ewc', '--methods must differ'),
  ('continual_permuted: --keys -1', 'at least 0'),
  ('continual_permuted: --rates 0.1', '--rates needs one for each of the 3'),
  ('continual_permuted: --rates 0.1 0.1 -1', 'learning_rate must be positive'),
  ('continual_permuted: --workers 0', '--workers'),
  ('continual_permuted: --measure-every 0', '--measure-every'),
  ('continual_permuted: --net.epochs 0', '--net.epochs'),
  ('continual_permuted: --net.batch-size 0', '--net.batch-size'),
  ('continual_permuted: --net.hidden 10 0', '--net.hidden'),
  ('continual_permuted: --packing.gamma 0', r'gamma must be in \(0, 1\]'),
  ('continual_permuted: --packing.densities 1.5', 'got 1.5'),
  ('continual_permuted: --packing.budgets 0.5',
   '--packing.budgets needs one for each'),
  ('continual_permuted: --packing.share 0', r'share .*\(0, 1\], got 0'),
  ('continual_permuted: --packing.restart zero', "restart='zero'"),
  ('continual_permuted: --ewc.strength -1', '--ewc.strength'),
  ('continual_permuted: --ewc.num-examples 0', '--ewc.num-examples'),
  ('continual_permuted: --stream.num-tasks 0', '--stream.num-tasks'),
  ('continual_permuted: --stream.kind split --stream.num-tasks 11',
   '10 classes'),
  ('continual_permuted: --stream.kind sequence',
   '--stream.sequence needs the names'),
  ('continual_permuted: --stream.sequence mnist', 'is for kind=sequence'),
  ('continual_permuted: --data.name mnits', 'mnits'),
  ('weight_distribution: --nets mlp --alphas 1e6', 'alpha must be at most 64'),
  ('weight_distribution: --nets mlp --out file', 'file is a file'),
  ('weight_distribution: --nets mlpp', 'mlpp'),
  ('weight_distribution: --nets mlp mlp', '--nets'),
  ('weight_distribution: --kept 0', '--kept'),
  ('weight_distribution: --epsilons 0', '--epsilons'),
  ('weight_distribution: --data.name mnits', 'mnits'),
  ('flops_table: --sparsities nan', '--sparsities .*got nan'),
  ('flops_table: --sparsities 1', r'--sparsities .*\[0, 1\), got 1.0'),
  ('flops_table: --sparsities', '--sparsities'),
  ('flops_table: --sparsity 0.5', '--sparsity'),
  ('flops_table: --lengths 0', 'length must be a positive number, got 0'),
  ('flops_table: --image-size 0', '--image-size must be at least 1, got 0'),
  ('flops_table: --image-size 8 --net lenet_5', 'at least 16×16'),
  ('flops_table: --extra-density nan', r'-density .*\[0, 1\], got nan'),
  ('flops_table: --net resnet_51', "Did you mean 'resnet_50'"),
  ('flops_table: --distributions uniformly', 'uniformly'),
  ('flops_table: --methods adam', "unknown method 'adam'. There are: dense"),
  ('flops_table: --num-classes 0', 'num_classes must be at least 1, got 0'),
  ('flops_table: --period 0', 'period must be at least 1, got 0'),
  ('flops_table: --pruning-stop 9000', 'stop must be after start'),
  ('flops_table: --pruning-period 0', '--pruning-period must be at least 1'),
  ('flops_table: --net mlp --out run', 'run already holds a run of train'),
  ('imagenet_resnet50: --data.dir nowhere', '--data.dir'),
  ('imagenet_resnet50: --preset rigl_90',
   "unknown preset 'rigl_90'; there are: dense",
   'more. Near it: rigl_90_erk, rigl_95_erk'),
  ('imagenet_resnet50: --data.synthetic --method lottery', 'lottery'),
  ('imagenet_resnet50: --data.synthetic --mesh.devices 8'
   ' --recipe.batch-size 12',
   'a batch of 12 examples cannot be shared out equally among 8 devices'),
  ('imagenet_resnet50: --data.synthetic --mesh.devices 8 --data.test-batch 9',
   'a batch of 9 examples'),
  ('imagenet_resnet50: --data.synthetic --mesh.devices 9',
   'from 1 to 8, as many as there'),
  ('imagenet_resnet50: --data.synthetic --mesh.data 3',
   'needs 3 devices, there are 1'),
  ('imagenet_resnet50: --data.synthetic --key -1', 'key must be at least 0'),
  ('imagenet_resnet50: --data.synthetic --eval-every 0',
   '--eval-every must be at least 1'),
  ('imagenet_resnet50: --data.synthetic --sparsity 0.9999'
   ' --allocation uniform --sparse.drop-fraction 2',
   r'drop_fraction must be in \(0, 1\)'),
  ('imagenet_resnet50: --data.synthetic --sparse.distribution er',
   'choose --allocation'),
  ('imagenet_resnet50: --data.synthetic --data.image-size 0',
   '--data.image-size must be'),
  ('imagenet_resnet50: --data.synthetic --net.width 0',
   'net.width must leave at least one'),
  ('imagenet_resnet50: --data.synthetic --hosts.count 2',
   'without hosts.coordinator'),
  ('imagenet_resnet50: --data.name imagenot --data.dir other', 'imagenot'),
  ('imagenet_resnet50: --evaluate no_such_run', 'no_such_run holds no run'),
  ('imagenet_resnet50: --evaluate no_such.npz', 'cannot read no_such.npz'),
  ('imagenet_resnet50: --evaluate run', 'a run of train'),
  ('imagenet_resnet50: --evaluate net.npz', 'no network of imagenet_resnet50'),
  ('imagenet_resnet50: --evaluate labels.npz', "no array 'about'"),
  # Benchmarks.
  ('benchmarks.psi: --alphas 0.5', 'alpha .*got 0.5'),
  ('benchmarks.psi: --size -1', '--size .*got -1'),
  ('benchmarks.topk: --no-resnet --sizes', '--sizes needs'),
  ('benchmarks.topk: --sizes 0', '--sizes .*got 0'),
  ('benchmarks.topk: --density 2', '--density .*got 2'),
  ('benchmarks.topk: --out file', 'file exists'),
  ('benchmarks.step: --rounds 0', '--rounds .*got 0'),
  ('benchmarks.step: --alphas 0.1', 'alpha .*got 0.1'),
  ('benchmarks.rewiring: --net nope', "'nope'"),
  ('benchmarks.rewiring: --sparsity nan', '--sparsity .*got nan'),
  ('benchmarks.dct: --convs middle', "no 'middle'; there are: first, early"),
  ('benchmarks.dct: --conv-batch 0', '--conv-batch must be at least 1'),
  ('benchmarks.dct: --densities 0', r'--densities must be in \(0, 1\]'),
  ('benchmarks.pipeline: --name nope', "'nope'"),
  ('benchmarks.pipeline: --image-size 0', '--image-size .* 1, got 0'),
  ('benchmarks.pipeline: --repeats 0', '--repeats must be at least 1'),
  ('benchmarks.pipeline: --enlarge 0', '--enlarge must be positive, got 0'),
  ('benchmarks.pipeline: --workers -1', '--workers .* at least 0, got -1'),
  ('benchmarks.resnet_step: --num-classes 0', '--num-classes .*got 0'),
  ('benchmarks.resnet_step: --methods lottery',
   "no 'lottery'; there are: static"),
  ('benchmarks.resnet_step: --repeats 0', '--repeats .* at least 1, got 0'),
  ('benchmarks.resnet_step: --image-size 0', '--image-size .* 1, got 0'),
  ('benchmarks.sparse_step: --methods rigel',
   "no 'rigel'; there are: static, "),
  ('benchmarks.sparse_step: --image-size 0', '--image-size must be at least 1'),
  ('benchmarks.sparse_speed: --learning-rate 0', '--learning-rate .*got 0'),
  ('benchmarks.sparse_speed: --widths', '--widths needs at least one value'),
  ('benchmarks.sparse_speed: --parts speed', "'speed'"),
  ('benchmarks.sparse_speed: --batches 0', '--batches .* at least 1, got 0'),
  ('benchmarks.sparse_speed: --repeats 0', '--repeats .* at least 1, got 0'),
  ('benchmarks.sparse_speed: --accuracy 1.5', r'\(0, 1\), got 1.5'),
  ('benchmarks.sparse_speed: --out run', 'run already holds'),
  # Launchers.
  ('launch:', 'SWEEP.json'),
  ('launch: nothing.json', 'cannot read nothing.json as JSON'),
  ('launch: other', 'Is a directory'),
  ('launch: cut.json', 'cannot read cut.json'),
  ('launch: list.json', 'as settings of Sweep'),
  ('launch: no_program.json', "'program' missing"),
  ('launch: odd_program.json', "'program' must be text, got 3"),
  ('launch: unknown_program.json', "cannot find .* 'experiments.nothing'"),
  ('launch: relative_program.json', "the program '.nothing'"),
  ('launch: no_such_program.json', 'json is no program .*no PRESETS'),
  ('launch: unknown_option.json', 'alhpa_1: .*--alhpa.* meant: --alphas'),
  ('launch: odd_value.json', "keys_a: .*--keys: .*'a'"),
  ('launch: no_value.json', "'vary' must have a list .* got {'keys': "),
  ('launch: list_vary.json', "'vary' must have a list"),
  ('launch: odd_args.json', "'args' must be a list of texts, got '--resume'"),
  ('launch: twice.json', 'two runs .* called keys_1'),
  ('launch: unknown_field.json', 'vray.* the fields program, out, vary, args'),
  ('launch: help.json', '--help'),
  ('launch: in_file.json', "another 'out'"),
  ('launch: unknown_preset.json', "no: unknown preset 'no'; there are"),
  ('launch: sweep.json --cluster local --gpus 0 0', '--gpus must differ'),
  ('launch: sweep.json --cluster local --gpus 0 --at-once 2',
   'without --at-once'),
  ('launch: sweep.json --gpus 0', 'choose --cluster local'),
  ('launch: sweep.json --cluster local --parameters timeout_min',
   'are name=value'),
  ('launch: sweep.json --at-once 0', '--at-once .*got 0'),
  ('launch: sweep.json --cluster moon', "'moon'"),
]  # fmt: skip


@pytest.mark.parametrize('case', CASES, ids=lambda case: case[0] or 'empty')
def test_mistake_is_one_line(case, world, capsys, monkeypatch):
  args, *told = case
  line = refusal(args, world, capsys, monkeypatch)
  for pattern in told:
    assert re.search(pattern, line), line


def test_page_that_cannot_be_written_is_named(world, capsys, monkeypatch):
  # The figures before it are drawn anew.
  monkeypatch.chdir(world)
  assert run('report folder_page') == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == 'error: cannot use folder_page/report.html: Is a directory.'


def test_tensorboard_without_its_package_leaves_nothing(
  world, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  args = ['train', *TINY, '--out', 'new', '--tensorboard']
  line = refusal(args, world, capsys, monkeypatch)
  assert "'powerprop_jax[tensorboard]'" in line
  for name in ('one_shot_pruning', 'weight_distribution'):
    args = [f'{name}:', '--tensorboard', '--out', 'new']
    assert 'tensorboardX' in refusal(args, world, capsys, monkeypatch)


def damage(run_path, step):
  """Cuts off the largest file of a checkpoint."""
  files = [p for p in (run_path / 'checkpoints' / step).rglob('*')]
  largest = max((p for p in files if p.is_file()), key=os.path.getsize)
  largest.write_bytes(largest.read_bytes()[:-10])


@pytest.fixture
def damaged(world, tmp_path):
  """A copy of the run whose latest checkpoint is cut off."""
  shutil.copytree(world / 'run', tmp_path / 'run')
  damage(tmp_path / 'run', '40')
  return tmp_path


class DamagedCheckpointTest:
  def test_pruning_falls_back_and_says_so(self, damaged, capsys):
    before = programs.contents(damaged)
    assert run(['prune', damaged / 'run', '--kept', '0.5']) == 0
    shown = capsys.readouterr()
    assert 'checkpoint of step 40' in shown.err
    assert 'continuing from the checkpoint of step 20' in shown.err
    assert 'step 20 of 40' in shown.out
    after = programs.contents(damaged)
    assert {path: after[path] for path in before} == before

  def test_resumed_run_falls_back_and_loses_nothing(
    self, world, damaged, capsys
  ):
    kept = programs.contents(damaged / 'run' / 'checkpoints' / '40')
    args = ['train', *TINY, '--out', damaged / 'run', '--resume']
    assert run(args) == 0
    assert 'step 20' in capsys.readouterr().err
    for name in ('metrics.jsonl', 'results.json'):
      repaired = (damaged / 'run' / name).read_bytes()
      assert repaired == (world / 'run' / name).read_bytes()
    aside = damaged / 'run' / 'checkpoints' / 'damaged' / '40'
    assert list(programs.contents(aside).values()) == list(kept.values())

  def test_run_without_an_intact_checkpoint_is_refused(
    self, damaged, capsys, monkeypatch
  ):
    damage(damaged / 'run', '20')
    monkeypatch.chdir(damaged)
    before = programs.contents(damaged)
    assert run('prune run') == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith('warning: ') for line in warnings)
    assert 'no checkpoint in' in error
    assert 'Nothing was deleted' in error
    assert programs.contents(damaged) == before

  def test_run_without_any_checkpoint_is_refused(
    self, damaged, capsys, monkeypatch
  ):
    (damaged / 'run' / 'checkpoints').rename(damaged / 'elsewhere')
    line = refusal('prune run', damaged, capsys, monkeypatch)
    assert 'has no checkpoint yet' in line
    assert '--resume' in line
