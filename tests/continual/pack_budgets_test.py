"""Which weights a task gets: counts, ranking, and what it takes of the free."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import small

from powerprop_jax import continual
from powerprop_jax.continual import state as state_lib


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_equal_budgets_of_packnet_use_all_weights_and_are_nested(scope):
  state, past = packing.init('packnet'), None
  for number in range(4):
    config = packing.config(continual.equal_density(number, 4), scope=scope)
    state, report = packing.learn(state, config, number)
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


@pytest.mark.parametrize(
  ('budgets', 'expected'),
  [
    # As published: half pruned, then three quarters twice, then nothing. That
    # is 15 + 10, then 4 + 3 of 25, 3 + 2 of 18, and the other 13.
    ((0.5, 0.25, 0.25, 1.0), [25, 7, 5, 13]),
    # A tenth of 30 and of 20 weights each; the rest stays free.
    ([continual.equal_density(k, 4, share=0.4) for k in range(4)], [5] * 4),
  ],
)
def test_packnet_keeps_shares_of_what_is_free(budgets, expected):
  state, new = packing.init('packnet'), []
  for number, budget in enumerate(budgets):
    state, report = packing.learn(state, packing.config(budget), number)
    new.append(report.num_new)
  assert new == expected


def test_packnet_ranks_only_what_the_task_may_move():
  config = packing.config(0.2)
  state, _ = packing.learn(packing.init('packnet'), config, 'a')
  owned = packing.shared(state.protected)

  def shrink(learner, task):
    # Nothing of the second task is as large as the first's weights.
    phi = packing.where_free(state, lambda p: 1e-3 * p, learner.phi)
    return learner._replace(phi=phi)

  state, report = packing.learn(state, config, 'b', train=shrink)
  mask = packing.shared(continual.task_masks(state, 'b'))
  assert report.num_new == 5 + 4  # a fifth of 24 and of 16, rounded up
  assert all(np.all(mask[path] >= owned[path]) for path in mask)


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_efficient_packnet_keeps_the_largest_weights_whoever_owns_them(scope):
  config = packing.config(0.3, scope=scope)
  state = packing.init()
  for name in 'ab':
    before, seen = state, []
    evaluate = lambda theta, *_, seen=seen: seen.append(theta) or 1.0
    state, report = packing.learn(state, config, name, evaluate=evaluate)
    mask = packing.shared(continual.task_masks(state, name))
    dense = packing.shared(seen[0])
    for paths in [list(mask)] if scope == 'global' else [[p] for p in mask]:
      ranked = [np.abs(dense[path]) for path in paths]
      count = -(-3 * sum(x.size for x in ranked) // 10)
      expected = small.largest_of_all(ranked, count)
      chex.assert_trees_all_equal([mask[path] for path in paths], expected)
  owned = packing.shared(before.protected)
  new = sum(int((m & ~owned[path]).sum()) for path, m in mask.items())
  assert report.num_new == new < report.num_kept == 15


def test_a_full_layer_does_not_stop_the_others():
  config = packing.config(0.5)
  state, _ = packing.learn(packing.init('packnet'), config, 'a')
  filled = {'n/w': jnp.ones_like(state.protected['n']['w'])}
  state = dataclasses.replace(
    state, protected=state_lib.with_leaves(state.protected, filled)
  )
  assert continual.num_free(state) == {'m/w': 15, 'n/w': 0}
  _, report = packing.learn(state, config, 'b')
  assert report.num_new == 8
