"""Costs of networks are those that were published, and are written down."""

import functools

import numpy as np
import programs
import pytest

from experiments.flops_table import __main__ as flops_table
from experiments.flops_table import published as flops_published

_run = functools.partial(programs.run, flops_table)


@pytest.mark.parametrize('preset', flops_table.PRESETS)
@pytest.mark.slow
def test_published_values_are_met(preset, tmp_path):
  out = tmp_path / 'run'
  every = ('uniform', 'er', 'erk', 'erk_first_dense')
  sparsities = ('0.8', '0.9', '0.95', '0.965', '0.99')
  args = ['--sparsities', *sparsities, '--distributions', *every]
  lengths = ['--lengths', '1', '2', '5', '10', '40', '100']
  assert _run('--preset', preset, *args, *lengths, '--out', out) == 0
  met = {'inference': 0, 'megabytes': 0, 'training': 0}
  for record in programs.results(out):
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
  inference, training = (
    [value for key, value in table.items() if key[0] == preset]
    for table in (flops_published.INFERENCE, flops_published.TRAINING)
  )
  ratios, sizes = np.isfinite(np.array(inference, float)).sum(axis=0)
  assert (met['inference'], met['megabytes']) == (ratios, sizes)
  assert met['training'] == sum(map(len, training))


def test_tables_are_printed_and_written(tmp_path, capsys):
  out = tmp_path / 'run'
  args = ['--net', 'lenet_5', '--sparsities', '0.9', '--out', out]
  assert _run(*args) == 0
  printed = capsys.readouterr().out
  assert 'lenet_5 on images of 28×28×1: 4 layers, 430,500 weights' in printed
  assert 'published' not in printed
  assert (out / 'table.txt').read_text() == printed
  layers = (out / 'layers.txt').read_text()
  assert 'lenet_5/logits/w' in layers and 'erk, sparsity 0.9' in layers
  assert sorted(path.stem for path in out.iterdir()) == [
    *('complete', 'config', 'layers', 'results', 'table')
  ]
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
  for more in ([], ['--image-size', '160'], ['--no-count-bias']):
    assert _run(*args, *more) == 0
    assert ('published' in capsys.readouterr().out) == (not more)
