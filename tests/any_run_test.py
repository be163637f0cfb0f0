"""Commands work on any run that says in its config.json what it holds."""

import functools
import json
import re

import jax
import numpy as np
import programs
import pytest

from experiments.class_specialisation import __main__ as class_specialisation
from experiments.sparse_training import __main__ as sparse_training
from experiments.weight_distribution import __main__ as weight_distribution
from powerprop_jax.core import masks
from powerprop_jax.export import export
from powerprop_jax.optim import views
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs import load

ARGS = [
  *('--net=mlp', '--densities=0.2', '--alphas', '1', '2', '--keys', '0', '3'),
  *('--methods', 'dense', 'set', '--normalise', '--num-test=100'),
  *('--loop.num-steps=8', '--loop.batch-size=8', '--loop.eval-every=4'),
  *('--loop.steps-per-dispatch=4', '--sparse.period=2'),
]


main = programs.powerprop


# Two methods, two α, two keys.
run = programs.finished(sparse_training, ARGS)


@pytest.fixture(scope='module')
def part(run):
  """Its combination of SET with α = 2."""
  return run / 'combinations' / 'set_density_0.2_alpha_2'


@pytest.mark.slow
def test_networks_of_a_combination_are_exported_as_they_were_scored(
  run, part, tmp_path
):
  before = programs.contents(part)
  for record in programs.results(run):
    if (record['method'], record['alpha']) != ('set', 2):
      continue
    path = tmp_path / f'{record["key"]}.npz'
    found = programs.exported(part, path, '--key', record['key'])
    assert found.about['alpha'] == 2
    assert found.about['test']['accuracy'] == record['accuracy']
    assert found.about['test']['loss'] == pytest.approx(record['loss'])
    density = masks.density(found.masks)
    assert found.about['density'] == pytest.approx(record['density_measured'])
    assert density < 0.25
    for mask, theta in zip(
      *map(jax.tree.leaves, (found.masks, found.theta)), strict=True
    ):
      assert not theta[~mask].any()
  assert programs.contents(part) == before


def test_settings_of_a_program_are_read_back(run):
  parse = functools.partial(
    arguments.parse, sparse_training.PRESETS, prog='sparse_training'
  )
  changed = ['--keys', '4', '--out', str(run)]
  found = parse(['--config', str(run / 'config.json'), *changed])
  assert found == parse([*ARGS, *changed])


def test_what_is_read_is_what_the_views_of_the_state_say(part):
  found = load.load(part)
  sparse = views.current_masks(found.state.phi, found.state.opt_state)
  phi, theta = found.state.phi, found.state.theta
  for module, leaves in phi.items():
    w = np.asarray(leaves['w'])
    expected = np.sign(w) * np.abs(w) ** 2 * np.asarray(sparse[module]['w'])
    np.testing.assert_allclose(theta[module]['w'], expected, rtol=1e-6)
  assert found.members.key.tolist() == [0, 3]
  assert len(found.splits.test.labels) == 100


@pytest.mark.slow
def test_a_combination_is_benched_and_pruned(part, tmp_path, capsys):
  args = ['--key', '0', '--repeats', '1', '--batches', '1']
  assert main('bench', part, *args) == 0
  assert 'sparsity: 0.8' in capsys.readouterr().out
  assert main('prune', part, '--kept', '0.1', '--out', tmp_path / 'out') == 0
  pruned = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert [(r['alpha'], r['key']) for r in pruned] == [(2, 0), (2, 3)]


def test_reports_of_run_and_combination_are_drawn_again(run, part, capsys):
  before = programs.contents(run)
  for name in ('accuracy.png', 'layers_density_0.2.png', 'report.html'):
    (run / name).unlink()
  assert main('report', run) == 0
  assert programs.contents(run) == before
  assert main('report', part) == 0
  page = (part / 'report.html').read_text()
  assert page.count('data:image/png') == 3
  assert 'density measured' in page
  assert str(part / 'report.html') in capsys.readouterr().out


def test_a_run_of_parts_takes_the_one_that_fits_or_names_them(
  run, tmp_path, capsys
):
  assert main('export', run, '--out', tmp_path / 'x') == 2
  (line,) = capsys.readouterr().err.splitlines()
  parts = ['dense_density_1_alpha_1', 'dense_density_1_alpha_2']
  parts += ['set_density_0.2_alpha_1', 'set_density_0.2_alpha_2']
  assert 'has no networks of its own to read. Give one of its parts' in line
  assert re.search('.*, .*'.join(parts), line)
  out = tmp_path / 'one'
  args = [*ARGS, '--methods', 'set', '--alphas', '2', '--out', out]
  assert programs.run(sparse_training, *args) == 0
  path = tmp_path / 'net.safetensors'
  assert main('export', out, '--alpha', 2, '--key', 3, '--out', path) == 0
  assert export.read(path).about['key'] == 3


@pytest.mark.parametrize(
  ('program', 'args', 'part', 'pairs'),
  [
    (weight_distribution, '--nets mlp --alphas 1 2 --keys 4 --kept 1', 'mlp',
     [(1, 4), (2, 4)]),
    (class_specialisation, '--net mlp --methods static --keys 0 1 --normalise',
     'static_density_0.1_alpha_1', [(1, 0), (1, 1)]),
  ],
)  # fmt: skip
@pytest.mark.slow
def test_networks_of_other_programs_are_read(
  tmp_path, program, args, part, pairs
):
  lengths = '--loop.num-steps=4 --loop.batch-size=8 --loop.eval-every=2'

  out = tmp_path / 'run'
  given = [*args.split(), *lengths.split(), '--out', out]
  assert programs.run(program, *given) == 0
  found = load.load(out / part)
  assert found.step == 4
  assert list(zip(*found.members, strict=True)) == pairs
  # There is no other part.
  alone = load.load(out)
  jax.tree.map(np.testing.assert_array_equal, found.state.phi, alone.state.phi)
