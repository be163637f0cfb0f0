import json

import numpy as np
import pytest

from experiments.flops_table import __main__ as flops_table
from experiments.flops_table import published as flops_published
from powerprop_jax.train.cli import arguments


def _run(*args):
  return arguments.run(
    flops_table.main,
    flops_table.PRESETS,
    prog='python -m experiments.flops_table',
    description='',
    args=list(args),
  )


def _records(out):
  return json.loads((out / 'results.json').read_text())


@pytest.mark.parametrize('preset', flops_table.PRESETS)
@pytest.mark.slow
def test_published_values_are_met(preset, tmp_path):
  out = tmp_path / 'run'
  every = ('uniform', 'er', 'erk', 'erk_first_dense')
  sparsities = ('0.8', '0.9', '0.95', '0.965', '0.99')
  args = ['--sparsities', *sparsities, '--distributions', *every]
  lengths = ['--lengths', '1', '2', '5', '10', '40', '100']
  assert _run('--preset', preset, *args, *lengths, '--out', str(out)) == 0
  met = {'inference': 0, 'megabytes': 0, 'training': 0}
  for record in _records(out):
    for name in met:
      published = record.get(f'published_{name}')
      if published is None:
        continue
      met[name] += 1
      tolerance = 0.01
      if record.get('length', 1) > 1:
        tolerance = max(0.01, 0.03 * published)
      assert abs(record[name] - published) <= tolerance, record
  # Each published value was compared.
  tables = flops_published.INFERENCE, flops_published.TRAINING
  inference, training = (
    {key: value for key, value in table.items() if key[0] == preset}
    for table in tables
  )
  ratios, sizes = np.array(list(inference.values()), float).T
  assert met['inference'] == np.isfinite(ratios).sum()
  assert met['megabytes'] == np.isfinite(sizes).sum()
  assert met['training'] == sum(map(len, training.values()))


def test_tables_are_printed_and_written(tmp_path, capsys):
  out = tmp_path / 'run'
  args = ['--net', 'lenet_5', '--sparsities', '0.9', '--out', str(out)]
  assert _run(*args) == 0
  printed = capsys.readouterr().out
  assert 'lenet_5 on images of 28×28×1: 4 layers, 430,500 weights' in printed
  assert 'published' not in printed
  assert (out / 'table.txt').read_text() == printed
  layers = (out / 'layers.txt').read_text()
  assert 'lenet_5/logits/w' in layers and 'erk, sparsity 0.9' in layers
  assert {path.name for path in out.iterdir()} == {
    'complete.json',
    'config.json',
    'layers.txt',
    'results.json',
    'table.txt',
  }
  assert _run(*args) == 2
  assert 'already holds a run' in capsys.readouterr().err
  assert _run(*args, '--resume') == 0


def test_the_first_layer_stays_dense_where_that_is_the_rule():
  costs = flops_table.layer_costs.layer_costs(
    flops_table.nets.make('lenet_5', 10), np.zeros((1, 28, 28, 1)), True
  )
  first, *others = (cost.leaf for cost in costs)
  uniform = flops_table.share_out(costs, 'uniform', 0.9)
  assert uniform == dict.fromkeys(others, 0.9)
  assert first not in flops_table.share_out(costs, 'erk_first_dense', 0.9)
  assert first in flops_table.share_out(costs, 'erk', 0.9)


def test_values_that_count_something_else_are_not_compared(capsys):
  args = ['--sparsities', '0.8', '--distributions', 'erk']
  assert _run(*args) == 0
  assert 'published' in capsys.readouterr().out
  assert _run(*args, '--image-size', '160') == 0
  assert 'published' not in capsys.readouterr().out
  assert _run(*args, '--no-count-bias') == 0
  assert 'published' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--net', 'resnet_51'], "Did you mean 'resnet_50'"),
    (['--sparsities', '1'], '--sparsities must be in [0, 1), got 1.0'),
    (['--sparsities'], '--sparsities'),
    (['--distributions', 'uniformly'], 'uniformly'),
    (['--methods', 'adam'], "unknown method 'adam'. There are: dense"),
    (['--image-size', '0'], '--image-size must be at least 1, got 0'),
    (['--image-size', '8', '--net', 'lenet_5'], 'at least 16×16'),
    (['--num-classes', '0'], 'num_classes must be at least 1, got 0'),
    (['--period', '0'], 'period must be at least 1, got 0'),
    (['--lengths', '0'], 'length must be a positive number, got 0'),
    (['--pruning-stop', '9000'], 'stop must be after start'),
    (['--pruning-period', '0'], '--pruning-period must be at least 1'),
    (['--extra-density', 'nan'], '--extra-density must be in [0, 1], got nan'),
    (['--sparsity', '0.5'], '--sparsity'),
  ],
)
def test_mistakes_get_one_line_and_write_nothing(
  args, message, tmp_path, capsys
):
  out = tmp_path / 'run'
  assert _run(*args, '--out', str(out)) == 2
  printed = capsys.readouterr()
  assert printed.out == ''
  assert printed.err.count('\n') == 1 and message in printed.err
  assert not out.exists()
