"""SNFS and DSR in training: exact totals, lanes, what is not finite."""

import chex
import exchanges
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.optim import aliases, powerprop

METHODS = {
  'snfs': lambda inner, **kwargs: aliases.snfs(
    inner, 0.7, period=4, stop=40, **kwargs
  ),
  'snfs_alone': lambda inner, **kwargs: aliases.snfs(
    inner, 0.7, period=4, stop=40, redistribute=False, **kwargs
  ),
  'dsr': lambda inner, **kwargs: aliases.dsr(
    inner, 0.7, period=4, stop=40, num_dropped=12, **kwargs
  ),
}


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('name', METHODS)
def test_the_total_is_exact_at_every_step(name, alpha):
  tx = METHODS[name](powerprop.powerprop(optax.sgd(0.05, 0.9), alpha))
  run = jax.jit(lambda theta: exchanges.train(tx, theta, 60))
  phi, state, history, losses = run(exchanges.small_tree(0))
  assert set(history.sum(1).tolist()) == {masks_lib.num_kept(153, 0.7)}
  assert history.min() >= 1
  moved = np.any(np.diff(history, axis=0) != 0)
  assert moved == (name != 'snfs_alone')
  if name == 'dsr':
    assert state.memory != np.float32(1e-3)
  else:
    assert state.memory.num_rewirings == (9 if name == 'snfs' else 0)
  assert losses[-10:].mean() < losses[:10].mean()
  chex.assert_tree_all_finite((phi, state.memory))


@pytest.mark.parametrize('name', ['snfs', 'dsr'])
def test_lanes_equal_single_runs(name):
  def final(key):
    tx = METHODS[name](optax.sgd(0.05), key=key)
    _, state, history, _ = exchanges.train(tx, exchanges.small_tree(0), 24)
    return state.masks, history

  lanes = jax.jit(jax.vmap(final))(jnp.arange(3))
  alone = jax.jit(final)
  for key in range(3):
    lane = jax.tree.map(lambda x, k=key: x[k], lanes)
    chex.assert_trees_all_equal(lane, alone(key))


def test_a_gradient_that_is_not_finite_leaves_the_masks_of_snfs():
  tx = aliases.snfs(optax.sgd(0.1), 0.5, period=1, start=0, stop=9)
  phi, update = exchanges.small_tree(0), jax.jit(tx.update)
  state = tx.init(phi)
  bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), exchanges.small_tree(1))
  _, new = update(bad, state, phi)
  chex.assert_trees_all_equal(new.masks, state.masks)
  chex.assert_tree_all_finite(new.memory)
  assert new.memory.num_rewirings == 0
  _, new = update(exchanges.small_tree(1), new, phi)
  assert new.memory.num_rewirings == 1


def test_only_weights_that_are_not_finite_stop_a_rewiring_of_dsr():
  tx = aliases.dsr(
    optax.sgd(0.1),
    0.5,
    period=1,
    start=0,
    stop=9,
    num_dropped=5,
    threshold=0.5,
  )
  phi, update = exchanges.small_tree(0), jax.jit(tx.update)
  state = tx.init(phi)
  bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), phi)
  _, new = update(phi, state, bad)
  chex.assert_trees_all_equal(
    (new.masks, new.memory), (state.masks, state.memory)
  )
  _, new = update(bad, state, phi)
  assert new.memory != state.memory
