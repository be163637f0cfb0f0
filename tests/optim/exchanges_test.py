"""SNFS and DSR in training: exact totals, lanes, what is not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.optim import aliases, powerprop, views

_MOVES = {'sparsity': 0.7, 'period': 4, 'stop': 40}
METHODS = {
  'snfs': functools.partial(aliases.snfs, **_MOVES),
  'snfs_alone': functools.partial(aliases.snfs, redistribute=False, **_MOVES),
  'set': functools.partial(aliases.sparse_evolution, **_MOVES),
  'dsr': functools.partial(aliases.dsr, num_dropped=4, threshold=0.1, **_MOVES),
}


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('name', ['snfs', 'snfs_alone', 'dsr'])
def test_the_total_is_exact_at_every_step(name, alpha):
  tx = METHODS[name](powerprop.powerprop(optax.sgd(0.05, 0.9), alpha))
  run = small.run(tx, 60)
  counts = np.array(
    [[state.masks[n]['w'].sum() for n in 'mn'] for _, state in run]
  )
  assert set(counts.sum(1).tolist()) == {masks_lib.num_kept(50, 0.7)}
  assert counts.min() >= 1
  moved = np.any(np.diff(counts, axis=0) != 0)
  phi, state = run[-1]
  assert moved == (name != 'snfs_alone')
  if name == 'dsr':
    assert state.memory != np.float32(0.1)
  else:
    assert state.memory.num_rewirings == (9 if name == 'snfs' else 0)
  losses = [small.loss(views.effective_params(*entry)) for entry in run]
  assert losses[-1] < losses[0]
  chex.assert_tree_all_finite((phi, state.memory))


@pytest.mark.parametrize('name', ['snfs', 'dsr', 'set'])
def test_lanes_equal_single_runs(name):
  def final(key):
    tx = METHODS[name](optax.sgd(0.05), key=key)
    body = lambda carry, _: (small.step(tx, *carry), carry[1].masks)
    return jax.lax.scan(body, views.init(tx, small.weights()), length=9)[1]

  lanes = jax.jit(jax.vmap(final))(jnp.arange(3))
  alone = jax.jit(final)
  for key in range(3):
    lane = jax.tree.map(lambda x, k=key: x[k], lanes)
    chex.assert_trees_all_equal(lane, alone(key))


def test_a_gradient_that_is_not_finite_leaves_the_masks_of_snfs():
  tx = aliases.snfs(optax.sgd(0.1), 0.5, period=1, start=0, stop=9)
  phi, update = small.weights(), jax.jit(tx.update)
  state = tx.init(phi)
  bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), small.weights(0.5))
  _, new = update(bad, state, phi)
  chex.assert_trees_all_equal(new.masks, state.masks)
  chex.assert_tree_all_finite(new.memory)
  assert new.memory.num_rewirings == 0
  _, new = update(small.weights(0.5), new, phi)
  assert new.memory.num_rewirings == 1


def test_only_weights_that_are_not_finite_stop_a_rewiring_of_dsr():
  tx = aliases.dsr(
    optax.sgd(0.1), 0.5, period=1, start=0, stop=9, num_dropped=5, threshold=0.5
  )
  phi, update = small.weights(), jax.jit(tx.update)
  state = tx.init(phi)
  bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), phi)
  _, new = update(phi, state, bad)
  chex.assert_trees_all_equal(
    (new.masks, new.memory), (state.masks, state.memory)
  )
  _, new = update(bad, state, phi)
  assert new.memory != state.memory
