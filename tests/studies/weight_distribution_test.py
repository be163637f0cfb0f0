"""The distribution of weights writes what it promises."""

import programs
import pytest

from experiments.weight_distribution import __main__ as weight_distribution

TINY = [
  *('--nets', 'mlp', 'mnist_cnn', '--alphas', '1', '4', '--keys', '0'),
  *('--loop.num-steps=1', '--loop.batch-size=8', '--loop.eval-every=1'),
  *('--epsilons', '0.001', '0.01', '--kept', '1', '0.1'),
]
FIGURES = (
  *('weight_histograms', 'latent_histograms', 'near_zero', 'accuracy'),
  'learning_curves',
)
finished = programs.finished(weight_distribution, TINY)


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  for net in ('mlp', 'mnist_cnn'):
    figures = ' '.join(f'{kind}_{net}.png' for kind in FIGURES)
    programs.assert_written(finished, f'{figures} {net}/metrics.jsonl')
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
    (r['alpha'], r['weights']): r
    for r in programs.results(finished)
    if r.get('leaf') == 'mlp/linear_0/w' and 'at_zero' in r
  }
  assert heap[4, 'phi']['at_zero'] < 0.1
  assert heap[4, 'phi']['peak'] > 0.2
  assert heap[4, 'theta']['at_zero'] > 0.5
  assert heap[1, 'phi']['at_zero'] == heap[1, 'theta']['at_zero']


@pytest.mark.slow
def test_a_network_that_is_finished_is_not_trained_again(finished):
  programs.assert_resumes_to_the_same(
    weight_distribution, TINY, finished, 'mlp/checkpoints'
  )
