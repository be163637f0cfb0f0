"""Presets are what their record says, and run."""

import json

import programs
import pytest

from powerprop_jax.files import json_files

PROGRAMS = ('class_specialisation', 'continual_permuted', 'dct_plus_sparse')


@pytest.mark.parametrize('name', [*PROGRAMS, 'sparse_training'])
def test_presets_survive_their_record(name):
  for config in programs.module(name).PRESETS.values():
    stored = json.loads(json.dumps(json_files.to_json(config)))
    assert json_files.from_json(type(config), stored) == config


@pytest.mark.parametrize(
  ('name', 'args', 'density', 'networks'),
  [
    ('sparse_training', ['--alphas', '2'], pytest.approx(0.2, abs=1e-3),
     [(None, None)]),
    ('dct_plus_sparse', [], pytest.approx(0.01, abs=1e-4),
     [('standard', 'erk'), ('dct', 'erk'), ('standard', 'snip')]),
  ],
)  # fmt: skip
@pytest.mark.slow
def test_residual_networks_on_cifar10_take_a_few_steps(
  tfds_dir, tmp_path, name, args, density, networks
):
  args = [*args, '--data.dir', tfds_dir, '--out', tmp_path / 'run']
  program = programs.module(name)
  assert programs.run(program, '--preset', 'cifar10_short', *args) == 0
  found = [r for r in programs.results(tmp_path / 'run') if 'accuracy' in r]
  assert [(r.get('network'), r.get('support')) for r in found] == networks
  for record in found:
    assert record['density_measured'] == density
    assert record['loss'] > 0
