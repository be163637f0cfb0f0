"""Every method, from settings, trains with the density that was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import nets
from powerprop_jax.core import distributions
from powerprop_jax.optim import topology, views
from powerprop_jax.train import evaluate, methods, optimizers, step
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.methods import Lengths, SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.errors import UserError

SPLITS = splits.load(DataConfig())
NET = nets.make('mlp', SPLITS.num_classes)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, momentum=0.9, nesterov=True)
IMAGES = SPLITS.example
THETA = NET.init(jax.random.key(0), IMAGES, True)[0]
WEIGHTS = [leaf for leaf in jax.tree.leaves(THETA) if leaf.ndim == 2]
LENGTHS = Lengths(400, 20, sum(w.size for w in WEIGHTS))
SPARSE = [name for name in methods.METHODS if name != 'dense']


def make_tx(method, density=0.2, alpha=1.0, lengths=LENGTHS, key=3, **settings):
  inner = optimizers.make_tx(OPTIMIZER, alpha, lengths.num_steps)
  config = SparseConfig(**settings)
  return methods.make_tx(inner, method, density, config, lengths, key)


def trained(tx, num_steps=LENGTHS.num_steps):
  advance = jax.jit(step.make_advance(NET, tx), donate_argnums=0)
  rows = splits.batch_indices(0, 0, num_steps, 20, len(SPLITS.train.labels))
  start = step.create(NET, tx, jax.random.key(0), IMAGES)
  return advance(start, SPLITS.train, rows)[0]


def count(train_state):
  """Connections by leaf."""
  masks = views.current_masks(train_state.phi, train_state.opt_state)
  return {
    name: int(part['w'].sum()) for name, part in masks.items() if 'w' in part
  }


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('method', SPARSE)
@pytest.mark.slow
def test_density_is_kept_and_the_network_learns(method, alpha):
  after = trained(make_tx(method, alpha=alpha))
  found = sum(count(after).values())
  assert 0 <= found - 0.2 * LENGTHS.num_weights < len(WEIGHTS)
  theta = jax.tree.leaves(after.theta)
  nonzero = sum(int((w != 0).sum()) for w in theta if w.ndim == 2)
  assert 0.9 * found < nonzero <= found
  scores = evaluate.on_state(NET)(after, SPLITS.test)
  assert scores['accuracy'] > 0.75


def test_dense_is_the_optimiser_itself():
  tx = make_tx('dense', density=1.0)
  assert topology.find_sparse_state(tx.init(THETA)) is None
  inner = optimizers.make_tx(OPTIMIZER, 1.0, LENGTHS.num_steps)
  phi = views.init(tx, THETA)[0]
  grads = jax.tree.map(jnp.ones_like, THETA)
  ours, theirs = (t.update(grads, t.init(phi), phi)[0] for t in (tx, inner))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
  ('method', 'distribution'),
  [('rigl', 'erk'), ('set', 'erk'), ('static', 'uniform'), ('snfs', 'uniform')],
)
def test_default_distribution_is_that_of_the_recipe(method, distribution):
  start = step.create(NET, make_tx(method), jax.random.key(0), IMAGES)
  expected = getattr(distributions, distribution)(THETA, 0.8)
  for name, found in count(start).items():
    size = THETA[name]['w'].size
    assert found == pytest.approx((1 - expected[f'{name}/w']) * size, abs=1)
  other = {'erk': 'uniform', 'uniform': 'erk'}[distribution]
  tx = make_tx(method, distribution=other)
  changed = step.create(NET, tx, jax.random.key(0), IMAGES)
  assert count(changed) != count(start)


def test_pruning_is_dense_until_its_start_and_done_at_its_stop():
  tx = make_tx('pruning', pruning_start=0.25, stop=0.5, period=10)
  assert sum(count(trained(tx, 100)).values()) == LENGTHS.num_weights
  half = sum(count(trained(tx, 151)).values())
  assert 0.2 * LENGTHS.num_weights < half < LENGTHS.num_weights
  done = sum(count(trained(tx, 201)).values())
  assert done == pytest.approx(0.2 * LENGTHS.num_weights, abs=2)


def test_pruning_of_all_layers_together():
  left = {}
  for scope in ('layer', 'global'):
    tx = make_tx('pruning', scope=scope, pruning_start=0.1, stop=0.5)
    left[scope] = count(trained(tx, 201))
    total = 0.2 * LENGTHS.num_weights
    assert sum(left[scope].values()) == pytest.approx(total, abs=2)
  assert left['layer'] != left['global']


def test_key_decides_the_first_connections():
  masks = [
    jax.tree.leaves(make_tx('rigl', key=key).init(THETA).masks)
    for key in (3, jax.random.key(3), 4)
  ]
  same = lambda a, b: all(map(np.array_equal, a, b))
  assert same(masks[0], masks[1])
  assert not same(masks[0], masks[2])


@pytest.mark.parametrize(
  ('method', 'settings', 'message'),
  [
    ('dense', {}, 'the dense network has density 1, got 0.2'),
    ('set', {'period': 0}, 'period must be at least 1, got 0'),
    ('set', {'stop': 0.0}, 'stop must be a share of the run'),
    ('set', {'stop': 1.5}, 'stop'),
    ('pruning', {'pruning_start': 1.0}, 'pruning_start'),
    ('pruning', {'pruning_start': 0.8}, 'pruning at density 0.2: .*stop'),
    ('top_kast', {'backward_factor': 0.5}, 'backward_factor must be at least'),
    ('top_kast', {'penalty': -1.0}, 'penalty'),
    ('snfs', {'regrow': 'one'}, 'snfs at density 0.2: regrow must be .zero'),
  ],
)
def test_settings_that_do_not_fit_are_named(method, settings, message):
  with pytest.raises(UserError, match=message):
    make_tx(method, **settings)
