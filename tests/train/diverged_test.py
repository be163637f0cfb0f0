"""Networks that diverge, and inputs that are not scaled: said, and survived."""

import json
import re

import jax
import numpy as np
import programs
import pytest

from experiments.one_shot_pruning import __main__ as one_shot_pruning
from experiments.sparse_training import __main__ as sparse_training
from powerprop_jax import nets
from powerprop_jax.export import export
from powerprop_jax.export.exported import Exported
from powerprop_jax.report import analysis, plotting
from powerprop_jax.train import ensemble, optimizers
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.runs import load, metrics
from powerprop_jax.train.runs.folder import RunFolder

TINY = ['--net', 'mlp', '--loop.num-steps', '20', '--loop.eval-every', '10']
LOST = ['--optimizer.learning-rate', '1e6']
SWEEP = ['--keys', '0', '--kept', '0.1', '--scopes', 'global', *TINY]
LARGEST = np.finfo(np.float32).max


main = programs.powerprop


def notes(capsys):
  """What a program has said on the standard error beside its progress."""
  lines = capsys.readouterr().err.splitlines()
  return [line for line in lines if line.startswith(('note: ', 'error: '))]


def save_features(path, scale, shift=0.0):
  generator = np.random.default_rng(0)
  features = scale * generator.normal(size=(100, 6)) + shift
  labels = np.arange(100) % 3
  np.savez(
    path,
    **{'x_train': features[:80], 'y_train': labels[:80]},
    **{'x_test': features[80:], 'y_test': labels[80:]},
  )
  return path


@pytest.fixture(scope='module')
def lost(tmp_path_factory):
  """A run of a network whose weights are NaN."""
  path = tmp_path_factory.mktemp('diverged') / 'lost'
  assert main('train', *TINY, *LOST, '--out', path) == 1
  return path


class HistogramTest:
  @pytest.mark.parametrize(
    'values',
    [
      LARGEST * np.linspace(-1, 1, 12),
      np.full(12, LARGEST),
      np.full(12, 0.3),
      np.full(12, 1e-45),
      np.full(12, np.inf),
      np.full(12, np.nan),
      np.array([1, -np.inf, np.inf, np.nan]),
      np.zeros(0),
    ],
  )
  def test_every_weight_is_counted_and_drawn(self, values):
    theta = {
      'odd': {'w': values.astype(np.float32).reshape(2, -1)},
      'good': {'w': np.ones((2, 2), np.float32)},
    }
    found = analysis.weight_histograms({1.0: theta, 2.0: theta})
    histogram = found[1.0]['odd/w']
    assert histogram.not_finite == np.sum(~np.isfinite(values))
    assert histogram.counts.sum() + histogram.outside == np.sum(
      np.isfinite(values)
    )
    assert np.isfinite(histogram.edges).all()
    figure = plotting.weight_histograms(found)
    figure.canvas.draw()
    count = 2 * histogram.not_finite
    texts = [text.get_text() for text in figure.texts]
    assert any(f'Not finite: {count}.' in t for t in texts) == (count > 0)

  def test_float64_weights_beyond_the_largest_float32_lie_outside(self):
    theta = {'a': {'w': np.array([[1e308, -1.7e308], [1.0, 2.0]])}}
    histogram = analysis.weight_histograms({0: theta})[0]['a/w']
    assert (histogram.counts.sum(), histogram.outside) == (2, 2)

  def test_curves_without_a_finite_loss_say_how_many_are_lost(self):
    records = [{'step': s, 'alpha': 1.0, 'loss': None} for s in (10, 20)]
    figure = plotting.learning_curves(records, fields=('loss',))
    figure.canvas.draw()
    assert any('Not finite: 2.' in text.get_text() for text in figure.texts)


class TrainTest:
  def test_loses_nothing_and_says_so_once(self, tmp_path, capsys):
    out = tmp_path / 'run'
    args = ['train', *TINY, *LOST, '--alpha', '1.5', '--key', '3', '--out', out]
    assert main(*args) == 1
    said = notes(capsys)
    note, error = said
    assert f'α = 1.5, key 3 of {out} diverged: by step 10 its loss' in note
    assert error.startswith(f'error: the network of {out} diverged')
    for name in ('report.html', 'weight_histograms.png', 'complete.json'):
      assert (out / name).stat().st_size
    assert [r['accuracy'] for r in programs.results(out)] == [0, 0]
    before = (out / 'metrics.jsonl').read_bytes()
    assert main(*args, '--resume') == 1
    assert notes(capsys) == said
    assert (out / 'metrics.jsonl').read_bytes() == before

  def test_huge_but_finite_weights_are_reported(self, tmp_path, capsys):
    out = tmp_path / 'run'
    args = ['train', '--net', 'mlp', '--loop.num-steps', '1', '--alpha', '1']
    args += ['--optimizer.learning-rate', '3e38', '--out', out]
    assert main(*args) == 1
    assert 'by step 1 its loss is not finite' in notes(capsys)[0]
    rows = json.loads((out / 'weights.json').read_text())
    assert 1e36 < rows[-1]['mean_abs'] < LARGEST
    assert (out / 'weight_histograms.png').exists()


class ScaleTest:
  @pytest.mark.parametrize(
    ('scale', 'shift', 'shown'),
    [(3, 0, None), (1500, 0, '1,721'), (50, 128, '149.2')],
  )
  def test_inputs_that_are_not_scaled_are_named_once(
    self, tmp_path, capsys, scale, shift, shown
  ):
    path = save_features(tmp_path / 'odd.npz', scale, shift)
    status = main('train', '--data.name', path, *TINY, '--out', tmp_path / 'x')
    said = notes(capsys)
    if shown is None:
      assert (status, said) == (0, [])
      return
    (line,) = [x for x in said if 'not scaled' in x]
    assert f'the inputs of {path} are not scaled' in line
    assert f'of a feature is {shown}' in line
    assert 'divide them by 255 or standardise them' in line

  def test_what_counts_is_what_the_network_sees(self, tmp_path, capsys):
    path = save_features(tmp_path / 'odd.npz', 1500)
    args = ['--data.name', path, '--methods', 'dense', '--alphas', '1', *TINY]
    args += ['--keys', '0', '--normalise', '--out', tmp_path / 'run']
    assert programs.run(sparse_training, *args) == 0
    assert notes(capsys) == []


class SweepTest:
  @pytest.mark.slow
  def test_one_network_of_two_is_a_note_and_status_0(self, tmp_path, capsys):
    out = tmp_path / 'run'
    rate = ['--optimizer.learning-rate', '3']
    args = ['--alphas', '1', '5', *SWEEP, *rate, '--out', out]
    assert programs.run(one_shot_pruning, *args) == 0
    (note,) = notes(capsys)
    assert note.startswith(f'note: α = 5, key 0 of {out} diverged')
    load.check_any_finite(out, load.load(out))
    (note,) = notes(capsys)
    assert re.search('α = 5, key 0 .*leaf .* is not finite', note)

  def test_all_networks_are_status_1(self, tmp_path, capsys):
    out = tmp_path / 'run'
    args = ['--alphas', '1', '2', *SWEEP, *LOST, '--out', out]
    assert programs.run(one_shot_pruning, *args) == 1
    *said, error = notes(capsys)
    assert [line[:18] for line in said] == [
      'note: α = 1, key 0',
      'note: α = 2, key 0',
    ]
    assert f'each of the 2 networks of {out} diverged' in error
    assert (out / 'report.html').exists()

  def test_finished_combinations_say_it_again(self, tmp_path, capsys):
    out = tmp_path / 'run'
    args = ['--methods', 'dense', '--alphas', '1', '--keys', '0', *TINY, *LOST]
    assert programs.run(sparse_training, *args, '--out', out) == 1
    said = notes(capsys)
    assert 'dense_density_1_alpha_1 diverged: by step 10' in said[0]
    assert programs.run(sparse_training, *args, '--out', out, '--resume') == 1
    assert notes(capsys) == said

  def test_infinite_weight_behind_finite_losses_is_named(
    self, tmp_path, capsys
  ):
    # A bias of -∞ makes a dead unit, which no loss shows.
    net = nets.make('mlp', 10)
    splits = data.load(data.DataConfig())
    members = ensemble.product([1.0, 2.0], [0])
    config = optimizers.OptimizerConfig()
    make_tx = lambda alpha: optimizers.make_tx(config, alpha, 10)
    state = ensemble.create(net, make_tx, members, splits.example)
    bias = state.phi['mlp/linear_0']['b']
    state.phi['mlp/linear_0']['b'] = bias.at[1, 0].set(-np.inf)
    folder = RunFolder(tmp_path / 'run', {}, program='test')
    with metrics.MetricsWriter(folder.metrics_path) as writer:
      for alpha in (1.0, 2.0):
        writer.write(5, {'alpha': alpha, 'key': 0, 'loss': 1.0})
    assert ensemble.say_diverged(members, state, folder) == [False, True]
    (note,) = notes(capsys)
    assert 'α = 2, key 0' in note
    assert "its leaf 'mlp/linear_0/b' is not finite" in note


class RefusalTest:
  @pytest.mark.parametrize(
    'command',
    [
      *('export', 'export --format=npz', 'export --format=scipy'),
      *('export --format=jax', 'prune', 'bench'),
    ],
  )
  def test_weights_that_are_not_finite_are_refused(self, lost, capsys, command):
    before = programs.contents(lost.parent)
    capsys.readouterr()
    name, *options = command.split()
    line = programs.error(main(name, lost, *options), capsys)
    assert f"α = 2, key 0 of {lost} diverged: its leaf 'mlp/linear_0/b'" in line
    assert programs.contents(lost.parent) == before

  def test_file_with_such_weights_is_not_timed(self, tmp_path, capsys):
    theta = {'mlp/logits': {'w': np.full((64, 10), np.nan, np.float32)}}
    masks = jax.tree.map(np.isnan, theta)
    path = tmp_path / 'net.npz'
    export.write(path, Exported(theta, masks, {}, {}), format='npz')
    line = programs.error(main('bench', path), capsys)
    assert f"{path} diverged: its leaf 'mlp/logits/w' is not finite" in line
