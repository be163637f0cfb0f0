"""The comparison of sparse methods writes what it promises, also in pieces."""

import functools

import processes
import programs
import pytest

from experiments.sparse_training import __main__ as sparse_training
from experiments.sparse_training.config import PRESETS
from powerprop_jax.train.runs import metrics

ARGS = [
  *('--net=mlp', '--densities=0.2', '--loop.num-steps=8'),
  *('--loop.batch-size=8', '--loop.eval-every=4'),
  *('--loop.steps-per-dispatch=4', '--sparse.period=2'),
  *('--methods', 'dense', 'rigl', '--alphas', '1', '2', '--keys', '0', '1'),
]
run = functools.partial(programs.run, sparse_training)
# The dense network and RigL, for two α and two keys.
finished = programs.finished(sparse_training, ARGS)


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  layers = 'churn_density_0.2.png layers_density_0.2.png'
  programs.assert_written(finished, f'table.md accuracy.png {layers}')
  found = programs.results(finished)
  places = [(r['alpha'], r['method'], r['density'], r['key']) for r in found]
  assert places == [
    (alpha, method, 1.0 if method == 'dense' else 0.2, key)
    for alpha in (1.0, 2.0)
    for method in ('dense', 'rigl')
    for key in (0, 1)
  ]
  for record in found:
    assert abs(record['density_measured'] - record['density']) < 2e-3
    assert 0 <= record['accuracy'] <= 1
    assert 0 <= record['validation_accuracy'] <= 1
    assert record['loss'] > 0
  head, _, *rows = (finished / 'table.md').read_text().splitlines()
  assert head == '| method | density | measured | α = 1 | α = 2 |'
  assert [row.split()[1] for row in rows] == ['dense', 'rigl']


def test_every_evaluation_has_scores_churn_and_densities(finished):
  path = finished / 'combinations' / 'rigl_density_0.2_alpha_2'
  logged = metrics.read_metrics(path / 'metrics.jsonl')
  for step in (4, 8):
    at_step = [record for record in logged if record['step'] == step]
    assert [r['key'] for r in at_step if 'loss' in r] == [0, 1]
    assert sum('churn' in r for r in at_step) == 2
    assert sum('layer' in r for r in at_step) == 4
  # Rewired at steps 2 and 4, of which the first evaluation has seen one.
  assert all(0 < r['churn'] < 0.5 for r in logged if 'churn' in r)


def test_what_is_finished_is_not_trained_again(finished):
  programs.assert_resumes_to_the_same(sparse_training, ARGS, finished)


@pytest.mark.slow
def test_workers_give_the_same_results_and_may_change_on_resuming(
  finished, tmp_path
):
  out = tmp_path / 'run'
  args = [*ARGS, '--alphas', '2', '--out', out]
  # As it is started by hand: workers must find what __main__ defines.
  processes.run('-m', 'experiments.sparse_training', *args, '--workers', 2)
  expected = [r for r in programs.results(finished) if r['alpha'] == 2]
  found = programs.results(out)
  assert [r['density_measured'] for r in found] == [
    r['density_measured'] for r in expected
  ]
  for ours, theirs in zip(found, expected, strict=True):
    # One thread adds up in another order.
    assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)
  assert run(*args, '--workers', 1, '--resume') == 0
  assert programs.results(out) == found


def test_mnist_presets_have_the_epochs_of_the_recipe():
  for name, epochs in (('mnist_lenet_300_100', 100), ('mnist_lenet_5', 10)):
    config = PRESETS[name]
    examples = 60_000 - config.data.num_validation
    steps = config.loop.num_steps * config.loop.batch_size
    assert steps == epochs * examples
