"""The distribution of weights writes what it promises, and refuses the rest."""

import functools

import programs
import pytest

from experiments.weight_distribution import __main__ as weight_distribution

TINY = [
  *('--nets', 'mlp', 'mnist_cnn', '--alphas', '1', '4', '--keys', '0'),
  *('--loop.num-steps=1', '--loop.batch-size=8', '--loop.eval-every=1'),
  *('--epsilons', '0.001', '0.01', '--kept', '1', '0.1'),
]
run = functools.partial(programs.run, weight_distribution)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  out = tmp_path_factory.mktemp('weights') / 'run'
  assert run(*TINY, '--out', out) == 0
  return out


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  kinds = ('weight_histograms', 'latent_histograms', 'near_zero', 'accuracy')
  names = ['config.json', 'results.json', 'report.html', 'complete.json']
  for net in ('mlp', 'mnist_cnn'):
    names += [f'{kind}_{net}.png' for kind in (*kinds, 'learning_curves')]
    names.append(f'{net}/metrics.jsonl')
  for name in names:
    assert (finished / name).stat().st_size > 0, name
  results = programs.results(finished)
  for net, leaves in (('mlp', 2), ('mnist_cnn', 4)):
    of_net = [record for record in results if record['net'] == net]
    assert all({'net', 'alpha', 'key'} <= set(record) for record in of_net)
    count = lambda field, of_net=of_net: sum(field in r for r in of_net)
    # For 2 powers: 2 shares kept; 2 distances in each leaf and in total; each
    # leaf of θ and of φ.
    assert count('accuracy') == 2 * 2
    assert count('near_zero') == 2 * 2 * (leaves + 1)
    assert count('at_zero') == 2 * 2 * leaves


@pytest.mark.slow
def test_latent_weights_form_two_heaps_for_a_large_power_from_the_start(
  finished,
):
  # φ = θ^(1/4) moves a normal distribution away from zero.
  heap = {
    (record['alpha'], record['weights']): record
    for record in programs.results(finished)
    if record.get('leaf') == 'mlp/linear_0/w' and 'at_zero' in record
  }
  assert heap[4, 'phi']['at_zero'] < 0.1
  assert heap[4, 'phi']['peak'] > 0.2
  assert heap[4, 'theta']['at_zero'] > 0.5
  assert heap[1, 'phi']['at_zero'] == heap[1, 'theta']['at_zero']


@pytest.mark.slow
def test_a_network_that_is_finished_is_not_trained_again(finished):
  before = programs.times(finished / 'mlp/checkpoints')
  results = programs.results(finished)
  assert run(*TINY, '--out', finished, '--resume') == 0
  assert programs.times(finished / 'mlp/checkpoints') == before
  assert programs.results(finished) == results


@pytest.mark.parametrize(
  ('args', 'named'),
  [
    ('--nets mlpp', 'mlpp'),
    ('--nets mlp mlp', '--nets'),
    ('--alphas 0.5', '0.5'),
    ('--kept 0', '--kept'),
    ('--epsilons 0', '--epsilons'),
    ('--data.name mnits', 'mnits'),
  ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
  args, named, tmp_path, capsys
):
  programs.refuses(run, args, named, tmp_path / 'run', capsys)
