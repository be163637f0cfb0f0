"""Tests of powerprop_jax.optim.topologies.dsr."""

import functools

from absl.testing import parameterized
import allocation_test
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import scores
from powerprop_jax.optim import aliases, powerprop, sparsify, views
from powerprop_jax.optim.topologies import dsr
from powerprop_jax.optim.topology import Rewiring

# Compiles in half the time.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)

SHAPES = {'a': (10, 8), 'b': (8, 12), 'c': (3, 3, 2, 2), 'd': (12, 3)}
always = lambda step: step >= 0


def random_tree(seed, scale=1.0):
  generator = np.random.default_rng(seed)
  tree = {
    name: {'w': scale * generator.normal(size=shape)}
    for name, shape in SHAPES.items()
  }
  tree['a']['b'] = generator.normal(size=8)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def flatten(tree):
  return {name: np.asarray(tree[name]['w']).ravel() for name in SHAPES}


def counts(masks):
  return np.array([flat.sum() for flat in flatten(masks).values()])


def rewiring(masks, theta, threshold, seed=0):
  return Rewiring(
    jax.random.key(seed),
    jnp.asarray(0, jnp.int32),
    masks,
    jnp.asarray(threshold, jnp.float32),
    theta,
    theta,
  )


def oracle(masks, theta, threshold, target, drawn):
  """One rewiring, layer by layer."""
  masks, theta, drawn = flatten(masks), flatten(theta), flatten(drawn)
  kept, places = [], []
  for name in SHAPES:
    active = np.flatnonzero(masks[name])
    stay = {i for i in active if abs(theta[name][i]) >= threshold}
    if not stay:
      stay = {max(active, key=lambda i: (abs(theta[name][i]), -i))}
    kept.append(stay)
    places.append(np.flatnonzero(~masks[name]))
  dropped = sum(flat.sum() for flat in masks.values()) - sum(map(len, kept))
  remaining = [len(stay) for stay in kept]
  grown = allocation_test.oracle(
    int(dropped), remaining, [len(p) for p in places]
  )
  new = {}
  for layer, name in enumerate(SHAPES):
    best = sorted(places[layer], key=lambda i: (-drawn[name][i], i))
    new[name] = kept[layer] | set(best[: grown[layer]])
  if dropped > 1.1 * target:
    threshold /= 2
  elif dropped < 0.9 * target:
    threshold *= 2
  return new, threshold, dropped


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.8, 0.5, 10), (0.8, 0.05, 10), (0.5, 0.3, 20), (0.9, 1.5, 5)
  )
  def test_equals_the_published_rule(self, sparsity, threshold, target):
    topology = dsr.dsr(
      sparsity, always, num_dropped=target, threshold=threshold
    )
    masks, limit = _jit(topology.init)(jax.random.key(1), random_tree(0))
    rewire, total = _jit(topology.rewire), counts(masks).sum()
    for turn in range(8):
      theta = random_tree(10 + turn)
      # Layers of different scale lose different shares.
      for name, factor in zip(SHAPES, (1, 3, 0.3, 1), strict=True):
        theta[name]['w'] *= factor
      given = rewiring(masks, theta, limit, seed=turn)
      drawn = scores.random(given.key, theta)
      expected, after, _ = oracle(masks, theta, float(limit), target, drawn)
      masks, limit = rewire(given)
      for name, flat in flatten(masks).items():
        self.assertEqual(set(np.flatnonzero(flat)), expected[name])
      self.assertTrue(np.all(np.asarray(masks['a']['b'])))
      self.assertEqual(float(limit), np.float32(after))
      self.assertEqual(counts(masks).sum(), total)

  @parameterized.parameters(
    (9, 0.5), (10, 0.5), (11, 0.5), (12, 0.25), (8, 1.0), (0, 1.0)
  )
  def test_threshold_moves_only_beyond_a_tenth_of_the_target(
    self, dropped, expected
  ):
    theta = {'w': jnp.ones((4, 10))}
    mask = {'w': jnp.arange(40).reshape(4, 10) < 20}
    topology = dsr.dsr(0.5, always, num_dropped=10)
    small = jnp.arange(40).reshape(4, 10) < dropped
    theta = {'w': jnp.where(small, 0.4, theta['w'])}
    _, limit = topology.rewire(rewiring(mask, theta, 0.5))
    self.assertEqual(limit, expected)

  def test_a_threshold_above_all_weights_leaves_one_connection_and_regrows(
    self,
  ):
    theta = random_tree(0)
    topology = dsr.dsr(0.8, always, num_dropped=10, threshold=100.0)
    masks, limit = _jit(topology.init)(jax.random.key(0), theta)
    new, after = _jit(topology.rewire)(rewiring(masks, theta, limit))
    self.assertEqual(counts(new).sum(), counts(masks).sum())
    self.assertEqual(after, 50.0)
    for name, flat in flatten(masks).items():
      size = np.where(flat, np.abs(flatten(theta)[name]), -1)
      self.assertTrue(flatten(new)[name][size.argmax()])

  def test_dropped_connections_return_only_where_there_is_no_other_place(self):
    theta = random_tree(0)
    topology = dsr.dsr(0.1, always, num_dropped=10, threshold=1.0)
    masks, limit = _jit(topology.init)(jax.random.key(0), theta)
    new, _ = _jit(topology.rewire)(rewiring(masks, theta, limit))
    self.assertEqual(counts(new).sum(), counts(masks).sum())
    # More were dropped than there were free places, so all of those are taken.
    for name, flat in flatten(new).items():
      self.assertTrue(np.all(flat | flatten(masks)[name]))

  def test_threshold_never_reaches_zero_or_infinity(self):
    theta = jax.tree.map(jnp.zeros_like, random_tree(0))
    topology = dsr.dsr(0.8, always, num_dropped=1, threshold=1e-29)
    rewire = _jit(topology.rewire)
    masks, limit = _jit(topology.init)(jax.random.key(0), theta)
    for _ in range(8):
      masks, limit = rewire(rewiring(masks, theta, limit))
    self.assertEqual(limit, np.float32(1e-30))
    theta = jax.tree.map(lambda x: x + 1e38, theta)
    limit = jnp.float32(1e30)
    _, limit = topology.rewire(rewiring(masks, theta, limit))
    self.assertEqual(limit, np.float32(1e30))


def small_tree(seed):
  tree = random_tree(seed, 0.5)
  return {'a': tree['a'], 'out': {'w': tree['b']['w'][:, :5]}}


def loss_fn(theta, x):
  hidden = jnp.tanh(x @ theta['a']['w'] + theta['a']['b'][None])
  return jnp.mean((hidden @ theta['out']['w'] - x[:, :5]) ** 2)


def train(tx, theta, num_steps):
  """The final state; counts and losses of all steps."""
  phi, state = views.init(tx, theta)

  def step(carry, key):
    phi, state = carry
    x = jax.random.normal(key, (16, 10))
    effective = views.effective_params(phi, state)
    loss, grads = jax.value_and_grad(loss_fn)(effective, x)
    updates, state = tx.update(grads, state, phi)
    now = [jnp.sum(state.masks[n]['w'], dtype=jnp.int32) for n in ('a', 'out')]
    return (optax.apply_updates(phi, updates), state), (jnp.stack(now), loss)

  keys = jax.random.split(jax.random.key(0), num_steps)
  (_, state), (history, losses) = jax.lax.scan(step, (phi, state), keys)
  return state, history, losses


class TrainingTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0)
  def test_the_total_is_exact_at_every_step(self, alpha):
    tx = aliases.dsr(
      powerprop.powerprop(optax.sgd(0.05, 0.9), alpha),
      0.7,
      period=3,
      stop=120,
      num_dropped=12,
    )
    run = _jit(lambda theta: train(tx, theta, 130))
    state, history, losses = run(small_tree(0))
    # 10 · 8 and 8 · 5 weights, each layer rounded by itself.
    np.testing.assert_array_equal(history.sum(1), np.full(130, 24 + 12))
    self.assertGreaterEqual(history.min(), 1)
    self.assertTrue(np.any(np.diff(history, axis=0) != 0))
    self.assertNotEqual(state.memory, np.float32(1e-3))
    self.assertLess(losses[-10:].mean(), losses[:10].mean())

  def test_lanes_equal_single_runs(self):
    def final(seed):
      tx = aliases.dsr(
        optax.sgd(0.05), 0.8, period=4, stop=40, num_dropped=9, key=seed
      )
      state, history, _ = train(tx, small_tree(0), 40)
      return state.masks, state.memory, history

    lanes = _jit(jax.vmap(final))(jnp.arange(3))
    for seed in range(3):
      chex.assert_trees_all_equal(
        jax.tree.map(lambda x, s=seed: x[s], lanes), _jit(final)(seed)
      )

  def test_only_weights_that_are_not_finite_stop_a_rewiring(self):
    topology = dsr.dsr(0.5, always, num_dropped=5, threshold=0.5)
    tx = sparsify.sparsify(optax.sgd(0.1), topology)
    phi, update = small_tree(0), _jit(tx.update)
    state = tx.init(phi)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), phi)
    _, new = update(phi, state, bad)
    chex.assert_trees_all_equal(
      (new.masks, new.memory), (state.masks, state.memory)
    )
    _, new = update(bad, state, phi)
    self.assertNotEqual(new.memory, state.memory)
    count = lambda s: sum(int(s.masks[n]['w'].sum()) for n in ('a', 'out'))
    self.assertEqual(count(new), count(state))


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(num_dropped=0), 'num_dropped must be at least 1, got 0'),
    (dict(threshold=0.0), 'threshold must be in .* got 0.0'),
    (dict(threshold=float('nan')), 'threshold must be in'),
    (dict(stop=3), 'nothing would ever be rewired'),
    (dict(sparsity=-0.5), 'sparsity must be in'),
  )
  def test_is_refused_by_name_and_value(self, changes, message):
    arguments = dict(sparsity=0.9, period=5, stop=100) | changes
    with self.assertRaisesRegex(ValueError, message):
      aliases.dsr(optax.sgd(0.1), **arguments)

  def test_more_to_drop_than_there_is_is_refused(self):
    tx = aliases.dsr(optax.sgd(0.1), 0.5, period=1, stop=2)
    with self.assertRaisesRegex(ValueError, 'only 120 can be dropped'):
      tx.init(random_tree(0))
