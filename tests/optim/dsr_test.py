"""Tests of powerprop_jax.optim.topologies.dsr."""

from absl.testing import parameterized
import allocation_test
from exchanges import SHAPES, always, counts, flatten, random_tree, rewiring
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.core import scores
from powerprop_jax.optim.topologies import dsr


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
    (0.8, 0.5, 10),
    (0.8, 0.05, 10),
    (0.5, 0.3, 20),
    (0.9, 1.5, 5),
    (0.8, 100.0, 10),  # above all weights
  )
  @pytest.mark.slow
  def test_equals_the_published_rule(self, sparsity, threshold, target):
    topology = dsr.dsr(
      sparsity, always, num_dropped=target, threshold=threshold
    )
    masks, limit = jax.jit(topology.init)(jax.random.key(1), random_tree(0))
    rewire, total = jax.jit(topology.rewire), counts(masks).sum()
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
    _, limit = topology.rewire(rewiring(mask, theta, jnp.float32(0.5)))
    self.assertEqual(limit, expected)

  def test_dropped_connections_return_only_where_there_is_no_other_place(self):
    theta = random_tree(0)
    topology = dsr.dsr(0.1, always, num_dropped=10, threshold=1.0)
    masks, limit = jax.jit(topology.init)(jax.random.key(0), theta)
    new, _ = jax.jit(topology.rewire)(rewiring(masks, theta, limit))
    self.assertEqual(counts(new).sum(), counts(masks).sum())
    # More were dropped than there were free places, so all of those are taken.
    for name, flat in flatten(new).items():
      self.assertTrue(np.all(flat | flatten(masks)[name]))

  def test_threshold_never_reaches_zero_or_infinity(self):
    theta = jax.tree.map(jnp.zeros_like, random_tree(0))
    topology = dsr.dsr(0.8, always, num_dropped=1, threshold=1e-29)
    rewire = jax.jit(topology.rewire)
    masks, limit = jax.jit(topology.init)(jax.random.key(0), theta)
    for _ in range(8):
      masks, limit = rewire(rewiring(masks, theta, limit))
    self.assertEqual(limit, np.float32(1e-30))
    theta = jax.tree.map(lambda x: x + 1e38, theta)
    limit = jnp.float32(1e30)
    _, limit = topology.rewire(rewiring(masks, theta, limit))
    self.assertEqual(limit, np.float32(1e30))
