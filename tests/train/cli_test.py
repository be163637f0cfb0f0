"""The command: train, prune and report work together on one folder."""

import json

import programs
import pytest

import powerprop_jax as pp
from powerprop_jax.train.cli import main as cli
from powerprop_jax.train.runs import metrics

# What the help of each command says.
_OF_EXPORTS = ('--kept', '--scope', '--alpha', '--overwrite')
OWN = {
  'train': (
    *('--alpha', '--optimizer.decay-phi', '--data.name'),
    '1 is ordinary training',
  ),
  'prune': ('RUN',),
  'report': ('RUN',),
  'export': _OF_EXPORTS,
  'bench': _OF_EXPORTS,
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
      *('learning_curves.png', 'weight_histograms.png'),
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
      *('accuracy_layer.png', 'report.html'),
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
      patch.setattr(cli.RunFolder, 'write_results', stop)
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
    for name in ('report.html', 'learning_curves.png'):
      (run / name).unlink()
    main('report', run)
    assert programs.contents(run) == before

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
