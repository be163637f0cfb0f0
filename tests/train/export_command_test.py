"""`powerprop export` and `powerprop bench`, from a run to a table."""

import json

import chex
import jax
import numpy as np
import programs
import pytest

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.export import export
from powerprop_jax.export import program as export_program
from powerprop_jax.export.exported import Exported
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble
from powerprop_jax.train.cli import bench, pruned_model, timing
from powerprop_jax.train.cli.pruned_model import PruneOnce
from powerprop_jax.train.runs import load

FORMATS = ['safetensors', 'npz', 'scipy', 'jax']


def main(*args):
  assert programs.powerprop(*args) == 0


def refused(capsys, *args):
  """The one line that a mistake gets."""
  capsys.readouterr()
  return programs.error(programs.powerprop(*args), capsys)


class ExportTest:
  @pytest.mark.parametrize(
    ('format', 'scope', 'factor'),
    [('safetensors', 'layer', 1), ('npz', 'global', 1), ('scipy', 'layer', 2)],
  )
  @pytest.mark.slow
  def test_writes_what_pruning_by_hand_gives(
    self, run, tmp_path, format, scope, factor
  ):
    before = programs.contents(run)
    path = tmp_path / 'net'
    args = ['--format', format, '--kept', 0.1, '--scope', scope]
    main('export', run, *args, '--output-factor', factor, '--out', path)
    assert programs.contents(run) == before
    found = export.read(path)
    state = ensemble.take(load.load(run).state, 0)
    masks = one_shot.prune(
      state.theta,
      0.9,
      scope=scope,
      overrides={'mlp/logits/w': 0.8} if factor == 2 else None,
    )
    theta = masks_lib.apply_masks(state.theta, masks)
    chex.assert_trees_all_equal(
      (found.masks, found.theta), (dict(masks), dict(theta))
    )
    assert found.net_state == {}
    about = found.about
    assert about['model'] == {
      **{'net': 'mlp', 'num_classes': 10, 'image_shape': [8, 8, 1]},
      'dct': False,
    }
    assert (about['alpha'], about['key'], about['step']) == (1.3, 0, 60)
    assert (about['kept'], about['scope']) == (0.1, scope)
    assert about['density'] == pytest.approx((640 + factor * 100) / 7400)

  @pytest.mark.parametrize('format', FORMATS)
  def test_file_lies_beside_the_run_and_its_score_is_that_of_prune(
    self, run, tmp_path, capsys, format
  ):
    main('prune', run, '--kept', 0.2, '--out', tmp_path / 'pruned')
    (record,) = programs.results(tmp_path / 'pruned')
    capsys.readouterr()
    main('export', run, '--kept', 0.2, '--format', format, '--overwrite')
    suffix = {
      **{'safetensors': '.safetensors', 'npz': '.npz'},
      **{'scipy': '_scipy.npz', 'jax': '_jax.npz'},
    }[format]
    path = run.with_name(f'run{suffix}')
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert f'{path.stat().st_size:,}' in shown
    about = export.read(path).about
    assert about['test']['accuracy'] == pytest.approx(record['accuracy'])
    assert about['density'] == pytest.approx(record['density'])

  def test_program_classifies_as_the_file_says(self, run, tmp_path):
    path = tmp_path / 'net'
    main('export', run, '--format', 'jax', '--kept', 0.2, '--out', path)
    program = export_program.read(path)
    images, labels = load.load(run).splits.test
    logits = program.run(np.asarray(images, np.float32))
    accuracy = float((np.argmax(logits, axis=-1) == labels).mean())
    assert accuracy == pytest.approx(program.exported.about['test']['accuracy'])
    args = ['--format', 'jax', '--batch', 4, '--overwrite']
    main('export', run, *args, '--out', path)
    assert export_program.read(path).inputs[0].shape == (4, 8, 8, 1)

  @pytest.mark.slow
  def test_one_network_of_a_sweep_is_chosen_by_alpha_and_key(
    self, sweep, tmp_path, capsys
  ):
    stored = load.load(sweep)
    for lane, (alpha, key) in enumerate(zip(*stored.members, strict=True)):
      path = tmp_path / f'{lane}'
      main('export', sweep, '--alpha', alpha, '--key', key, '--out', path)
      found = export.read(path)
      assert (found.about['alpha'], found.about['key']) == (alpha, key)
      state = ensemble.take(stored.state, lane)
      chex.assert_trees_all_equal(found.theta, dict(state.theta))
    for args in ([], ['--alpha', 1], ['--key', 3]):
      error = refused(capsys, 'export', sweep, *args, '--out', tmp_path / 'x')
      assert 'more than one' in error
      assert '1 0, 1 3, 2 0, 2 3' in error
    error = refused(capsys, 'export', sweep, '--alpha', 3, '--out', 'x')
    assert 'none of the networks' in error

  def test_no_file_is_replaced_unless_asked(self, run, tmp_path, capsys):
    path = tmp_path / 'net'
    path.write_text('mine')
    for format in FORMATS:
      args = ['--format', format, '--out', path]
      assert '--overwrite' in refused(capsys, 'export', run, *args)
    assert path.read_text() == 'mine'
    main('export', run, '--out', path, '--overwrite')
    found = export.read(path)
    assert found.about['step'] == 60
    # The whole network, unless asked.
    assert all(mask.all() for mask in jax.tree.leaves(found.masks))


class BenchTest:
  FAST = ('--repeats', '2', '--batches', '1', '3')

  @pytest.mark.parametrize('format', ['safetensors', 'npz', 'scipy'])
  @pytest.mark.slow
  def test_times_every_form_of_a_file(self, run, tmp_path, capsys, format):
    path = tmp_path / 'net'
    args = ['--format', format, '--kept', 0.1, '--out', path]
    main('export', run, *args)
    capsys.readouterr()
    table = tmp_path / 'table.json'
    main('bench', path, *self.FAST, '--out', table)
    shown = capsys.readouterr().out
    assert f'{path.stat().st_size:,}' in shown
    found = json.loads(table.read_text())
    assert found['model']['network'] == 'mlp'
    assert found['model']['sparsity'] == pytest.approx(0.9)
    assert found['model']['file_bytes'] == path.stat().st_size
    forms = ['dense', 'masked', 'condensed', 'scipy CSR']
    assert [(row['batch'], row['form']) for row in found['rows']] == [
      (batch, form) for batch in (1, 3) for form in forms
    ]
    for row in found['rows']:
      assert row['ms'] > 0
      assert row['form'] in shown
      assert row['form'] != 'dense' or row['speed_up'] == 1

  def test_times_a_run_pruned_on_the_way(self, run, capsys):
    before = programs.contents(run)
    main('bench', run, '--kept', 0.2, *self.FAST)
    assert 'sparsity: 0.8' in capsys.readouterr().out
    assert programs.contents(run) == before

  @pytest.mark.slow
  def test_convolutions_have_no_row_for_scipy(self, tmp_path, capsys):
    shape = (8, 8, 1)
    net = nets.make('mnist_cnn', 10)
    images = np.zeros((1, *shape), np.float32)
    theta, net_state = net.init(jax.random.key(0), images, True)
    model = {'net': 'mnist_cnn', 'num_classes': 10, 'image_shape': shape}
    masks = one_shot.prune(theta, 0.9)
    found = Exported(theta, masks, net_state, {'model': model})
    path = export.write(tmp_path / 'net', found)
    main('bench', path, '--repeats', 1, '--batches', 1)
    shown = capsys.readouterr().out
    assert 'condensed' in shown
    assert 'scipy' not in shown

  def test_programs_of_any_network_are_drawn_inputs_like_their_own(
    self, tmp_path, capsys
  ):
    w = np.eye(5, 3, dtype=np.float32)
    given = Exported({'embed': {'w': w}}, {'embed': {'w': w > 0}}, {}, {})
    fn = lambda theta, tokens: {'sums': theta['embed']['w'][tokens].sum(axis=1)}
    write = lambda tokens, **settings: export_program.write(
      tmp_path / 'net_jax.npz', fn, given, tokens, overwrite=True, **settings
    )
    table = tmp_path / 'table.json'
    path = write(np.array([[1, 2], [3, 4]]), batch_axes=None)
    main('bench', path, '--repeats', 1, '--out', table)
    found = json.loads(table.read_text())
    assert found['model']['inputs'] == 'int32[2, 2]'
    assert found['model']['sparsity'] == pytest.approx(0.8)
    assert [(row['batch'], row['form']) for row in found['rows']] == [
      ('fixed', 'dense'),
      ('fixed', 'masked'),
    ]
    assert found['missing']['condensed'].startswith('all leaves are held dense')
    assert "no form 'condensed': all leaves" in capsys.readouterr().out
    # Without an example nobody knows how many tokens there are.
    path = write(jax.ShapeDtypeStruct((2, 2), np.int32))
    assert 'int32[batch, 2] lie' in refused(capsys, 'bench', path)

  def test_forms_that_disagree_are_not_timed(self, tmp_path, run):
    found = pruned_model.from_run(run, PruneOnce(kept=0.5))
    wrong = jax.tree.map(lambda mask: mask & False, found.masks)
    subject = bench.of_network(found._replace(masks=wrong))
    with pytest.raises(ValueError, match="the form 'masked' of this network"):
      bench.measure(subject, (2,), 1)

  def test_files_that_do_not_say_what_they_hold_are_refused(
    self, tmp_path, capsys
  ):
    theta = {'a': {'w': np.ones((2, 3), np.float32)}}
    masks = masks_lib.full_masks(theta)
    for number, about in enumerate(({}, {'model': {}}, {'model': {'net': 1}})):
      path = export.write(
        tmp_path / f'{number}', Exported(theta, masks, {}, about)
      )
      assert 'which network' in refused(capsys, 'bench', path)

  def test_parameters_of_another_network_are_refused(
    self, run, tmp_path, capsys
  ):
    found = pruned_model.from_run(run, PruneOnce())
    about = found.about | {'model': found.about['model'] | {'net': 'lenet_5'}}
    path = export.write(tmp_path / 'net', found._replace(about=about))
    assert 'lenet_5' in refused(capsys, 'bench', path)


class TimingTest:
  def test_programs_take_turns(self):
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in 'abc'}
    found = timing.take_turns(programs, 9)
    rounds = [''.join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == 'abc' and len(rounds) == 10
    assert all(sorted(order) == ['a', 'b', 'c'] for order in rounds)
    # Not always after the same one.
    assert {'ab', 'cb'} <= {
      order[i : i + 2] for order in rounds for i in (0, 1)
    }
    assert list(found) == ['a', 'b', 'c']
    assert [len(times.wall) for times in found.values()] == [9, 9, 9]
