"""The comparison with cosine transforms writes what it promises."""

import functools
import json

import numpy as np
import programs
import pytest

from experiments.common import sparse_runs
from experiments.dct_plus_sparse import __main__ as dct_plus_sparse
from experiments.dct_plus_sparse import patterns, training
from experiments.dct_plus_sparse.config import PRESETS
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import main as cli
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import metrics

TINY = [
  *('--net=mlp', '--loop.num-steps=4', '--loop.batch-size=8'),
  *('--loop.eval-every=2', '--loop.steps-per-dispatch=2', '--sparse.period=1'),
  *('--score.rounds=2', '--score.synflow-rounds=2', '--score.batch-size=20'),
  '--timed-steps=1',
]
ARGS = [
  *TINY,
  *('--supports', 'erk', 'snip', 'set'),
  *('--densities', '0.05'),
  *('--keys', '0', '1'),
]
run = functools.partial(programs.run, dct_plus_sparse)
# Three supports, for two keys.
finished = programs.finished(dct_plus_sparse, ARGS)


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  figures = 'accuracy.png signals_erk.png signals_snip.png'
  programs.assert_written(finished, f'table.md {figures}')
  found = [r for r in programs.results(finished) if 'accuracy' in r]
  fields = ('support', 'density', 'network', 'key')
  assert [tuple(record[f] for f in fields) for record in found] == [
    (support, 0.05, network, key)
    for support in ('erk', 'snip', 'set')
    for network in ('standard', 'dct')
    if (network, support) != ('dct', 'snip')
    for key in (0, 1)
  ]
  for record in found:
    assert abs(record['density_measured'] - record['density']) < 2e-3
    assert 0 <= record['accuracy'] <= 1
    assert record['loss'] > 0
  head, _, *rows = (finished / 'table.md').read_text().splitlines()
  assert head == '| support | density | standard | dct |'
  assert [row.split()[1] for row in rows] == ['erk', 'snip', 'set']
  # A gap, where a network has no such support.
  assert rows[1].endswith('|  |')


def test_sizes_are_those_of_the_arrays(finished):
  # mlp on digits: 64 × 100 + 100 × 10 weights and 110 biases; Adam has two
  # slots for each and a step, sparsify a step, a key and masks of a byte for
  # each parameter.
  weights, biases = 64 * 100 + 100 * 10, 110
  for record in programs.results(finished):
    if 'accuracy' not in record:
      continue
    scales = 2 * (record['network'] == 'dct')
    connections = round(record['density_measured'] * weights)
    others = biases + scales
    assert record['parameters'] == connections + others
    dense = 12 * (weights + others) + 4
    assert record['bytes_dense'] == dense
    assert record['bytes_masked'] == dense + (weights + others) + 4 + 8
    condensed = 12 * (connections + others) + 4 * connections + 4
    moves = record['support'] == 'set'
    assert record['bytes_condensed'] == (None if moves else condensed)


def test_every_layer_has_a_density_and_signals(finished):
  layers = [r for r in programs.results(finished) if 'layer' in r]
  networks = [r for r in programs.results(finished) if 'accuracy' in r]
  assert len(layers) == 2 * len(networks)
  for record in layers:
    assert 0 < record['layer_density'] <= 1
    assert record['gradient_norm'] > 0
  of = lambda network: [
    r['variance']
    for r in layers
    if (r['network'], r['support']) == (network, 'erk')
  ]
  assert min(of('dct')) > max(of('standard'))


def test_costs_compare_the_networks(finished):
  sizes, steps = (
    json.loads((finished / f'{name}.json').read_text())
    for name in ('sizes', 'steps')
  )
  places = [(row['network'], row['density']) for row in sizes]
  assert places == [('standard', 0.05), ('dct', 0.05)]
  assert all(row['condensed / dense'] < 0.2 for row in sizes)
  standard, dct = steps
  assert standard['ratio to standard'] == 1
  assert dct['ratio to standard'] > 0


@pytest.mark.slow
def test_networks_are_exported_as_they_were_scored(finished, tmp_path):
  for record in programs.results(finished):
    network, support = record['network'], record['support']
    if 'accuracy' not in record or (record['key'], support) != (1, 'erk'):
      continue
    part = finished / 'combinations' / f'{network}_erk_density_0.05_alpha_1'
    path = tmp_path / f'{network}.npz'
    found = programs.exported(part, path, '--key', 1)
    assert found.about['test']['accuracy'] == record['accuracy']
    assert found.about['density'] == pytest.approx(record['density_measured'])
    bench = ['bench', str(path), '--repeats', '1', '--batches', '1']
    assert cli.main(bench) == 0
  programs.assert_reported_again(finished)


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(finished):
  args = [*ARGS, '--timed-steps', '0']
  programs.assert_resumes_to_the_same(dct_plus_sparse, args, finished)


@pytest.mark.slow
def test_a_combination_that_was_stopped_continues_to_the_same(finished):
  # As if it had been stopped after its evaluations, with its masks scored.
  expected = programs.results(finished)
  folder = finished / 'combinations' / 'standard_snip_density_0.05_alpha_1'
  logged = len(metrics.read_metrics(folder / 'metrics.jsonl'))
  for path in (folder / 'complete.json', folder / 'results.json'):
    path.unlink()
  assert run(*ARGS, '--timed-steps', '0', '--out', finished, '--resume') == 0
  assert programs.results(finished) == expected
  assert len(metrics.read_metrics(folder / 'metrics.jsonl')) == logged


@pytest.mark.slow
def test_with_powerprop_the_sparse_part_leaves_its_start(tmp_path):
  out = tmp_path / 'run'
  args = ['--supports', 'erk', '--densities', '0.1', '--keys', '0']
  args += ['--alphas', '2', '--networks', 'dct', '--loop.num-steps=60']
  args += ['--loop.eval-every=30', '--dct-optimizer.learning-rate=0.01']
  assert run(*TINY, *args, '--timed-steps=0', '--out', out) == 0
  name = 'dct_erk_density_0.1_alpha_2'
  logged = metrics.read_metrics(out / 'combinations' / name / 'metrics.jsonl')
  losses = [record['loss'] for record in logged if 'loss' in record]
  assert losses[-1] < losses[0]


def test_scores_that_rank_nothing_leave_a_combination_out(tmp_path, capsys):
  # Images of zeros: there is no gradient of any weight.
  images, labels = np.zeros((60, 8, 8, 1), np.float32), np.arange(60) % 2
  path = tmp_path / 'dark.npz'
  np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
  args = ['--data.name', path, '--supports', 'snip', '--out', tmp_path / 'run']
  args += ['--networks', 'standard', '--densities', '0.1', '--keys', '0']
  assert run(*TINY, *args) == 2
  found = capsys.readouterr()
  assert 'snip_density_0.1_alpha_1 is left out: SNIP scores' in found.out
  assert 'error: there is no network to report' in found.err


def test_presets_compare_both_networks_and_have_the_epochs_of_the_recipe():
  for name, config in PRESETS.items():
    chosen = training.combinations(config)
    assert {c.network for c in chosen} == {'standard', 'dct'}, name
  for name, examples, epochs in (
    ('mnist_lenet_300_100', 55_000, 5),
    ('cifar10_resnet_50', 45_000, 200),
  ):
    loop = PRESETS[name].loop
    steps = examples // loop.batch_size
    assert loop.num_steps in range(steps * epochs, (steps + 1) * epochs + 1)
    assert loop.num_steps % loop.eval_every == 0


@pytest.mark.parametrize('name', ['mnist_lenet_300_100', 'mnist_lenet_5'])
def test_presets_leave_a_weight_in_every_layer(name):
  config = PRESETS[name]
  part = Arrays(np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, int))
  splits = data.Splits(part, part, part, 10, 'zeros')
  for combination in training.combinations(config):
    network, support, density, alpha = combination
    net = training.make_net(config, network, alpha, 10)
    theta = step_lib.shapes(net, splits.example)
    patterns.check_density(support, theta, density, combination.name)
    # Raises an error where a layer would lose all its weights.
    make_tx = training.tx_maker(config, combination, theta, splits)
    sparse_runs.check_starts(make_tx, theta, combination.name)
