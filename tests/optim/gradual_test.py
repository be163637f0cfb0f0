"""Magnitude pruning while training: Zhu and Gupta's numbers, step by step."""

import itertools
import math

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

import powerprop_jax as pp
from powerprop_jax.core import masks, schedules, scores
from powerprop_jax.core.top_k import patterns
from powerprop_jax.optim.topologies import gradual


def _theta():
  theta = small.normal(
    {'a': {'w': (20, 10), 'b': (10,)}, 'b': {'w': (10, 5)}, 'c': {'w': (2, 4)}}
  )
  return theta | {'c': {'w': 0.01 * theta['c']['w']}}


def _history(tx, steps):
  return small.history(tx, _theta(), steps)


def _counts(opt_state):
  return [int(opt_state.masks[name]['w'].sum()) for name in 'abc']


class GradualPruningTest(parameterized.TestCase):
  @parameterized.product(
    case=(
      (0.8, 2, 14, 3, 3.0),
      (0.5, 0, 10, 1, 3.0),
      (0.9, 3, 10, 4, 1.0),  # stop is not a multiple: pruned at 7 and 10
    ),
    pattern=(patterns.UNSTRUCTURED, patterns.CONSTANT_FAN_IN),
  )
  def test_counts_are_those_of_the_polynomial_at_every_step(
    self, case, pattern
  ):
    """Of each leaf, or of each neuron."""
    sparsity, start, stop, period, power = case
    shares = {'a/w': sparsity, 'b/w': sparsity, 'c/w': 0.5}
    shapes = {'a/w': (20, 10), 'b/w': (10, 5), 'c/w': (2, 4)}
    sizes = [pattern.groups(shape)[1] for shape in shapes.values()]
    kept = list(pattern.kept(shares, shapes).values())
    tx = pp.gradual_pruning(
      optax.sgd(0.01),
      shares,
      start=start,
      stop=stop,
      period=period,
      power=power,
      structure=pattern.name,
    )
    done = 0.0
    # The first entry is the start, before update 0.
    for step, (_, opt_state) in enumerate(_history(tx, stop + 3), start=-1):
      if start < step <= stop and (
        (step - start) % period == 0 or step == stop
      ):
        done = 1 - (1 - (step - start) / (stop - start)) ** power
      for name, size, final in zip('abc', sizes, kept, strict=True):
        counts = pattern.num_active(opt_state.masks[name]['w'])
        zeros = done * (size - final)
        # float32 may fall on the other side of a whole number.
        expected = {size - math.floor(zeros + e) for e in (-1e-4, 1e-4)}
        self.assertIn(set(np.ravel(counts).tolist()), [{n} for n in expected])
        if step >= stop:
          np.testing.assert_array_equal(counts, final)

  @parameterized.parameters(
    ('layer', False), ('global', False), ('global', True)
  )
  def test_the_smallest_go_for_good(self, scope, normalise):
    """Where all rank together, the largest of each leaf stays."""
    options = {'scope': scope, 'normalise': normalise}
    tx = pp.gradual_pruning(
      optax.sgd(0.05), 0.8, start=0, stop=9, period=3, **options
    )
    is_global = scope == 'global'
    groups = [slice(0, 3)] if is_global else [slice(i, i + 1) for i in range(3)]
    for (phi, old), (_, new) in itertools.pairwise(_history(tx, 12)):
      weights, before, after = (
        [np.asarray(tree[name]['w']) for name in 'abc']
        for tree in (phi, old.masks, new.masks)
      )
      sizes = [
        np.abs(x) / (np.linalg.norm(x) if normalise else 1) for x in weights
      ]
      for size in sizes if is_global else ():
        size.flat[size.argmax()] = np.inf
      for group in groups:
        num_kept = sum(mask.sum() for mask in after[group])
        expected = small.largest_of_all(sizes[group], num_kept, before[group])
        chex.assert_trees_all_equal(after[group], expected)
    if is_global:
      self.assertEqual(sum(_counts(new)), masks.num_kept(258, 0.8))
      # c is a hundred times smaller.
      self.assertEqual(_counts(new)[2] == 1, not normalise)

  def test_scores_may_be_negative_and_no_leaf_vanishes(self):
    """What is gone scores 0, more than all that is left."""
    method = gradual.gradual(
      0.9,
      schedules.polynomial(0.999, 0, 4, 1),
      schedules.every(1, stop=9),
      scope='global',
      score=lambda theta: jax.tree.map(lambda t: -jnp.abs(t), theta),
    )
    theta = _theta() | {'c': {'w': 100 * jnp.ones((2, 4))}}
    current, _ = method.init(jax.random.key(0), theta)
    for step in range(6):
      masked = pp.apply_masks(theta, current)
      current = _rewired(method, step, current, masked)
      self.assertTrue(current['c']['w'].any(), step)

  def test_a_gradient_that_is_not_finite_does_not_prevent_pruning(self):
    """Its only step must not be missed: magnitudes do not need gradients."""
    tx = pp.one_shot_pruning(
      optax.apply_if_finite(optax.sgd(0.1), 5), 0.5, step=0
    )
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), _theta())
    _, (phi, opt_state) = small.history(tx, _theta(), 1, lambda i: bad)
    self.assertEqual(_counts(opt_state), [100, 25, 4])
    chex.assert_trees_all_equal(phi, pp.apply_masks(_theta(), opt_state.masks))

  def test_weights_that_are_not_finite_do(self):
    tx = pp.one_shot_pruning(optax.sgd(0.1), 0.5, step=0)
    theta = _theta()
    theta['a']['w'] = theta['a']['w'].at[0, 0].set(jnp.inf)
    phi, opt_state = pp.init(tx, theta)
    _, opt_state = tx.update(phi, opt_state, phi)
    self.assertEqual(_counts(opt_state), [200, 50, 8])

  def test_other_scores_may_rank(self):
    theta = _theta()
    method = gradual.gradual(
      0.5,
      lambda step: jnp.float32(1),
      schedules.at(0),
      score=lambda theta: scores.random(jax.random.key(1), theta),
    )
    current, _ = method.init(jax.random.key(0), theta)
    got = _rewired(method, 0, current, theta)
    drawn = scores.random(jax.random.key(1), theta)['b']['w']
    np.testing.assert_array_equal(
      got['b']['w'], drawn >= np.sort(drawn.ravel())[25]
    )


def _rewired(method, step, current, theta):
  rewiring = pp.Rewiring(
    jax.random.key(0), jnp.int32(step), current, (), theta, theta
  )
  return method.rewire(rewiring)[0]
