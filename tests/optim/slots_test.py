"""Slots of weights that come or go are what the optimiser's init makes them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import powerprop_jax as pp


def make_theta():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {'a': {'w': normal(12, 10), 'b': normal(10)}, 'n': {'w': normal(5, 8)}}


def after_a_rewiring(inner, **options):
  tx = pp.rigl(inner, 0.5, start=2, stop=90, period=2, **options)
  phi, state = pp.init(tx, make_theta())
  for i in range(3):
    old = state
    grads = jax.tree.map(lambda p, i=i: jnp.sin(9 * p + i) + 0.5, phi)
    updates, state = tx.update(grads, state, phi)
    phi = optax.apply_updates(phi, updates)
  dropped = jax.tree.map(lambda a, b: a & ~b, old.masks, state.masks)
  assert dropped['a']['w'].any()
  return old, state, dropped


@pytest.mark.parametrize('alpha', [None, 2.0])
@pytest.mark.slow
def test_momenta_of_dropped_weights_are_gone(alpha):
  inner = optax.adam(0.01)
  inner = inner if alpha is None else pp.powerprop(inner, alpha)
  old, new, dropped = after_a_rewiring(inner)
  for name in ('mu', 'nu'):
    before = optax.tree.get(old, name)['a']['w'][dropped['a']['w']]
    after = optax.tree.get(new, name)['a']['w'][dropped['a']['w']]
    assert before.any()
    assert not after.any()


def test_a_norm_sees_no_ghosts():
  """The first steps after pruning are those of an optimiser that never knew."""
  inner = optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1e-3))
  tx = pp.one_shot_pruning(inner, 0.5, step=2)
  phi, state = pp.init(tx, make_theta())
  for i in range(5):
    grads = jax.tree.map(lambda p, i=i: jnp.sin(9 * p + i) + 0.5, phi)
    updates, state = tx.update(grads, state, phi)
    if i > 2:
      norm = optax.tree.norm(pp.apply_masks(updates, state.masks))
      np.testing.assert_allclose(norm, 1e-3, rtol=1e-4)
    phi = optax.apply_updates(phi, updates)


def test_sm3_trains_and_has_its_slots_renewed():
  old, new, dropped = after_a_rewiring(optax.sm3(0.1))
  changed = (old.masks['a']['w'] != new.masks['a']['w']) & dropped['a']['w']
  nu = optax.tree.get(new, 'nu')['a']['w']
  assert not nu[changed].any()
  assert nu[new.masks['a']['w']].any()
  # Accumulators of rows and columns belong to no weight.
  chex.assert_tree_all_finite(new)


def test_flatten_is_refused_where_connections_move():
  inner = optax.flatten(optax.adam(0.1))
  with pytest.raises(ValueError, match=r'optax\.flatten.*Leave|Leave.*flatten'):
    pp.init(pp.rigl(inner, 0.5, stop=900), make_theta())
  tx = pp.static(inner, 0.5)
  phi, state = pp.init(tx, make_theta())
  updates, _ = tx.update(phi, state, phi)
  expected_tx = pp.static(optax.adam(0.1), 0.5)
  expected, _ = expected_tx.update(phi, expected_tx.init(phi), phi)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
