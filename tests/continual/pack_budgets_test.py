"""Which weights a task gets: counts, ranking, and what it takes of the free."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest

from powerprop_jax import continual
from powerprop_jax.continual import metrics
from powerprop_jax.continual import state as state_lib


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_equal_budgets_of_packnet_use_all_weights_and_are_nested(scope):
  config = packing.config('packnet', scope=scope)
  state, past = packing.init(config), None
  for number in range(4):
    state, report = packing.learn(
      state,
      dataclasses.replace(
        config, densities=(continual.equal_density(number, 4),)
      ),
      number,
    )
    mask = packing.shared(continual.task_masks(state, number))
    counts = {path: int(m.sum()) for path, m in mask.items()}
    if scope == 'layer':
      # 30 and 20 weights: 8 + 8 + 7 + 7 and 5 each, rounded up.
      assert counts == {'m/w': (8, 16, 23, 30)[number], 'n/w': 5 * (number + 1)}
    assert report.num_kept == sum(counts.values())
    assert report.num_kept == (13, 26, 38, 50)[number]
    assert report.num_new == (13, 13, 12, 12)[number]
    assert report.num_free == 50 - report.num_kept
    if past is not None:
      assert all(np.all(m >= past[path]) for path, m in mask.items())
    past = mask
  with pytest.raises(continual.CapacityError):
    packing.learn(state, config, 4)


def test_equal_budgets_of_a_part_leave_the_rest_free():
  config = packing.config('packnet')
  state = packing.init(config)
  for number in range(4):
    budget = continual.equal_density(number, 4, share=0.4)
    state, report = packing.learn(
      state, dataclasses.replace(config, densities=(budget,)), number
    )
    # A tenth of 30 and of 20 weights.
    assert (report.num_new, report.num_kept) == (5, 5 * (number + 1))
  with pytest.raises(ValueError, match=r'share must be in \(0, 1\], got 1.5'):
    continual.equal_density(0, 4, share=1.5)


def test_packnet_keeps_the_published_fractions():
  """Pruned: half, then three quarters twice, then nothing."""
  state = packing.init(packing.config('packnet'))
  new = []
  for number, kept in enumerate((0.5, 0.25, 0.25, 1.0)):
    state, report = packing.learn(
      state, packing.config('packnet', (kept,)), number
    )
    new.append(report.num_new)
  # 15 + 10, then 4 + 3 of 25, 3 + 2 of 18, and the other 13.
  assert new == [25, 7, 5, 13]


def test_packnet_ranks_only_what_the_task_may_move():
  config = packing.config('packnet', (0.2,))
  state, _ = packing.learn(packing.init(config), config, 'a')
  owned = packing.shared(state.protected)
  small = 1e-3  # nothing of the second task is as large as the first's weights

  def shrink(learner, task):
    trainable = jax.tree.map(jnp.logical_not, state.protected)
    phi = jax.tree.map(
      lambda p, m: jnp.where(m, small * p, p), learner.phi, trainable
    )
    return learner._replace(phi=phi)

  state, report = packing.learn(state, config, 'b', train=shrink)
  mask = packing.shared(continual.task_masks(state, 'b'))
  assert report.num_new == 5 + 4  # a fifth of 24 and of 16, rounded up
  assert all(np.all(mask[path] >= owned[path]) for path in mask)


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_efficient_packnet_keeps_the_largest_weights_whoever_owns_them(scope):
  config = packing.config(densities=(0.3,), scope=scope)
  state = packing.init(config)
  for name in 'ab':
    before = state
    theta = {}

    def evaluate(weights, net_state, task, theta=theta):
      theta.setdefault('dense', packing.shared(weights))
      return 1.0

    state, report = packing.learn(state, config, name, evaluate=evaluate)
    mask = packing.shared(continual.task_masks(state, name))
    ranked = {path: np.abs(t).ravel() for path, t in theta['dense'].items()}
    if scope == 'global':
      ranked = {'all': np.concatenate(list(ranked.values()))}
      mask = {'all': np.concatenate([m.ravel() for m in mask.values()])}
    for path, values in ranked.items():
      count = -(-3 * values.size // 10)
      expected = np.zeros(values.size, bool)
      expected[np.argsort(-values, kind='stable')[:count]] = True
      np.testing.assert_array_equal(mask[path].ravel(), expected)
  mask = packing.shared(continual.task_masks(state, 'b'))
  owned = packing.shared(before.protected)
  new = sum(int((m & ~owned[path]).sum()) for path, m in mask.items())
  assert report.num_new == new < report.num_kept == 15


def test_a_full_layer_does_not_stop_the_others():
  config = packing.config('packnet', (0.5,))

  state, _ = packing.learn(packing.init(config), config, 'a')
  filled = dict(packing.leaves(state.protected))
  filled['n/w'] = jnp.ones_like(filled['n/w'])
  state = dataclasses.replace(
    state, protected=state_lib.with_leaves(state.protected, filled)
  )
  assert continual.num_free(state) == {'m/w': 15, 'n/w': 0}
  _, report = packing.learn(state, config, 'b')
  assert report.num_new == 8


def test_capacity_agrees_with_the_metrics():
  config = packing.config(densities=(0.3,))
  state = packing.init(config)
  reports = []
  for name in 'abc':
    state, report = packing.learn(state, config, name)
    reports.append(report)
  masks = [continual.task_masks(state, name) for name in state.task_ids]
  for record, report in zip(metrics.capacity(masks), reports, strict=True):
    assert record['new'] == report.num_new / 50
    assert record['density'] == report.num_kept / 50
    assert record['capacity_used'] == pytest.approx(1 - report.num_free / 50)
