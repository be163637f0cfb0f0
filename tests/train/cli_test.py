"""The command: train, prune and report work together on one folder."""

import dataclasses
import html
import json
import re
import shutil

import jax
import numpy as np
import programs
import pytest

import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.train import methods
from powerprop_jax.train.cli import main as cli
from powerprop_jax.train.cli import train
from powerprop_jax.train.runs import folder, load, metrics

# What the help of each command says.
_OF_EXPORTS = ('--kept', '--scope', '--alpha', '--overwrite')
OWN = {
  'train': (
    *('--alpha', '--optimizer.decay-phi', '--data.name'),
    *('1 is ordinary training', '--sparse.drop-fraction', '--config'),
    *methods.METHODS,
    *nets.NAMES,
  ),
  'extend': ('RUN', '--num-steps'),
  'prune': ('RUN',),
  'report': ('RUN',),
  'export': _OF_EXPORTS,
  'bench': _OF_EXPORTS,
  'methods': (),
  'nets': (),
}
TINY = ['--net=mlp', '--loop.num-steps=60', '--loop.eval-every=30']


def read(path):
  return json.loads(path.read_text())


def main(*args):
  assert programs.powerprop(*args) == 0


class TrainTest:
  def test_writes_everything_that_a_run_promises(self, run):
    names = {path.name for path in run.iterdir()}
    assert names == {
      *('config.json', 'metrics.jsonl', 'results.json', 'weights.json'),
      *('checkpoints', 'complete.json', 'report.html'),
      *(
        f'{figure}.{kind}'
        for figure in ('learning_curves', 'weight_histograms')
        for kind in ('png', 'pdf', 'svg')
      ),
    }
    found = programs.results(run)
    assert [record['split'] for record in found] == ['validation', 'test']
    for record in found:
      assert (record['alpha'], record['key'], record['step']) == (1.3, 0, 60)
      assert (record['sparsity'], record['density']) == (0.0, 1.0)
      assert 0.2 < record['accuracy'] <= 1
    measured = metrics.read_metrics(run / 'metrics.jsonl')
    assert [record['step'] for record in measured] == [30, 60]
    assert found[0]['accuracy'] == measured[-1]['validation_accuracy']
    page = (run / 'report.html').read_text()
    assert page.count('data:image/png') == 2
    assert 'mlp on digits' in page


class SparseTrainTest:
  def test_results_and_tables_say_how_many_weights_there_are(self, sparse_run):
    masks = load.load(sparse_run).state.opt_state.masks
    weights = [leaf[0] for leaf in jax.tree.leaves(masks) if leaf.ndim == 3]
    density = sum(m.sum() for m in weights) / sum(m.size for m in weights)
    assert density == pytest.approx(0.2, abs=1e-3)
    for record in programs.results(sparse_run):
      assert record['method'] == 'rigl'
      assert record['density'] == pytest.approx(density)
      assert record['sparsity'] == pytest.approx(1 - density)
    *_, selected, _ = read(sparse_run / 'weights.json')
    assert selected['sparsity'] == pytest.approx(1 - density)

  def test_connections_move_and_are_drawn(self, sparse_run):
    measured = metrics.read_metrics(sparse_run / 'metrics.jsonl')
    moved = [record['churn'] for record in measured if 'churn' in record]
    assert len(moved) == 2
    assert moved[0] > 0
    layers = {record['layer'] for record in measured if 'layer' in record}
    assert layers == {'mlp/linear_0/w', 'mlp/logits/w'}
    page = (sparse_run / 'report.html').read_text()
    assert page.count('data:image/png') == 4
    assert 'mlp on digits, rigl at 80 % of zeros' in page

  def test_pruned_further_its_density_is_what_is_left(
    self, sparse_run, tmp_path, capsys
  ):
    out = tmp_path / 'pruned'
    main('prune', sparse_run, '--kept', 1, 0.5, 0.1, '--out', out)
    assert 'was trained with 0.2 of its weights' in capsys.readouterr().out
    found = programs.results(out)
    _, test = programs.results(sparse_run)
    densities = [record['density'] for record in found]
    assert densities[0] == pytest.approx(test['density'])
    assert densities[2] == pytest.approx(0.1, abs=1e-3)
    assert found[0]['accuracy'] == pytest.approx(test['accuracy'], abs=1e-6)

  def test_exported_it_has_its_connections_alone(self, sparse_run, tmp_path):
    found = programs.exported(sparse_run, tmp_path / 'net.npz')
    _, test = programs.results(sparse_run)
    assert found.about['density'] == pytest.approx(test['density'])
    assert found.about['test']['accuracy'] == pytest.approx(test['accuracy'])

  @pytest.mark.slow
  @pytest.mark.parametrize('method', methods.METHODS[1:])
  def test_every_method_trains(self, tmp_path, method):
    out = tmp_path / method
    args = ['train', *TINY, '--method', method, '--sparsity', 0.8]
    if 'period' in methods.settings_of(method):
      args += ['--sparse.period', 20]
    main(*args, '--out', out)
    for record in programs.results(out):
      assert record['density'] == pytest.approx(0.2, abs=1e-3)

  @pytest.mark.slow
  def test_trains_the_same_without_its_zeros(self, sparse_run, tmp_path):
    more = '--config', sparse_run, '--sparse.regrow', 'redraw'
    found = []
    for execution in ('masked', 'condensed'):
      out = tmp_path / execution
      main('train', *more, '--execution', execution, '--out', out)
      found.append([record['loss'] for record in programs.results(out)])
    np.testing.assert_allclose(*found, rtol=1e-4)

  def test_is_resumed_to_the_same(self, sparse_run, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(sparse_run, out)
    shutil.rmtree(out / 'checkpoints' / '60')
    stored = read(out / 'config.json')['config']
    args = ['--method', 'rigl', '--sparsity', 0.8, '--alpha', 1.5, '--key', 3]
    args += ['--normalise', '--sparse.period', 20]
    main('train', *TINY, *args, '--out', out, '--resume')
    assert read(out / 'config.json')['config'] == stored
    for name in ('metrics.jsonl', 'results.json'):
      assert (out / name).read_bytes() == (sparse_run / name).read_bytes()


class ConfigTest:
  def test_settings_of_a_run_make_the_same_run(self, run, tmp_path):
    copy = tmp_path / 'copy.json'
    shutil.copy(run / 'config.json', copy)
    out = tmp_path / 'again'
    main('train', '--config', copy, '--out', out)
    for name in ('metrics.jsonl', 'results.json'):
      assert (out / name).read_bytes() == (run / name).read_bytes()

  def test_options_change_some_of_them(self, run, tmp_path, capsys):
    out = tmp_path / 'other'
    main('train', '--alpha', 3, f'--config={run}', '--key', 1, '--out', out)
    old, new = (read(path / 'config.json')['config'] for path in (run, out))
    changes = ['alpha: 1.3 → 3.0', 'key: 0 → 1']
    assert list(folder.differences(old, new)) == changes


class ExtendTest:
  CONSTANT = ('--optimizer.schedule', 'constant', '--loop.steps-per-dispatch=9')

  def test_goes_on_as_the_longer_run_would_have(self, tmp_path, capsys):
    long, short = tmp_path / 'long', tmp_path / 'short'
    args = [*TINY, *self.CONSTANT]
    main('train', *args, '--loop.num-steps=90', '--out', long)
    main('train', *args, '--out', short)
    capsys.readouterr()
    # What the run has already is no change.
    main('extend', short, '--num-steps', 90, '--net=mlp')
    assert 'its learning rate goes from 0.1 to 0.1.' in capsys.readouterr().err
    for name in ('metrics.jsonl', 'results.json', 'weights.json'):
      assert (short / name).read_bytes() == (long / name).read_bytes()
    assert (
      read(short / 'config.json')['config']
      == (read(long / 'config.json')['config'])
    )
    assert load.load(short).num_steps == 90
    assert (short / 'complete.json').exists()

  def test_says_what_becomes_of_the_schedules(self, sparse_run, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(sparse_run, out)
    config = folder.read_settings(train.TrainConfig, out, 'train')
    longer = dataclasses.replace(config.loop, num_steps=120)
    assert train.goes_on(config, dataclasses.replace(config, loop=longer)) == (
      'goes on from step 60 as a run of 120 steps; its learning rate goes from '
      '0 to 0.05 and falls to 0 along the cosine of 120 steps; connections may '
      'move again until step 90.'
    )
    main('extend', out, '--num-steps', 120)
    assert [r['step'] for r in programs.results(out)] == [120, 120]
    assert programs.results(out)[1]['density'] == pytest.approx(0.2, abs=1e-3)

  def test_an_interrupted_one_is_resumed(
    self, run, tmp_path, capsys, monkeypatch
  ):
    out = tmp_path / 'run'
    shutil.copytree(run, out)
    args = ['extend', out, '--num-steps', 90]
    stop = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with monkeypatch.context() as patch:
      patch.setattr(folder.RunFolder, 'write_results', stop)
      assert programs.powerprop(*args) == 130
    capsys.readouterr()
    assert programs.powerprop(*args) == 2
    assert 'pass --resume' in capsys.readouterr().err
    assert programs.powerprop(*args[:-1], 120) == 2
    assert 'before its end, at 90 steps' in capsys.readouterr().err
    main(*args, '--resume')
    assert [r['step'] for r in programs.results(out)] == [90, 90]
    assert programs.powerprop(*args, '--resume') == 2
    assert 'must be more, got 90' in capsys.readouterr().err


def test_methods_and_networks_are_listed_with_a_line_each(capsys):
  main('methods')
  shown = capsys.readouterr().out
  for name in methods.METHODS:
    assert f'\n{name} ' in f'\n{shown}'
  assert '--sparse.{distribution,structure}' in shown
  main('nets')
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == [*nets.NAMES]
  assert all(line.endswith('.') for line in lines)


class PruneTest:
  @pytest.mark.parametrize(
    ('scope', 'factor'), [('layer', 1), ('layer', 2), ('global', 1)]
  )
  def test_records_say_what_was_pruned(self, run, tmp_path, scope, factor):
    before = programs.contents(run)
    out = tmp_path / 'pruned'
    args = ['--kept', 1, 0.1, '--scope', scope, '--output-factor', factor]
    main('prune', run, *args, '--out', out)
    assert programs.contents(run) == before
    found = programs.results(out)
    assert [record['sparsity'] for record in found] == [0.0, 0.9]
    assert found[1]['density'] == (640 + factor * 100) / (6400 + 1000)
    _, dense = programs.results(run)
    assert found[0]['accuracy'] == pytest.approx(dense['accuracy'], abs=1e-6)
    for record in found:
      assert (record['alpha'], record['key'], record['step']) == (1.3, 0, 60)
      assert record['scope'] == scope

  def test_results_go_beside_the_run_and_say_where_they_come_from(
    self, run, capsys
  ):
    before = programs.contents(run)
    main('prune', run, '--kept', 0.5)
    out = run.with_name('run_pruned')
    assert {path.name for path in out.iterdir()} == {
      *('config.json', 'results.json', 'complete.json'),
      *(f'accuracy_layer.{kind}' for kind in ('png', 'pdf', 'svg')),
      'report.html',
    }
    assert programs.contents(run) == before
    assert read(out / 'config.json')['config']['trained']['net'] == 'mlp'
    assert 'alpha 1.3' in capsys.readouterr().out
    page = (out / 'report.html').read_text()
    assert 'mlp on digits' in page
    main('prune', run, '--kept', 0.5, '--resume')
    assert (out / 'report.html').read_text() == page

  def test_run_that_was_stopped_is_pruned_where_it_is(
    self, tmp_path, capsys, monkeypatch
  ):
    path = tmp_path / 'run'
    stop = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with monkeypatch.context() as patch:
      # Ctrl-C between the last step and the results.
      patch.setattr(folder.RunFolder, 'write_results', stop)
      args = ['train', *TINY, '--out', str(path)]
      assert cli.main(args) == 130
    assert '--resume' in capsys.readouterr().err
    checkpoint = path / 'checkpoints' / '60'
    checkpoint.rename(tmp_path / '60')
    main('prune', path, '--kept', 0.5)
    shown = capsys.readouterr().out
    assert 'of step 30 of 60' in shown
    main('report', path)
    assert 'stopped before its end' in (path / 'report.html').read_text()

  @pytest.mark.slow
  def test_networks_of_a_sweep_are_pruned_as_the_sweep_itself_does(self, sweep):
    before = programs.contents(sweep)
    out = sweep.with_name('pruned')
    main('prune', sweep, '--kept', 0.2, '--scope', 'global', '--out', out)
    assert programs.contents(sweep) == before
    for record, expected in zip(
      programs.results(out), programs.results(sweep), strict=True
    ):
      assert record.pop('step') == 60
      assert record == expected


class ReportTest:
  def test_rebuilds_the_same_page_from_the_files_alone(self, run):
    before = programs.contents(run)
    for name in ('report.html', 'learning_curves.png', 'learning_curves.pdf'):
      (run / name).unlink()
    main('report', run)
    assert programs.contents(run) == before

  def test_says_what_it_is_and_how_it_was_made(self, run):
    page = (run / 'report.html').read_text()
    stored = json.loads((run / 'config.json').read_text())
    assert '<h1>Training of mlp on digits</h1>' in page
    for value in (
      *(stored['date'], stored['versions']['jax'], jax.__version__),
      *(f'{len(stored["devices"])} × {stored["devices"][0]}',),
      html.escape(stored['command'], quote=True),
    ):
      assert value in page, value
    # Of a dense network these would be columns of one number.
    assert not re.search('<th[^>]*>(sparsity|density|kept)</th>', page)
    assert '±' not in page

  def test_draws_figures_as_wide_as_a_column(self, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / 'copy')
    main('report', copy, '--figures', 'column')
    png = (copy / 'learning_curves.png').read_bytes()
    assert int.from_bytes(png[16:20], 'big') == 525
    status = programs.powerprop('report', copy, '--figures=colum')
    assert "'page'" in programs.error(status, capsys)

  def test_replaces_nothing_but_figures_and_the_page(self, run, tmp_path):
    main('prune', run, '--kept', 0.5, 0.1, '--out', tmp_path / 'pruned')
    (tmp_path / 'pruned' / 'notes.txt').write_text('mine')
    before = programs.contents(tmp_path)
    main('report', tmp_path / 'pruned')
    assert programs.contents(tmp_path) == before


def test_says_what_it_does_and_that_there_is_nothing_to_resume(
  tmp_path, capsys
):
  out = tmp_path / 'run'
  args = ['train', *TINY, '--out', out, '--resume']
  note = f'note: {out} holds no run to resume; this one starts anew.'
  main(*args)
  shown = capsys.readouterr()
  assert note in shown.err.splitlines()
  assert shown.out.count('leaves selected') == 1
  assert shown.out.index('leaves selected') < shown.out.index('near zero')
  for word in ('mlp/linear_0/w', 'validation accuracy: 0.', 'report.html'):
    assert word in shown.out
  main(*args)
  assert 'note' not in capsys.readouterr().err


def test_says_which_version_it_is(capsys):
  main('--version')
  assert capsys.readouterr().out == f'powerprop_jax {pp.__version__}\n'


class HelpTest:
  def test_says_which_commands_there_are(self, capsys):
    main('--help')
    shown = capsys.readouterr().out
    for name in OWN:
      assert f'\n  {name}' in shown

  @pytest.mark.parametrize('name', OWN)
  def test_explains_every_setting(self, name, capsys):
    with pytest.raises(SystemExit) as stop:
      cli.main([name, '--help'])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert 'helptext' not in shown
    for words in OWN[name]:
      assert words in shown
