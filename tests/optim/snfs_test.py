"""Tests of powerprop_jax.optim.topologies.snfs."""

import math

from absl.testing import parameterized
import allocation_test
import chex
import exchanges as ex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import powerprop_jax as pp
from powerprop_jax.optim.topologies import snfs


def smallest(values, eligible, k):
  return sorted(eligible, key=lambda i: (values[i], i))[:k]


class Oracle:
  """The rules of sparse momentum, one layer and one connection at a time."""

  def __init__(self):
    self.adjust, self.residuals = 0.0, []

  def rewire(self, masks, theta, momentum, p):
    masks, theta, m = ex.flatten(masks), ex.flatten(theta), ex.flatten(momentum)
    importance = [float(np.mean(np.abs(m[n][masks[n]]))) for n in ex.SHAPES]
    importance = [i / sum(importance) for i in importance]
    nnz = [int(masks[n].sum()) for n in ex.SHAPES]
    zeros = [masks[n].size - k for n, k in zip(ex.SHAPES, nnz, strict=True)]
    removed = []
    for layer, n in enumerate(ex.SHAPES):
      sparsity, rate = zeros[layer] / masks[n].size, p
      if sparsity < 0.2 and importance[layer] > 1 / len(ex.SHAPES):
        rate = min(sparsity, p)
      # The tolerance is for products that are integers but for rounding.
      number = math.ceil(rate * nnz[layer] - 1e-5)
      removed.append(min(number, nnz[layer] - 1))
    regrow = [
      max(0, math.ceil(i * (sum(removed) + self.adjust))) for i in importance
    ]
    cap = [0.99 * (z + r) for z, r in zip(zeros, removed, strict=True)]
    mean_over = 0.0
    for _ in range(1000):
      wanted = [r + mean_over for r in regrow]
      regrow = [min(w, c) for w, c in zip(wanted, cap, strict=True)]
      over = sum(wanted) - sum(regrow)
      mean_over = over / len(regrow)
      if over <= 1e-6:
        break
    regrow = [math.floor(r + 1e-5) for r in regrow]
    missing = sum(removed) - sum(regrow)
    self.residuals.append(missing)
    self.adjust = (
      0.25 * self.adjust + 0.75 * missing + float(np.mean(self.residuals))
    )
    if missing > 0:
      room = [z + r - g for z, r, g in zip(zeros, removed, regrow, strict=True)]
      extra = allocation_test.oracle(missing, importance, room)
    else:
      extra = [-x for x in allocation_test.oracle(-missing, regrow, regrow)]
    new = {}
    for layer, n in enumerate(ex.SHAPES):
      active = set(np.flatnonzero(masks[n]).tolist())
      dropped = smallest(np.abs(theta[n]), active, removed[layer])
      # Ties go to the lowest index, to those kept as to those grown.
      kept = active - set(dropped)
      free = set(range(masks[n].size)) - kept
      number = regrow[layer] + extra[layer]
      new[n] = kept | set(smallest(-np.abs(m[n]), free, number))
    return new, missing


def memory_of(momentum):
  return snfs.SparseMomentum(
    momentum,
    (),
    jnp.zeros([], jnp.float32),
    jnp.zeros([], jnp.float32),
    jnp.zeros([], jnp.int32),
  )


def rewired(topology, masks, momentum):
  given = ex.rewiring(masks, ex.random_tree(1), memory_of(momentum))
  return jax.jit(topology.rewire)(given)[0]


class SnfsTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.1, 0.2, 0.3, 0.4), 0.5),
    ((0.05, 0.05, 0.05, 0.05), 0.3),
    ((0.9, 0.85, 0.95, 0.97), 0.5),  # near-dense layers
    ((0.6, 0.1, 0.99, 0.1), 0.9),
    ((0.01, 0.01, 0.02, 0.04), 0.5),  # layers with one connection
    ((0.3, 0.3, 0.3, 0.3), 0.005),
  )
  @pytest.mark.slow
  def test_equals_the_published_rules_and_keeps_the_total(self, densities, p):
    topology = snfs.snfs(0.5, ex.always, p)
    rewire = jax.jit(topology.rewire)
    oracle, masks = Oracle(), ex.random_masks(densities)
    memory, total = memory_of(ex.random_tree(1)), ex.counts(masks).sum()
    for turn in range(6):
      # Layers of different importance, which changes.
      theta = ex.random_tree(10 + turn)
      momentum = ex.random_tree(20 + turn)
      for name, factor in zip(ex.SHAPES, (1, 3, 0.2, 8), strict=True):
        factor = factor if turn % 2 else 1 / factor
        momentum[name]['w'] *= factor
      expected, missing = oracle.rewire(masks, theta, momentum, p)
      memory = memory._replace(momentum=momentum)
      before = memory
      masks, memory = rewire(ex.rewiring(masks, theta, memory))
      for name, flat in ex.flatten(masks).items():
        self.assertEqual(set(np.flatnonzero(flat).tolist()), expected[name])
      self.assertTrue(np.all(np.asarray(masks['a']['b'])))
      self.assertEqual(ex.counts(masks).sum(), total)
      self.assertGreaterEqual(ex.counts(masks).min(), 1)
      # What was missing before the total was settled, and what follows of it.
      self.assertEqual(memory.residuals - before.residuals, missing)
      np.testing.assert_allclose(memory.correction, oracle.adjust, rtol=1e-5)
      self.assertEqual(memory.num_rewirings, turn + 1)

  def test_without_momentum_layers_are_equally_important(self):
    masks = ex.random_masks((0.2, 0.2, 0.2, 0.2))
    zeros = jax.tree.map(jnp.zeros_like, ex.random_tree(0))
    new = rewired(snfs.snfs(0.8, ex.always), masks, zeros)
    removed = np.ceil(0.5 * ex.counts(masks))
    grown = ex.counts(new) - ex.counts(masks) + removed
    self.assertLessEqual(np.ptp(grown), 1)
    self.assertEqual(grown.sum(), removed.sum())

  def test_without_redistribution_layers_keep_their_numbers(self):
    masks = ex.random_masks((0.2, 0.5, 0.1, 0.9))
    momentum = ex.random_tree(3, scale=5.0)
    topology = snfs.snfs(0.8, ex.always, redistribute=False)
    new = rewired(topology, masks, momentum)
    np.testing.assert_array_equal(ex.counts(new), ex.counts(masks))
    for name, flat in ex.flatten(new).items():
      came = np.flatnonzero(flat & ~ex.flatten(masks)[name])
      never = np.flatnonzero(~flat)
      size = np.abs(ex.flatten(momentum)[name])
      self.assertGreaterEqual(size[came].min(), size[never].max())

  def test_is_the_sum_that_the_optimiser_would_have(self):
    topology = snfs.snfs(0.5, ex.always, momentum=0.8)
    _, memory = jax.jit(topology.init)(jax.random.key(0), ex.random_tree(0))
    trace, observe = optax.trace(0.8), jax.jit(topology.observe)
    state = trace.init(ex.random_tree(0))
    for seed in range(5):
      memory = observe(memory, ex.random_tree(seed))
      _, state = trace.update(ex.random_tree(seed), state)
    for name in ex.SHAPES:
      np.testing.assert_allclose(
        memory.momentum[name]['w'], state.trace[name]['w'], rtol=1e-5, atol=1e-6
      )
    np.testing.assert_array_equal(memory.momentum['a']['b'], np.zeros(9))

  def test_with_second_moment_ranks_as_adam_would(self):
    topology = snfs.snfs(0.5, ex.always, momentum=0.9, second_moment=0.99)
    theta = ex.random_tree(0)
    masks, memory = jax.jit(topology.init)(jax.random.key(0), theta)
    adam = optax.scale_by_adam(0.9, 0.99)
    state = adam.init(theta)
    for seed in range(5):
      grads = ex.random_tree(seed)
      memory = topology.observe(memory, grads)
      _, state = adam.update(grads, state)
    new, _ = jax.jit(topology.rewire)(ex.rewiring(masks, theta, memory))
    for name in ex.SHAPES:
      ratio = np.abs(state.mu[name]['w']) / np.sqrt(state.nu[name]['w'])
      came = np.asarray(new[name]['w'] & ~masks[name]['w'])
      never = ~np.asarray(new[name]['w'])
      self.assertGreaterEqual(
        ratio[came].min(initial=np.inf),
        ratio[never].max(initial=0) * (1 - 1e-5),
      )

  @parameterized.parameters(jnp.nan, jnp.inf, -jnp.inf, 3e38)
  def test_stays_finite_whatever_the_gradient(self, value):
    topology = snfs.snfs(0.5, ex.always, second_moment=0.9)
    _, memory = jax.jit(topology.init)(jax.random.key(0), ex.random_tree(0))
    bad = jax.tree.map(lambda x: x.at[0].set(value), ex.random_tree(1))
    memory = topology.observe(memory, ex.random_tree(2))
    before = memory
    for _ in range(3):
      memory = topology.observe(memory, bad)
    chex.assert_tree_all_finite(memory)
    if not np.isfinite(value):
      np.testing.assert_allclose(
        memory.momentum['b']['w'][0],
        0.9**3 * before.momentum['b']['w'][0],
        rtol=1e-5,
      )

  @parameterized.parameters(
    (0.5, 50, math.ceil(500 * 0.2525)),
    (0.5, 99, math.ceil(500 * 0.0051221)),
    (optax.linear_schedule(0.5, 0.0, 100), 50, 125),
  )
  def test_drop_fraction_falls_along_its_schedule(self, fraction, step, moved):
    tx = pp.snfs(
      optax.sgd(0.1), 0.5, period=1, stop=100, drop_fraction=fraction
    )
    generator = np.random.default_rng(0)
    phi = {'w': jnp.asarray(generator.normal(size=(10, 100)), jnp.float32)}
    state = tx.init(phi)._replace(step=jnp.int32(step))
    # All that is dropped moves: only missing connections have a gradient.
    grads = {'w': jnp.where(state.masks['w'], 0.0, 1.0)}
    _, new = jax.jit(tx.update)(grads, state, phi)
    self.assertEqual(jnp.sum(new.masks['w'] & ~state.masks['w']), moved)
