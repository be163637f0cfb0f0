"""Protected weights keep their bits under every optimiser."""

import functools

import chex
import inners
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import pytest

import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.optim import topology
from powerprop_jax.optim.topologies import fixed, protected


def _sets(seed):
  """A forward and a backward set; the bias stands still."""
  rng = np.random.default_rng(seed)
  draw = lambda p: jnp.asarray(rng.random(p.shape) < 0.6)
  forward, trainable = (jax.tree.map(draw, packing.theta()) for _ in range(2))
  forward['m']['b'] = jnp.ones(5, bool)
  trainable['m']['b'] = jnp.zeros(5, bool)
  return forward, trainable


def _grads(seed):
  noise = optax.tree.random_like(jax.random.key(seed), packing.theta())
  return jax.tree.map(lambda n: n - 0.5, noise)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('inner', inners.INNERS)
@pytest.mark.slow
def test_update_is_exactly_zero_where_protected(inner, alpha):
  """Also for momentum that a weight has from before it was protected."""
  tx = packing.make_tx(inners.INNERS[inner](), alpha)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  @chex.assert_max_traces(n=1)
  def step(phi, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state, updates

  phi, opt_state = pp.init(tx, packing.theta())
  for i in range(3):
    phi, opt_state, _ = step(phi, opt_state, _grads(i))
  forward, trainable = _sets(0)
  for kwargs in ({'trainable': trainable}, {'masks': forward}):
    opt_state = protected.with_protection(opt_state, **kwargs)
    moving = trainable
    if 'masks' in kwargs:
      moving = masks_lib.intersect(trainable, forward)
    before = jax.tree.map(np.asarray, phi)
    for i in range(3):
      phi, opt_state, updates = step(phi, opt_state, _grads(9 + i))
      outside = jax.tree.map(
        lambda u, m: np.asarray(u)[~np.asarray(m)], updates, moving
      )
      assert not any(np.any(u) for u in jax.tree.leaves(outside))
    for path in (('m', 'w'), ('m', 'b'), ('n', 'w')):
      old, new, moves = (t[path[0]][path[1]] for t in (before, phi, moving))
      kept = ~np.asarray(moves)
      assert packing.same_bits(old[kept], np.asarray(new)[kept])
      assert np.all(old[~kept] != np.asarray(new)[~kept])


def test_network_sees_the_forward_set_only():
  tx = packing.make_tx(optax.adam(0.1))
  phi, opt_state = pp.init(tx, packing.theta())
  forward, trainable = _sets(1)
  chex.assert_trees_all_close(
    pp.effective_params(phi, opt_state), packing.theta(), rtol=1e-5
  )
  opt_state = protected.with_protection(
    opt_state, masks=forward, trainable=trainable
  )
  chex.assert_trees_all_equal(
    pp.effective_params(phi, opt_state),
    pp.apply_masks(pp.effective_params(phi, tx.init(phi)), forward),
  )


def test_full_sets_change_nothing():
  inner = inners.INNERS['adamw']()
  tx = pp.sparsify(inner, protected.protected())
  phi = packing.theta()
  expected, _ = inner.update(_grads(0), inner.init(phi), phi)
  updates, _ = tx.update(_grads(0), tx.init(phi), phi)
  chex.assert_trees_all_equal(updates, expected)


def test_sets_are_found_in_wrappers_and_copied():
  tx = optax.MultiSteps(
    optax.chain(optax.clip(1.0), packing.make_tx(optax.sgd(0.1))), 2
  ).gradient_transformation()
  forward, trainable = _sets(2)
  opt_state = protected.with_protection(
    tx.init(packing.theta()), masks=forward, trainable=trainable
  )
  jax.tree.map(lambda m: m.delete(), (forward, trainable))
  sparse = topology.find_sparse_state(opt_state)
  expected = _sets(2)
  chex.assert_trees_all_equal(sparse.masks, expected[0])
  chex.assert_trees_all_equal(sparse.memory.trainable, expected[1])
  kept = protected.with_protection(opt_state)
  chex.assert_trees_all_equal(kept, opt_state)


@pytest.mark.parametrize(
  ('make', 'what'),
  [
    (lambda theta: optax.sgd(0.1), 'no sparsify'),
    (
      lambda theta: pp.sparsify(
        optax.sgd(0.1), fixed.given(masks_lib.full_masks(theta))
      ),
      'another topology',
    ),
  ],
)
def test_other_optimisers_are_refused(make, what):
  theta = packing.theta()
  with pytest.raises(ValueError, match=what):
    protected.with_protection(make(theta).init(theta))


def test_sets_of_other_shapes_are_refused():
  opt_state = packing.make_tx(optax.sgd(0.1)).init(packing.theta())
  masks, _ = _sets(0)
  masks['n']['w'] = jnp.ones((5, 5), bool)
  with pytest.raises(ValueError, match=r"leaf 'n/w' .*\(5, 5\) in trainable"):
    protected.with_protection(opt_state, trainable=masks)
