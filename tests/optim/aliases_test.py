"""The short forms: defaults of the papers, and results of the long forms."""

import functools
import math

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from powerprop_jax import nets
from powerprop_jax.core import distributions, schedules
from powerprop_jax.optim import aliases, powerprop, sparsify
from powerprop_jax.optim.topologies import drop_grow, fixed, gradual, top_kast


def _theta():
  return small.two_layers((9, 8), (8, 5))


def _masks():
  return jax.tree.map(lambda x: x > 0, _theta())


def _cosine(start, stop):
  return lambda t: jnp.float32(start) * (1 + jnp.cos(math.pi * t / stop)) / 2


_SGD = optax.sgd(0.1, momentum=0.9)
_EVERY_2 = schedules.every(2, start=2, stop=6)
_ERK = {'distribution': distributions.erk}

PAIRS = {
  'static': (
    lambda: aliases.static(_SGD, 0.7, key=5),
    lambda: sparsify.sparsify(_SGD, fixed.at_random(0.7, **_ERK), key=5),
  ),
  'static_given': (
    lambda: aliases.static(_SGD, masks=_masks()),
    lambda: sparsify.sparsify(_SGD, fixed.given(_masks())),
  ),
  'gradual': (
    lambda: aliases.gradual_pruning(_SGD, 0.7, start=1, stop=5, period=2),
    lambda: sparsify.sparsify(
      _SGD,
      gradual.gradual(
        0.7,
        lambda step: 1 - (1 - jnp.clip((step - 1) / 4, 0, 1)) ** 3,
        schedules.at(3, 5),
        distribution=distributions.uniform,
      ),
    ),
  ),
  'one_shot': (
    lambda: aliases.one_shot_pruning(_SGD, 0.7, step=3, scope='global'),
    lambda: sparsify.sparsify(
      _SGD,
      gradual.gradual(
        0.7, lambda step: jnp.float32(1), schedules.at(3), scope='global'
      ),
    ),
  ),
  'set': (
    lambda: aliases.sparse_evolution(_SGD, 0.7, stop=6, period=2, key=5),
    lambda: sparsify.sparsify(
      _SGD,
      drop_grow.drop_grow(
        0.7, _EVERY_2, _cosine(0.3, 6), drop_grow.at_random, **_ERK
      ),
      key=5,
    ),
  ),
  'rigl': (
    lambda: aliases.rigl(_SGD, 0.7, stop=6, period=2, key=5),
    lambda: sparsify.sparsify(
      _SGD,
      drop_grow.drop_grow(
        0.7,
        _EVERY_2,
        _cosine(0.3, 6),
        drop_grow.by_gradient,
        replaces_step=True,
        **_ERK,
      ),
      key=5,
    ),
  ),
  'top_kast': (
    lambda: aliases.top_kast(_SGD, 0.7, 0.5),
    lambda: sparsify.sparsify(
      _SGD,
      top_kast.top_kast(
        0.7,
        0.5,
        schedules.every(1),
        penalty=1e-4,
        norm='l2',
        distribution=distributions.uniform,
      ),
    ),
  ),
}


_MOVES = {'stop': 9, 'period': 2}
ALL = {
  'static': aliases.static,
  'gradual': functools.partial(aliases.gradual_pruning, start=1, stop=5),
  'one_shot': functools.partial(aliases.one_shot_pruning, step=3),
  'set': functools.partial(aliases.sparse_evolution, **_MOVES),
  'rigl': functools.partial(aliases.rigl, **_MOVES),
  'snfs': functools.partial(aliases.snfs, **_MOVES),
  'dsr': functools.partial(aliases.dsr, num_dropped=3, **_MOVES),
  'top_kast': lambda inner, sparsity, **options: aliases.top_kast(
    inner, sparsity, 0.1, **options
  ),
}


def _run(tx, steps=7):
  return small.history(tx, _theta(), steps)[-1]


class AliasesTest(parameterized.TestCase):
  @parameterized.parameters(*PAIRS)
  @pytest.mark.slow
  def test_equals_sparsify_around_its_topology(self, name):
    short, long = (_run(make()) for make in PAIRS[name])
    chex.assert_trees_all_equal(short[1].masks, long[1].masks)
    chex.assert_trees_all_close(short[0], long[0], rtol=1e-6)

  @parameterized.parameters('set', 'rigl')
  def test_a_schedule_is_taken_as_it_is(self, name):
    make = {'set': aliases.sparse_evolution, 'rigl': aliases.rigl}[name]
    number = make(_SGD, 0.7, stop=6, period=2, drop_fraction=0.4)
    given = make(_SGD, 0.7, stop=6, period=2, drop_fraction=_cosine(0.4, 6))
    constant = make(
      _SGD, 0.7, stop=6, period=2, drop_fraction=schedules.constant(0.4)
    )
    masks = [_run(tx)[1].masks for tx in (number, given, constant)]
    chex.assert_trees_all_equal(masks[0], masks[1])
    self.assertFalse(np.array_equal(masks[0]['a']['w'], masks[2]['a']['w']))

  def test_same_start_for_methods_of_one_key(self):
    """So that comparisons start from the same network."""
    starts = [
      tx.init(_theta()).masks
      for tx in (
        aliases.static(_SGD, 0.7, key=2),
        aliases.rigl(_SGD, 0.7, stop=500, key=2),
        aliases.sparse_evolution(_SGD, 0.7, stop=500, key=2),
        aliases.snfs(
          _SGD, 0.7, stop=500, period=100, key=2, distribution=distributions.erk
        ),
      )
    ]
    chex.assert_trees_all_equal(*starts)

  def test_powerprop_at_one_changes_nothing(self):
    for make in (
      lambda inner: aliases.static(inner, 0.7),
      lambda inner: aliases.rigl(inner, 0.7, stop=6, period=2),
      lambda inner: aliases.top_kast(inner, 0.7, 0.5),
    ):
      plain = _run(make(_SGD))
      powered = _run(make(powerprop.powerprop(_SGD, 1.0)))
      chex.assert_trees_all_equal(powered[1].masks, plain[1].masks)
      chex.assert_trees_all_close(powered[0], plain[0], rtol=1e-6)


class StreamsTest(parameterized.TestCase):
  @parameterized.parameters('lenet_300_100', 'lenet_5')
  @pytest.mark.slow
  def test_masks_do_not_depend_on_weights_of_the_same_key(self, name):
    # From one stream, the tenth that is kept would be the largest weights.
    net = nets.make(name, 10)
    theta, _ = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), True)
    masks = aliases.static(optax.sgd(0.1), 0.9, key=0).init(theta).masks
    for module, leaves in theta.items():
      kept = leaves['w'][masks[module]['w']]
      error = jnp.std(leaves['w']) / kept.size**0.5
      assert abs(jnp.mean(kept)) < 5 * error
      assert 0.7 < jnp.std(kept) / jnp.std(leaves['w']) < 1.3


class RefusalsTest(parameterized.TestCase):
  @parameterized.product(name=tuple(ALL), sparsity=(-0.5, 1.0, float('nan')))
  def test_sparsities_outside_the_unit_interval(self, name, sparsity):
    message = rf'sparsity must be in \[0, 1\), got {sparsity}'
    with self.assertRaisesRegex(ValueError, message):
      ALL[name](_SGD, sparsity)

  @parameterized.parameters(*ALL)
  def test_a_leaf_that_would_lose_all_is_named(self, name):
    tx = ALL[name](_SGD, 0.98, distribution=distributions.uniform)
    with self.assertRaisesRegex(ValueError, "'n/w' has 40 weights and would"):
      tx.init(_theta())

  @parameterized.parameters(*ALL)
  def test_unknown_keywords_are_named(self, name):
    with self.assertRaisesRegex(TypeError, 'sparsities'):
      ALL[name](_SGD, 0.5, sparsities=3)
