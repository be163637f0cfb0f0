"""Runs that the tests of commands share, which only add files beside them."""

import programs
import pytest

from experiments.one_shot_pruning import __main__ as one_shot_pruning
from powerprop_jax.train.cli import main as cli

TINY = ['--net=mlp', '--loop.num-steps=60', '--loop.eval-every=30']


@pytest.fixture(scope='session')
def run(tmp_path_factory):
  """A tiny complete run of `powerprop train`."""
  path = tmp_path_factory.mktemp('cli') / 'run'
  assert cli.main(['train', *TINY, '--alpha=1.3', f'--out={path}']) == 0
  return path


@pytest.fixture(scope='session')
def sparse_run(tmp_path_factory):
  """A tiny complete run of RigL with powerprop, on normalised images."""
  path = tmp_path_factory.mktemp('cli') / 'sparse'
  args = '--method rigl --sparsity 0.8 --alpha 1.5 --normalise'
  args += ' --sparse.period 20 --key 3'
  assert cli.main(['train', *TINY, *args.split(), f'--out={path}']) == 0
  return path


# Two α and two keys.
sweep = programs.finished(
  one_shot_pruning,
  [
    *('--alphas', '1', '2', '--keys', '0', '3', *TINY),
    *('--kept', '0.2', '--scopes', 'global'),
  ],
  scope='session',
)
