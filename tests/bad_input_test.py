"""A user's mistake gets one line that names it, status 2, and changes nothing.

Each case is a command line of a program, in a folder with files to get wrong.
"""

import functools
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

# What the cases of a program begin with: one small lane, as it is built before
# the folder is looked at; and short runs.
FIRST = {
  'experiment': 'one_shot_pruning: --net=mlp --alphas 1 --keys 0',
  'adaptive_alpha:': 'adaptive_alpha: --preset tiny',
  'dct_plus_sparse:': 'dct_plus_sparse: --net=mlp --loop.num-steps=4'
  ' --loop.batch-size=8 --loop.eval-every=2 --loop.steps-per-dispatch=2'
  ' --sparse.period=1',
  'imagenet_resnet50:': 'imagenet_resnet50: --preset tiny --mesh.devices 1',
  'synthetic': 'imagenet_resnet50: --preset tiny --mesh.devices 1'
  ' --data.synthetic',
}


def run(args):
  """Runs a program, written 'NAME: …' or as in FIRST, or powerprop."""
  args = args.split() if isinstance(args, str) else [str(a) for a in args]
  if args:
    args = [*FIRST.get(args[0], args[0]).split(), *args[1:]]
  if not args or not args[0].endswith(':'):
    return main.main(args)
  program = programs.module(args[0][:-1])
  if args[0] == 'launch:':
    return program.run(args[1:])
  return programs.run(program, *args[1:])


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
  spoilt = {k: v for runs in SPOILT_RUNS.values() for k, v in runs.items()}
  # The figures before the page are drawn anew.
  spoilt['folder_page'] = replaced('report.html', None), ''
  for name, (spoil, _) in spoilt.items():
    shutil.copytree(path / 'run', path / name, ignore=only_latest)
    spoil(path / name)
  data = (path / 'program.npz').read_bytes()
  (path / 'cut_program.npz').write_bytes(data[: len(data) // 2])
  np.savez(path / 'old_program.npz', program=np.zeros(9, np.uint8), about='{}')
  data = (path / 'net.safetensors').read_bytes()
  (path / 'cut.safetensors').write_bytes(data[: len(data) // 2])
  for name, (sweep, _) in SWEEPS.items():
    json_files.write_json(path / f'{name}.json', sweep)
  (path / 'loop').symlink_to('loop')
  (path / 'dangling').symlink_to('gone')
  (path / 'späces_✓').mkdir()
  (path / 'späces_✓' / 'notes').write_text('mine')
  np.save(path / 'array.npy', np.zeros(3))
  (path / 'array.npy').rename(path / 'array.npz')
  (path / 'other').mkdir()
  (path / 'other' / 'thesis.tex').write_text('do not lose this')
  (path / 'file').write_text('a file')
  for name, (changed, _) in ODD_DATA.items():
    np.savez(path / f'{name}.npz', **GOOD_DATA | changed)
  images = {k: v for k, v in GOOD_DATA.items() if k != 'x_test'}
  np.savez(path / 'keys.npz', images=GOOD_DATA['x_test'], **images)
  good = (path / 'good.npz').read_bytes()
  for name, data in {
    'empty': b'',
    'broken': b'PK not an archive',
    'pickle': b'\x80\x04.',
    'cut': good[:-30],
  }.items():
    (path / f'{name}.npz').write_bytes(data)
  np.savez_compressed(path / 'spoilt.npz', **GOOD_DATA)
  spoilt = bytearray((path / 'spoilt.npz').read_bytes())
  spoilt[len(spoilt) // 3] ^= 255
  (path / 'spoilt.npz').write_bytes(spoilt)
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
figures = functools.partial(
  edited, 'contents', 'page', 'sections', 1, 'figures', 0
)


def replaced(name, content):
  """Replaces a file; a folder takes its place for None."""

  def spoil(path):
    (path / name).unlink()
    if content is None:
      (path / name).mkdir()
    else:
      (path / name).write_bytes(content)

  return spoil


# By command, how a run is spoilt that it reads, and what its line says.
config = functools.partial(replaced, 'config.json')
SPOILT_RUNS = {
  'train --resume --out {}': {
    'cut_config': (config(b'{"format": "powerp'), 'cannot read {}/config.json'),
    'list_config': (config(b'[]'), 'not written by this version'),
    'no_program': (edited(program=None), "'program' is missing"),
    'no_settings': (edited(config=None), "'config' is missing"),
  },
  'train --config {}': {
    'of_old': (edited('versions', powerprop_jax='0.0.1'), 'version 0.0.1'),
    'other_settings': (edited('config', alhpa=3), 'alhpa'),
    'odd_schedule': (edited('config', 'optimizer', schedule='cosin'), 'cosin'),
    'odd_loop': (edited('config', loop=3), 'read 3 as settings of LoopConfig'),
    'odd_alpha_of_run': (edited('config', alpha='two'), "alpha .*got 'two'"),
    'no_versions': (edited(versions=None), 'by version None'),
  },
  'extend {} --num-steps 80': {
    'stopped': (lambda path: (path / 'complete.json').unlink(), 'its end'),
  },
  'prune {}': {
    'binary_config': (config(b'\xff\xfe\x00'), 'cannot read {}/config.json'),
    'folder_config': (config(None), 'Is a directory'),
    'other_format': (edited(format='version 2'), 'not written by this version'),
    'no_command': (edited(command=None), "'command' is missing"),
    'odd_program': (edited(program=['train']), "'program' .* or spoilt"),
    'of_0.1.0': (edited(contents=None), 'version 0.1.0.*--resume'),
    'no_net': (networks(net=None), "no_net/config.json: .*'net' missing"),
    'no_data': (networks(data=None), "no_data/config.json: .*'data' missing"),
    'odd_net': (networks(net=3), 'net must be str, got 3'),
    'unknown_net': (networks(net='lenet'), "unknown network 'lenet'"),
    'larger_net': (networks(net='lenet_300_100'), 'no network lenet_300_100'),
    'odd_alpha': (networks(alphas=['two']), "alphas must be .*got 'two'"),
    'more_keys': (networks(keys=[0, 1]), 'of 2 networks, its latest .* of 1'),
    'odd_steps': (networks(num_steps='many'), "num_steps .*got 'many'"),
    'unknown_field': (networks(num_stepps=3), 'num_stepps'),
    'gone_data': (networks(data={'name': 'gone.npz'}), 'no file gone.npz'),
    'no_checkpoints': (lambda path: shutil.rmtree(path / 'checkpoints'),
                       'has no checkpoint yet.*--resume'),
  },
  'report {}': {
    'of_another': (edited(program='another', contents={}),
                   'a run of another.*--resume: '),
    'no_pages': (edited('contents', 'page', sections='none'),
                 "sections must be list or tuple, got 'none'"),
    'odd_figure': (figures(draw='learning_curve'),
                   "draw learning_curves .* no 'learning_curve'"),
    'odd_options': (figures('options', titel=''),
                    'draw learning_curves .*titel'),
    'null_results': (replaced('results.json', b'null'),
                     'results.json is not a list of records'),
    'binary_results': (replaced('results.json', b'\xff\xfe\x00'),
                       'cannot read {}/results.json'),
    'cut_weights': (replaced('weights.json', b'[{"leaf"'),
                    'cannot read {}/weights.json'),
    'odd_metrics': (replaced('metrics.jsonl', b'{"step": "x"}\n{"step": 2}\n'),
                    'line 1 of {}/metrics.jsonl'),
    'folder_metrics': (replaced('metrics.jsonl', None), 'Is a directory'),
    'folder_figure': (replaced('learning_curves.png', None),
                      '{}/learning_curves.png: Is a dir'),
  },
}  # fmt: skip
GOOD_DATA = {
  'x_train': np.zeros((40, 4, 4), np.uint8),
  'y_train': np.arange(40) % 3,
  'x_test': np.zeros((6, 4, 4), np.uint8),
  'y_test': np.arange(6) % 3,
}
zeros = lambda *shape, dtype=np.uint8: np.zeros(shape, dtype)
floats = functools.partial(zeros, dtype=np.float32)
ODD_DATA = {
  'shapes': ({'x_test': zeros(6, 5, 5)}, r'\(5, 5, 1\).*must agree'),
  'rank': ({'x_test': zeros(6)}, r'x_test .*\(6,\).*expected are'),
  'lengths': ({'x_test': zeros(5, 4, 4)}, '5 images .*6 labels.*be as many'),
  'labels': ({'y_test': np.arange(6) + 2}, 'y_test .*label 7.*end at 2'),
  'negative': ({'y_train': np.full(40, -1)}, 'y_train .*from -1 to -1.*from 0'),
  'onehot': ({'y_train': np.eye(3, dtype=int)[np.arange(40) % 3]},
             r'shape \(40, 3\); expected .*argmax'),
  'float_labels': ({'y_train': floats(40)},
                   r'type float32; labels are integers.* .*astype\(int\)'),
  'huge_labels': ({'y_train': np.full(40, 10**7)}, 'labels from 10000000'),
  'object_labels': ({'y_train': np.array([None] * 40)}, 'savez.*of numbers'),
  'no_labels': ({'y_test': zeros(0, dtype=int)}, 'y_test of .* is empty'),
  'infinite': ({'x_train': np.full((40, 4, 4), np.inf)}, 'NaN or infinite'),
  'large': ({'x_train': np.full((40, 4, 4), 1e300)}, 'infinite .*float32'),
  'other_type': ({'x_train': floats(40, 4, 4)}, 'float32; they must agree'),
  'no_features': ({'x_train': floats(40, 0)}, 'x_train .*empty'),
  'whole_images': ({'x_train': zeros(40, 4, 4, dtype=int)},
                   'type int64; images are uint8'),
  'half': ({'x_validation': zeros(4, 4, 4)}, 'lacks y_validation'),
  'validation': ({'x_validation': zeros(4, 4, 4),
                  'y_validation': np.arange(4) % 3}, ''),
  'table': ({'x_train': floats(40, 5), 'x_test': floats(6, 5)}, ''),
  'good': ({}, ''),
}  # fmt: skip
SWEEP = {
  'program': 'experiments.one_shot_pruning',
  'out': 'runs/sweep',
  'vary': {'keys': [0, 1]},
}
SWEEPS = {
  'sweep': (SWEEP, ''),
  'list': ([1], 'as settings of Sweep'),
  'no_program': ({'out': 'x', 'vary': {}}, "'program' missing"),
  'odd_program': (SWEEP | {'program': 3}, "'program' must be text, got 3"),
  'unknown_program': (SWEEP | {'program': 'experiments.nothing'},
                      "cannot find .* 'experiments.nothing'"),
  'relative_program': (SWEEP | {'program': '.nothing'},
                       "the program '.nothing'"),
  'no_such_program': (SWEEP | {'program': 'json'},
                      'json is no program .*no PRESETS'),
  'unknown_option': (SWEEP | {'vary': {'alhpa': [1]}},
                     'alhpa_1: .*--alhpa.* meant: --alphas'),
  'odd_value': (SWEEP | {'vary': {'keys': ['a']}}, "keys_a: .*--keys: .*'a'"),
  'no_value': (SWEEP | {'vary': {'keys': []}}, "must have a list .*'keys': "),
  'odd_args': (SWEEP | {'args': '--resume'},
               "'args' must be a list of texts, got '--resume'"),
  'twice': (SWEEP | {'vary': {'keys': [1, '1']}}, 'two runs .* called keys_1'),
  'unknown_field': (SWEEP | {'vray': {}},
                    'vray.* the fields program, out, vary, args'),
  'help': (SWEEP | {'args': ['--help']}, '--help'),
  'in_file': (SWEEP | {'out': 'file/below'}, "another 'out'"),
  'unknown_preset': (SWEEP | {'vary': {'preset': ['no']}},
                     "no: unknown preset 'no'; there are"),
}  # fmt: skip


def refusal(args, world, capsys, monkeypatch):
  """The single line with which a command line is refused."""
  monkeypatch.chdir(world)
  before = programs.contents(world)
  capsys.readouterr()
  line = programs.error(run(args), capsys)
  assert programs.contents(world) == before
  return line


# Of commands and programs, what is typed, and what the line must name: the
# thing, then the remedy.
CASES = {
  'experiment': [
    ('--alphas', '--alphas', 'at least one'),
    ('--keys 1000000000000000000000000000000', 'key .*below 2.32'),
    ('--out run', 'run already holds a run', 'another --out'),
    ('--out run --resume', 'not of one_shot', 'another --out'),
    ('--preset minst', "'minst'", 'mnist_reference'),
    ('--loop.batch-size 5000', '5,000 .*1,197'),
  ],
  'prune': [
    ('run --kept', '--kept', 'at least one'),
    ('run --output-factor 2 --scope global', '--output-factor', 'layer'),
    ('run', 'run_pruned already holds', 'another --out'),
    ('run --out other', 'other .*thesis.tex', 'another --out'),
    ('nowhere', 'nowhere holds no run', 'config.json'),
    ('run_pruned', 'a run of prune', 'no networks of its own'),
    ('', 'Missing .*RUN', '--help'),
    ('run --kept 95', 'got 95. A sparsity of 0.9'),
    ('net.npz', 'net.npz holds no run'),
    ('run --out run/checkpoints', 'not empty and holds no run'),
    ('run --kept 0.4 --out run_pruned --resume', 'kept: .0.5. → .0.4.'),
  ],
  'train': [
    ('--data.name mnits', "unknown data set 'mnits', did you mean 'mnist'",
     'fashion_mnist', '.npz'),
    ('--data.name mnist --data.dir nowhere', '--data.dir',
     'mnist is not prepared in nowhere', 'does not exist',
     'download it: powerprop data get mnist --dir nowhere'),
    ('--data.name kmnist/x --data.dir nowhere', "unknown data set 'kmnist/x'"),
    ('--data.name nothing.npz', 'nothing.npz', 'path of a .npz'),
    ('--data.name keys.npz', 'lacks x_test: it has ', 'y_test.'),
    ('--data.name broken.npz', 'broken.npz', 'numpy.savez'),
    ('--data.num-validation 1437', 'num_validation is 1437', '1436'),
    ('--data.name validation.npz --data.num-validation 5',
     'leave num_validation out'),
    ('--net lenet', "'lenet'", "mean 'lenet_5'"),
    ('--out run', 'run already holds a run', 'another --out'),
    ('--out file', 'file is a file', 'another --out'),
    ('--out file/below', 'file/below', 'another --out'),
    ('--alhpa 2', '--alhpa', 'meant: --alpha'),
    ('--alpha two', '--alpha.*two', '--help'),
    ('--optimizer.name adamw', "'adamw'", "'sgd', 'adam'"),
    ('--alpha inf', 'alpha must be a finite number .* got inf'),
    ('--alpha', "value for argument '--alpha'"),
    ('--key 1.5', "--key: .*'1.5'"),
    ('--key 4294967296', 'key .*below 2.32, got 4294967296'),
    ('--loop.batch-size 1198', '1,198 .*1,197 examples'),
    ('--optimizer.name adam --optimizer.momentum 0.9', 'leave it 0'),
    ('--optimizer.nesterov', 'nesterov needs a momentum'),
    ('--optimizer.form naive --optimizer.decay-theta 1', 'recommended'),
    ('--data.num-validation 0', 'num_validation is 0'),
    ('--data.num-validation x', "--data.num-validation: .*'x'"),
    ('--net lenet_5', '16×16, got 8×8. Use mnist_cnn'),
    ('--preset digits', "unknown preset 'digits'"),
    ('run', 'Unrecognized options: run'),
    ('--data.name imagenet2012', 'train/images reads it in batches'),
    ('--data imagenet2012', 'meant: .*--data.name'),
    ('--data.name empty.npz', 'not a .npz archive'),
    ('--data.name pickle.npz', 'cannot read'),
    ('--data.name cut.npz', 'cannot read'),
    ('--data.name spoilt.npz', 'cannot read'),
    ('--data.name array.npz', 'not a .npz archive'),
    ('--data.name net.npz', 'lacks x_train'),
    ('--data.name table.npz --net lenet_5 --loop.batch-size 4',
     'got 1×1.* features, lenet_300_100 or mlp'),
    ('--out dangling', 'cannot use dangling'),
    ('--out loop', 'cannot use loop'),
    ('--out späces_✓', r'späces_✓ is not empty .*notes'),
    ('--method rigll --sparsity 0.5', "'rigll'", "'top_kast'",
     "mean 'rigl'"),
    ('--method rigl', 'rigl needs a sparsity', '--sparsity 0.9'),
    ('--sparsity 0.9', 'sparsity is 0.9, .*dense network has 0', '--method'),
    ('--method set --sparsity 0.9 --sparse.penalty 2',
     'sparse.penalty is 2.0, but set has distribution', 'Leave it out'),
    ('--sparse.period 5', 'sparse.period is 5, but dense has none'),
    ('--method rigl --sparsity 0.99999', 'would lose all of them'),
    ('--method rigl --sparsity 0.9 --alpha 2 --sparse.regrow zero',
     "regrow='zero' would start"),
    ('--method rigl --sparsity 0.9 --sparse.period 5000',
     'nothing would ever be rewired'),
    ('--data.name good.npz --augment --loop.batch-size 4', 'padding'),
    ('--config', '--config needs a value'),
    ('--config run/weights.json', "not written .*'format' is None, .*or file"),
    ('--config nothing.json', 'cannot read nothing.json as JSON'),
    ('--config run_pruned', 'settings of prune, not of train'),
    ('--config of_old', 'by version 0.0.1 of powerprop_jax, and this is',
     'as options; the command was'),
    ('--config other_settings', "read alhpa as settings .*fields .*alpha"),
    ('--config odd_schedule', "schedule must be one of .*got 'cosin'"),
    ('--config list_config/config.json', 'not written by this version'),
    ('--config run --out run', 'run already holds a run'),
    ('--config run --out run --resume --alpha 3', 'alpha: 2.0 → 3.0. Use'),
    ('--out run --resume --method set --sparsity 0.5',
     "method: 'dense' → 'set'; sparsity: 0.0 → 0.5"),
    ('--out run --resume --alpha 3', 'alpha: 2.0 → 3.0; loop.num_steps: 40 →',
     'longer: powerprop extend run --num-steps STEPS'),
    ('--out run_pruned --resume', 'a run of prune, not of train'),
  ],
  'data': [
    ('get mnits', "'mnits' cannot be downloaded. Did you mean 'mnist'",
     'cifar100, svhn_cropped'),
    ('get', "cannot 'get'", 'powerprop data get NAME'),
    ('put mnist', "cannot 'put mnist'"),
    ('get imagenet2012', 'cannot be downloaded'),
    ('get mnist --dir file', 'cannot use file/downloads: '),
  ],
  'extend': [
    ('run', 'Missing .*num-steps'),
    ('run --num-steps 40', 'is of 40 steps; .*must be more, got 40'),
    ('run --num-steps 80 --alpha 3 --normalise',
     'length of run, got normalise: False → True; alpha: 2.0 → 3.0. Leave',
     'train --config run --alpha 3 --normalise --out FOLDER'),
    ('run --num-steps 80 --alhpa 3', '--alhpa.* meant: --alpha'),
    ('run --num-steps 80 --out new', "out: 'run' → 'new'"),
    ('run extra --num-steps 80', 'Unrecognized options: extra'),
    ('run_pruned --num-steps 80', 'a run of prune; only those of powerprop tr'),
    ('nowhere --num-steps 80', 'nowhere holds no run'),
    ('stopped --num-steps 80', 'before its end.*--resume'),
    ('stopped --num-steps 40', 'before its end; pass --resume'),
    ('other_settings --num-steps 80', 'other_settings/config.json: .*alhpa'),
  ],
  'report': [
    ('of_0.1.0', 'version 0.1.0', '--resume'),
    ('cut_config', 'cannot read cut_config/config.json'),
    ('no_net', "no_net/config.json: .*'net' missing"),
    ('nowhere', 'nowhere holds no run', 'config.json'),
  ],
  'export': [
    ('of_another', 'a run of another', 'no networks of its own'),
    ('odd_net --out x', 'net must be str'),
    ('run --out file', '--overwrite'),
    ('run --out other', 'is a folder'),
    ('run --out file/below', 'no folder file'),
    ('run --format onnx --out x', "'onnx'", 'safetensors, npz, scipy, j'),
    ('run --alpha 3 --out x', 'Its pairs of α and key are: 2 0'),
    ('run --format safetensor --out x', "Did you mean 'safetensors'"),
    ('run --scope global --output-factor 2 --out x', '--output-factor'),
    ('nowhere --out x', 'holds no run'),
    ('run --batch 3 --out x', '--batch is for --format jax'),
    ('run_pruned --out x', 'a run of prune'),
  ],
  '': [
    ('', 'no command', 'train, extend, prune', 'methods, nets'),
    ('methods rigl', 'Unrecognized .*rigl'),
    ('nett', "mean 'nets'"),
    ('prun run', "'prun'", "mean 'prune'"),
    ('--alpha 2', "unknown command '--alpha'"),
  ],
  'bench': [
    ('run --batches 1 1', '--batches must differ'),
    ('nowhere', 'there is no'),
    ('other', 'holds no run'),
    ('file', 'as an exported network'),
    ('program.npz --kept 0.5', 'not pruned once more'),
    ('cut_program.npz', 'damaged or cut off'),
    ('old_program.npz', 'a program of an earlier version'),
    ('run --out file', 'file exists'),
    ('run --out nowhere/table', 'no folder nowhere'),
    ('net.npz --kept 0.5', '--kept'),
    ('cut.safetensors', 'damaged or cut off'),
  ],
  'sparse_training:': [
    ('--densities 0.0001', 'would lose all of them'),
    ('--methods rigll', 'rigll'),
    ('--methods rigl rigl', '--methods must differ'),
    ('--net mlpp', "Did you mean 'mlp'"),
    ('--sparse.period 5000', 'nothing would ever be rewired'),
    ('--alphas 2 --sparse.regrow zero', "regrow='zero' would start"),
    ('--data.name mnits', 'mnits'),
    ('--data.name good.npz --augment --loop.batch-size 4', 'padding'),
    ('--densities 0.1 0.1', r'ities must .*, got \(0.1, 0.1\)'),
    ('--loop.batch-size 2000', '2,000 .*1,197'),
    ('--sparse.ablation 0.5', 'constant_fan_in'),
    ('--out run --resume', 'a run of train, not of sparse'),
  ],
  'class_specialisation:': [
    ('--net=mlp --density 0.0001', 'lose all of them'),
    ('--methods rigl rigl', '--methods must differ'),
    ('--net mlpp', "Did you mean 'mlp'"),
    ('--out file', 'file is a file'),
  ],
  'dct_plus_sparse:': [
    ('--supports erk erk', '--supports must differ'),
    ('--networks dct dct', '--networks must differ'),
    ('--densities 0.0005 --supports uniform', 'would lose all of them'),
    ('--densities 0.0001 --supports snip', '1 connections for 2 layers'),
    ('--dct-init-scale 0 --alphas 2', '--dct-init-scale'),
    ('--score.num-batches 1000', '--score.num-batches'),
    ('--net mlpp', "Did you mean 'mlp'"),
    ('--sparse.period 5000', 'nothing would ever be rewired'),
    ('--loop.batch-size 5000', '5,000 .*1,197'),
  ],
  'adaptive_alpha:': [
    ('--batch-size 5000', 'a batch of 5,000 .*240 examples'),
    ('--methods fixed fixed', '--methods'),
    ('--nets mlpp', 'mlpp'),
    ('--epochs 1', 'too few for a race'),
    ('--control.initial-alpha 1', 'must start in'),
    ('--race.candidates', 'at least one'),
    ('--race.candidates 2 2', 'must differ'),
  ],
  'continual_permuted:': [
    ('--net.batch-size 99999', '99,999 .*1,197'),
    ('--methods ewc ewc', '--methods must differ'),
    ('--rates 0.1 0.1 -1', 'learning_rate must be positive'),
    ('--rates 0.1', '--rates needs one for each of the 3'),
    ('--packing.budgets 0.5', '--packing.budgets needs one for each'),
    ('--packing.restart zero', "restart='zero'"),
    ('--stream.kind split --stream.num-tasks 11', '10 classes'),
    ('--stream.kind sequence', '--stream.sequence needs the names'),
    ('--stream.sequence mnist', 'is for kind=sequence'),
    ('--data.name mnits', 'mnits'),
  ],
  'weight_distribution:': [
    ('--nets mlp --out file', 'file is a file'),
    ('--nets mlpp', 'mlpp'),
    ('--nets mlp mlp', '--nets'),
    ('--data.name mnits', 'mnits'),
  ],
  'flops_table:': [
    ('--sparsities', '--sparsities'),
    ('--image-size 8 --net lenet_5', 'at least 16×16'),
    ('--extra-density nan', r'-density .*\[0, 1\], got nan'),
    ('--net resnet_51', "Did you mean 'resnet_50'"),
    ('--methods adam', "unknown method 'adam'. There are: dense"),
    ('--pruning-stop 9000', 'stop must be after start'),
    ('--net mlp --out run', 'run already holds a run of train'),
  ],
  'imagenet_resnet50:': [
    ('--data.dir nowhere', '--data.dir'),
    ('--preset rigl_90', "unknown preset 'rigl_90'; there are: dense",
     'more. Near it: rigl_90_erk, rigl_95_erk'),
    ('--data.name imagenot --data.dir other', 'imagenot'),
    ('--evaluate no_such_run', 'no_such_run holds no run'),
    ('--evaluate no_such.npz', 'cannot read no_such.npz'),
    ('--evaluate run', 'a run of train'),
    ('--evaluate net.npz', 'no network of imagenet_resnet50'),
    ('--evaluate labels.npz', "no array 'about'"),
  ],
  'synthetic': [
    ('--mesh.devices 8 --recipe.batch-size 12',
     'a batch of 12 examples cannot be shared out equally among 8 devices'),
    ('--mesh.devices 8 --data.test-batch 9',
     'a batch of 9 examples'),
    ('--mesh.devices 9', 'from 1 to 8, as many as there'),
    ('--mesh.data 3', 'needs 3 devices, there are 1'),
    ('--sparsity 0.9999 --allocation uniform --sparse.drop-fraction 2',
     r'drop_fraction must be in \(0, 1\)'),
    ('--sparse.distribution er', 'choose --allocation'),
    ('--net.width 0', 'net.width must leave at least one'),
    ('--hosts.count 2', 'without hosts.coordinator', "as 'address:port'"),
  ],
  'benchmarks.topk:': [
    ('--no-resnet --sizes', '--sizes needs'),
    ('--out file', 'file exists'),
  ],
  'benchmarks.rewiring:': [('--net nope', "'nope'")],
  'benchmarks.dct:': [
    ('--convs middle', "no 'middle'; there are: first, early"),
  ],
  'benchmarks.pipeline:': [('--name nope', "'nope'")],
  'benchmarks.resnet_step:': [
    ('--methods lottery', "no 'lottery'; there are: static"),
  ],
  'benchmarks.sparse_step:': [
    ('--methods rigel', "no 'rigel'; there are: static, "),
  ],
  'benchmarks.sparse_gpu:': [
    ('--width 100', 'must be a multiple of 4 and of --block 64, got 100'),
  ],
  'benchmarks.sparse_networks:': [
    ('--nets gpt', "no 'gpt'; there are: perceptron, "),
    ('--distribution er', "'er'"),
  ],
  'benchmarks.sparse_speed:': [
    ('--widths', '--widths needs at least one value'),
    ('--out run', 'run already holds'),
  ],
  'launch:': [
    ('', 'SWEEP.json'),
    ('nothing.json', 'cannot read nothing.json as JSON'),
    ('cut_config/config.json', 'cannot read cut_config/config.json'),
    ('other', 'Is a directory'),
    ('sweep.json --cluster local --gpus 0 0', '--gpus must differ'),
    ('sweep.json --cluster local --gpus 0 --at-once 2', 'without --at-once'),
    ('sweep.json --gpus 0', 'choose --cluster local'),
    ('sweep.json --cluster local --parameters timeout_min', 'are name=value'),
  ],
}  # fmt: skip
# What is out of range: by what the line must say, of which command which value.
RANGES = {
  'at least 1': {
    'train': '--alpha=0.5 --alpha=nan --loop.num-steps=0 --loop.batch-size=0'
    ' --loop.steps-per-dispatch=0 --optimizer.stair-steps=0',
    'experiment': '--alphas=nan --lanes-at-once=0 --loop.eval-every=0',
    'export run --format jax --out x': '--batch=0',
    'bench run': '--batches=0 --repeats=0',
    'sparse_training:': '--workers=0 --num-test=0 --lanes-at-once=0',
    'dct_plus_sparse:': '--score.rounds=0 --workers=0',
    'adaptive_alpha:': '--control.period=0 --epochs=0 --workers=0'
    ' --race.candidates=0.5',
    'continual_permuted:': '--workers=0 --measure-every=0 --net.epochs=0'
    ' --net.batch-size=0 --net.hidden=0 --ewc.num-examples=0'
    ' --stream.num-tasks=0',
    'flops_table:': '--image-size=0 --num-classes=0 --period=0'
    ' --pruning-period=0',
    'synthetic': '--eval-every=0 --data.image-size=0',
    'benchmarks.psi:': '--size=-1 --alphas=0.5',
    'benchmarks.topk:': '--sizes=0',
    'benchmarks.step:': '--rounds=0 --alphas=0.1',
    'benchmarks.dct:': '--conv-batch=0',
    'benchmarks.pipeline:': '--image-size=0 --repeats=0',
    'benchmarks.resnet_step:': '--num-classes=0 --repeats=0 --image-size=0',
    'benchmarks.sparse_step:': '--image-size=0',
    'benchmarks.sparse_speed:': '--batches=0 --repeats=0',
    'benchmarks.sparse_networks:': '--batch=0 --repeats=0',
    'benchmarks.sparse_gpu:': '--block=0 --batch=0',
    'launch: sweep.json': '--at-once=0',
  },
  'at least 0': {
    'train': '--key=-1 --optimizer.decay-phi=nan --optimizer.decay-theta=inf'
    ' --optimizer.decay-theta=-1',
    'experiment': '--keys=-1',
    'sparse_training:': '--keys=-1',
    'class_specialisation:': '--keys=-1',
    'dct_plus_sparse:': '--timed-steps=-1',
    'adaptive_alpha:': '--control.warm-up=-1',
    'continual_permuted:': '--keys=-1 --ewc.strength=-1',
    'synthetic': '--key=-1',
    'benchmarks.pipeline:': '--workers=-1',
  },
  'at most 64': {
    'train': '--alpha=1e6',
    'sparse_training:': '--alphas=1e6',
    'class_specialisation:': '--alpha=1e6',
    'dct_plus_sparse:': '--alphas=100',
    'adaptive_alpha:': '--alphas=1e6 --race.candidates=1e6'
    ' --branch.candidates=100 --control.alpha-max=1000',
    'continual_permuted:': '--alphas=1e6',
    'weight_distribution: --nets mlp': '--alphas=1e6',
  },
  r'\(0, 1\]': {
    'prune run': '--kept=0 --kept=nan --kept=1e-13',
    'experiment': '--kept=0',
    'export run --out x': '--kept=0',
    'sparse_training:': '--densities=0',
    'class_specialisation:': '--density=0',
    'dct_plus_sparse:': '--densities=0',
    'adaptive_alpha:': '--race.kept=0',
    'continual_permuted:': '--packing.densities=1.5 --packing.gamma=0'
    ' --packing.share=0',
    'weight_distribution:': '--kept=0',
    'benchmarks.topk:': '--density=2',
    'benchmarks.dct:': '--densities=0',
  },
  r'[(\[]0, 1\)': {
    'train --method rigl --out x': '--sparsity=1 --sparsity=90 --sparsity=-1'
    ' --sparsity=nan',
    'train': '--optimizer.momentum=1 --optimizer.stair-factor=0'
    ' --optimizer.b2=1',
    'sparse_training:': '--sparse.drop-fraction=nan',
    'adaptive_alpha:': '--branch.trunk-share=1 --race.final-share=1.5',
    'flops_table:': '--sparsities=nan --sparsities=1',
    'benchmarks.rewiring:': '--sparsity=nan',
    'benchmarks.sparse_speed:': '--accuracy=1.5',
  },
  'positive': {
    'train': '--optimizer.learning-rate=-1 --optimizer.learning-rate=inf',
    'prune run': '--output-factor=nan',
    'dct_plus_sparse:': '--dct-optimizer.learning-rate=0 --dct-init-scale=nan',
    'sparse_training:': '--variance=0 --variance=inf',
    'adaptive_alpha:': '--control.epsilon=0 --epsilons=nan',
    'weight_distribution:': '--epsilons=0',
    'flops_table:': '--lengths=0',
    'benchmarks.pipeline:': '--enlarge=0',
    'benchmarks.sparse_speed:': '--learning-rate=0',
  },
}


def _rows():
  """The rows of all tables: a command line, and patterns of what it is told."""
  for command, rows in CASES.items():
    for args, *told in rows:
      yield (f'{command} {args}', *told)
  for range_, commands in RANGES.items():
    for command, options in commands.items():
      for option, value in (text.split('=') for text in options.split()):
        name = option.split('.')[-1].strip('-').rstrip('s').replace('-', '[-_]')
        got = re.escape(f'{float(value):g}')
        yield f'{command} {option} {value}', f'{name}.* {range_}.*got {got}'
  for command, runs in SPOILT_RUNS.items():
    for name, (_, told) in runs.items():
      yield command.format(name), told.format(name)
  for name in patterns.SCORED:
    command = f'dct_plus_sparse: --networks dct --supports {name}'
    yield command, f'transform start at zero, where {name} cannot rank them'
  for command, table in {
    'train --data.name {}.npz': ODD_DATA,
    'launch: {}.json': SWEEPS,
  }.items():
    for name, (_, told) in table.items():
      if told:
        yield command.format(name), told


@pytest.mark.parametrize('case', [*_rows()], ids=lambda case: case[0])
def test_mistake_is_one_line(case, world, capsys, monkeypatch):
  args, *told = case
  line = refusal(args, world, capsys, monkeypatch)
  for pattern in told:
    assert re.search(pattern, line), line


def test_page_that_cannot_be_written_is_named(world, capsys, monkeypatch):
  monkeypatch.chdir(world)
  line = programs.error(run('report folder_page'), capsys)
  assert line == 'error: cannot use folder_page/report.html: Is a directory.'


@pytest.mark.parametrize(
  ('extra', 'package'), [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')]
)
def test_a_writer_without_its_package_leaves_nothing(
  extra, package, world, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  args = ['train', *TINY, '--out', 'new', f'--{extra}']
  line = refusal(args, world, capsys, monkeypatch)
  assert f"'powerprop_jax[{extra}]'" in line
  args = ['extend', 'run', '--num-steps', '80', f'--{extra}']
  assert package in refusal(args, world, capsys, monkeypatch)
  names = 'one_shot_pruning weight_distribution sparse_training language '
  names += 'dct_plus_sparse class_specialisation continual_permuted '
  names += 'adaptive_alpha imagenet_resnet50'
  for name in names.split():
    args = [f'{name}:', f'--{extra}', '--out', 'new']
    assert package in refusal(args, world, capsys, monkeypatch)


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
