"""SET and RigL against a slow oracle and vectors worked out by hand."""

import math

from absl.testing import parameterized
import chex
import fan_in_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

import powerprop_jax as pp
from powerprop_jax.core import schedules
from powerprop_jax.optim import sparsify
from powerprop_jax.optim.topologies import drop_grow


def _oracle(mask, drop, grow, num_moved):
  """All weights as the inputs of one neuron, and as many as before."""
  column = lambda x: np.reshape(x, (-1, 1))
  num_moved = min(num_moved, int((~mask).sum()))
  new = cases.drop_and_grow(
    column(mask), column(drop), column(grow), num_moved, [mask.sum()]
  )
  return new.reshape(mask.shape)


@jax.jit
def _moved(mask, drop, grow, fraction):
  """The new mask of one layer whose scores are given."""
  method = drop_grow.drop_grow(
    {'w': 0.5},
    schedules.never,
    lambda step: fraction,
    lambda rewiring: rewiring.grads,
    select=pp.by_regex('w'),
  )
  masks, drop, grow = ({'w': jnp.asarray(x)} for x in (mask, drop, grow))
  key, step = jax.random.key(0), jnp.int32(0)
  rewiring = pp.Rewiring(key, step, masks, (), drop, grow)
  return method.rewire(rewiring)[0]['w']


def _theta():
  return small.two_layers((10, 10), (10, 4))


def _run(tx, steps):
  return small.history(tx, _theta(), steps)


class DropGrowTest(parameterized.TestCase):
  @parameterized.product(
    seed=tuple(range(6)), fraction=(0.0, 0.05, 0.3, 0.5, 0.99, 1.0)
  )
  def test_equals_the_oracle_with_many_ties(self, seed, fraction):
    rng = np.random.default_rng(seed)
    shape = ((23,), (4, 7), (3, 3, 2, 2))[seed % 3]
    mask = rng.random(shape) < (0.2, 0.5, 0.9)[seed // 2]
    drop = rng.integers(0, 4, shape).astype(np.float32)
    grow = rng.integers(0, 3, shape).astype(np.float32)
    num_moved = math.floor(fraction * int(mask.sum()) + 1e-6)
    got = _moved(mask, drop, grow, fraction)
    np.testing.assert_array_equal(got, _oracle(mask, drop, grow, num_moved))
    self.assertEqual(int(got.sum()), int(mask.sum()))

  def test_a_dense_layer_stays_and_an_empty_one_too(self):
    scores = jnp.arange(6.0)
    for mask in (jnp.ones(6, bool), jnp.zeros(6, bool)):
      np.testing.assert_array_equal(_moved(mask, scores, scores, 0.5), mask)

  @parameterized.product(
    make=(pp.rigl, pp.sparse_evolution),
    structure=('unstructured', 'constant_fan_in'),
  )
  def test_one_rewiring_equals_the_oracle_in_every_layer(self, make, structure):
    options = {'structure': structure, **cases.UNIFORM}
    tx = make(optax.sgd(0.01), 0.7, stop=9, period=1, start=0, key=7, **options)
    phi, old = pp.init(tx, cases.theta())
    grads = small.grads(1, phi)
    _, new = jax.jit(tx.update)(grads, old, phi)
    grow = jax.tree.map(jnp.abs, grads)
    if make is pp.sparse_evolution:
      # The key of a rewiring, as sparsify makes it.
      key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0))[0]
      grow = drop_grow.at_random(
        pp.Rewiring(key, jnp.int32(0), old.masks, (), phi, grads)
      )
    for name in cases.NEURONS:
      mask, size, merit = (
        np.asarray(tree[name]['w']) for tree in (old.masks, phi, grow)
      )
      layer = mask, np.abs(size), merit, int(0.3 * mask.sum() + 1e-6)
      expected = (
        _oracle(*layer)
        if structure == 'unstructured'
        else cases.drop_and_grow(*layer, cases.inputs(old.masks, name))
      )
      np.testing.assert_array_equal(new.masks[name]['w'], expected)
      self.assertTrue(new.masks[name]['b'].all())

  @parameterized.parameters(
    ({}, (3, 6)),
    ({'start': 0}, (0, 3, 6)),
    ({'start': 4}, (6,)),
    ({'start': 6}, (6,)),
  )
  def test_when_connections_move(self, options, due):
    tx = pp.rigl(optax.sgd(0.01), 0.5, stop=9, period=3, **options)
    when = sparsify.parts(tx).topology.when
    self.assertEqual([i for i in range(12) if when(i)], list(due))

  @parameterized.parameters(
    (pp.rigl, {}, True),
    (pp.rigl, {'replaces_step': False}, False),
    (pp.sparse_evolution, {}, False),
  )
  def test_a_rewiring_replaces_the_step(self, make, options, replaces):
    tx = make(optax.sgd(0.1), 0.5, stop=9, period=3, **options)
    (phi, _), (moved, new) = _run(tx, 4)[3:5]
    rate = 0.0 if replaces else 0.1
    stepped = jax.tree.map(lambda p, g: p - rate * g, phi, small.grads(3, phi))
    chex.assert_trees_all_close(
      moved, pp.apply_masks(stepped, new.masks), atol=1e-6
    )

  def test_grows_anywhere_alike(self):
    """Of 10 places, 5 are kept; the other 5 share 3 new connections alike."""
    mask = jnp.arange(10) < 8
    theta = {'w': jnp.where(mask, 10.0 - jnp.arange(10.0), 0.0)[None]}
    tree = {'w': mask[None]}
    method = drop_grow.drop_grow(0.2, schedules.at(0), 0.4, drop_grow.at_random)

    def rewire(key):
      rewiring = pp.Rewiring(
        key, jnp.int32(0), tree, (), theta, jax.tree.map(jnp.zeros_like, theta)
      )
      return method.rewire(rewiring)[0]['w'][0]

    drawn = jax.vmap(rewire)(jax.random.split(jax.random.key(0), 4000))
    # floor(0.4 · 8) = 3 wanted, but only 2 places were free.
    np.testing.assert_array_equal(np.mean(drawn[:, :6], axis=0), 1.0)
    share = np.mean(np.asarray(drawn[:, 6:]), axis=0)
    np.testing.assert_allclose(share, 0.5, atol=5 * 0.5 / np.sqrt(4000))

  def test_the_key_decides(self):
    make = lambda key: pp.sparse_evolution(
      optax.sgd(0.1), 0.5, stop=9, period=2, key=key
    )
    keys = (3, jax.random.key(3), jax.random.PRNGKey(3), 4)
    *same, other = (_run(make(key), 5)[-1][1].masks for key in keys)
    chex.assert_trees_all_equal(*same)
    self.assertFalse(np.array_equal(same[0]['a']['w'], other['a']['w']))
    jax.jit(lambda s: s, donate_argnums=0)(make(keys[1]).init(_theta()))
    self.assertFalse(keys[1].is_deleted())
