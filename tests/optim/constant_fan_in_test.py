"""Constant fan-in: exact at every step, and rewired as a slow oracle does."""

import math

from absl.testing import parameterized
import chex
import fan_in_cases as cases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import aliases, powerprop, views
from powerprop_jax.optim.topologies import (
  constant_fan_in,
  drop_grow,
  fan_in,
  layers,
)
from powerprop_jax.optim.topology import Rewiring

_OPTIONS = {'structure': 'constant_fan_in', **cases.UNIFORM}
_MOVES = {'period': 4, 'stop': 60, 'drop_fraction': 0.5}
# The fan-in of each leaf at a sparsity of 0.7, of 18, 20 and 12 inputs.
_KEPT = {'conv': 5, 'linear': 6, 'logits': 4}

METHODS = {
  'static': lambda inner: aliases.static(inner, 0.7, **_OPTIONS),
  'set': lambda inner: aliases.sparse_evolution(
    inner, 0.7, **_MOVES, **_OPTIONS
  ),
  'rigl': lambda inner: aliases.rigl(inner, 0.7, **_MOVES, **_OPTIONS),
  'snfs_fixed': lambda inner: aliases.snfs(
    inner, 0.7, redistribute=False, **_MOVES, **_OPTIONS
  ),
}


def _inner(alpha):
  return powerprop.powerprop(optax.sgd(0.05, momentum=0.9), alpha)


class FanInsTest(parameterized.TestCase):
  @parameterized.parameters(
    (784, 10, 0.98, 16),  # 15.68
    (100, 8, 0.95, 5),
    (5, 4, 0.5, 3),  # halves go up
    (5, 4, 0.95, 1),  # 0.25: at least 1
    (20, 3, 0.0, 20),
    (1, 7, 0.8, 1),
    (10, 1, 0.88, 1),
    (12, 4, 0.999, 1),
  )
  def test_rounds_to_whole_inputs(self, num_inputs, neurons, sparsity, k):
    theta = {'w': jnp.ones((num_inputs, neurons))}
    found = fan_in.fan_ins(theta, sparsity, distributions.uniform)
    self.assertEqual(found, {'w': k})

  def test_is_within_half_an_input_of_the_density_of_any_distribution(self):
    theta = cases.theta()
    for distribution in (distributions.erk, distributions.uniform):
      by_leaf = distribution(theta, 0.6)
      found = fan_in.fan_ins(theta, 0.6, distribution)
      for name, sparsity in by_leaf.items():
        leaf = theta[name[:-2]]['w']
        exact = (1 - sparsity) * leaf.size / leaf.shape[-1]
        self.assertLessEqual(abs(found[name] - exact), 0.5 + 1e-5)
    self.assertEqual(fan_in.fan_ins({}, 0.6), {})

  def test_refusals_name_the_leaf(self):
    with self.assertRaisesRegex(ValueError, "the sparsity of 'w' must be in"):
      fan_in.fan_ins({'w': jnp.ones((2, 2))}, {'w': 1.0})
    with self.assertRaisesRegex(ValueError, "'s' is a scalar"):
      select = select_lib.by_regex('s')
      fan_in.fan_ins({'s': jnp.float32(1)}, 0.0, distributions.uniform, select)

  def test_random_masks_are_uniform_over_inputs(self):
    theta = {'w': jnp.zeros((6, 500))}
    mask = fan_in.random_masks(jax.random.key(0), theta, {'w': 2})['w']
    np.testing.assert_array_equal(np.sum(mask, axis=0), 2)
    share = np.mean(mask, axis=1)
    np.testing.assert_allclose(share, 1 / 3, atol=5 * np.sqrt(2 / 9 / 500))

  @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
  def test_random_masks_are_the_same_on_any_number_of_devices(self, axis_type):
    theta, kept = {'w': jnp.zeros((16, 24))}, {'w': 5}
    draw = lambda theta: fan_in.random_masks(jax.random.key(3), theta, kept)
    mesh = jax.make_mesh((8,), ('d',), axis_types=(axis_type,))
    for spec in (P('d', None), P(None, 'd')):
      sharded = jax.device_put(theta, NamedSharding(mesh, spec))
      with jax.set_mesh(mesh):
        masks = jax.jit(draw)(sharded)
      chex.assert_trees_all_equal(jax.device_get(masks), draw(theta))


class DropAndGrowTest(parameterized.TestCase):
  @parameterized.parameters(range(25))
  def test_equals_the_oracle_on_random_shapes_with_ties(self, seed):
    rng = np.random.default_rng(seed)
    mask, drop, grow, k = cases.layer(rng)
    num_dropped = int(rng.integers(0, mask.sum() + 1))
    size = mask.size // mask.shape[-1]
    # The fan-in may stay, rise, fall, and be 0 for some.
    new_k = int(rng.integers(1, size + 1)) if seed % 2 else k
    wanted = np.where(rng.random(mask.shape[-1]) < 0.8, new_k, 0)
    got = fan_in.drop_and_grow(
      mask, drop, grow, jnp.int32(num_dropped), jnp.asarray(wanted)
    )
    expected = cases.drop_and_grow(mask, drop, grow, num_dropped, wanted)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(fan_in.num_inputs(got), wanted)

  def test_small_weights_of_the_layer_go_whichever_neuron_has_them(self):
    mask = jnp.array([[True, True], [True, True], [False, False]])
    drop = jnp.array([[9.0, 1.0], [8.0, 2.0], [0.0, 0.0]])
    grow = jnp.array([[0.0, 1.0], [0.0, 2.0], [5.0, 3.0]])
    got = fan_in.drop_and_grow(mask, drop, grow, jnp.int32(2), 2)
    expected = [[True, False], [True, True], [False, True]]
    np.testing.assert_array_equal(got, expected)


class TopologyTest(parameterized.TestCase):
  @parameterized.product(method=tuple(METHODS), alpha=(1.0, 2.0))
  def test_every_neuron_has_its_inputs_after_every_update(self, method, alpha):
    moved = False
    masks = None
    for state in cases.states(METHODS[method](_inner(alpha)), 64):
      for name, k in _KEPT.items():
        np.testing.assert_array_equal(cases.inputs(state.masks, name), k)
        self.assertTrue(state.masks[name]['b'].all())
      if masks is not None:
        moved |= not np.array_equal(masks, state.masks['linear']['w'])
      masks = state.masks['linear']['w']
    self.assertEqual(moved, method != 'static')

  @parameterized.product(
    make=(aliases.gradual_pruning, aliases.one_shot_pruning), alpha=(1.0, 2.0)
  )
  def test_pruning_follows_the_schedule_in_whole_inputs(self, make, alpha):
    is_gradual = make is aliases.gradual_pruning
    options = (
      {'start': 3, 'stop': 51, 'period': 6} if is_gradual else {'step': 20}
    )
    tx = make(_inner(alpha), 0.7, structure='constant_fan_in', **options)
    old, done = None, 0.0
    for i, state in enumerate(cases.states(tx, 64)):
      step = i - 1  # of the last update
      if not is_gradual:
        done = float(step >= 20)
      elif step > 3 and step <= 51 and (step - 3) % 6 == 0:
        done = 1 - (1 - (step - 3) / 48) ** 3
      for name, k in _KEPT.items():
        counts = cases.inputs(state.masks, name)
        size = {'conv': 18, 'linear': 20, 'logits': 12}[name]
        # float32 may fall on the other side of a whole number.
        expected = {
          size - math.floor(done * (size - k) + e) for e in (-1e-4, 1e-4)
        }
        self.assertLen(set(counts), 1)
        self.assertIn(counts[0], expected, (i, name))
        if old is not None:
          grown = state.masks[name]['w'] & ~old[name]['w']
          self.assertFalse(grown.any())
      old = state.masks
    self.assertEqual([cases.inputs(old, n)[0] for n in _KEPT], [5, 6, 4])

  def test_pruning_keeps_the_largest_inputs_of_every_neuron(self):
    tx = aliases.one_shot_pruning(
      optax.sgd(0.1), 0.7, step=0, structure='constant_fan_in'
    )
    phi, state = views.init(tx, cases.theta())
    zeros = jax.tree.map(jnp.zeros_like, phi)
    _, state = cases.jit(tx.update)(zeros, state, phi)
    for name, k in _KEPT.items():
      flat = np.abs(np.asarray(phi[name]['w'])).reshape(-1, cases.NEURONS[name])
      mask = np.asarray(state.masks[name]['w']).reshape(flat.shape)
      least = np.sort(flat, axis=0)[-k]
      np.testing.assert_array_equal(mask, flat >= least)

  @parameterized.product(make=(aliases.rigl, aliases.sparse_evolution))
  def test_one_rewiring_equals_the_oracle_in_every_layer(self, make):
    tx = make(
      optax.sgd(0.01), 0.7, stop=100, period=1, start=0, key=7, **_OPTIONS
    )
    phi, old = views.init(tx, cases.theta())
    grads = optax.tree.random_like(jax.random.key(1), phi, jax.random.normal)
    _, new = cases.jit(tx.update)(grads, old, phi)
    grow = jax.tree.map(jnp.abs, grads)
    if make is aliases.sparse_evolution:
      # The key of a rewiring, as sparsify makes it.
      key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0))[0]
      grow = drop_grow.at_random(
        Rewiring(key, jnp.int32(0), old.masks, (), phi, grads)
      )
    for name, k in _KEPT.items():
      mask = np.asarray(old.masks[name]['w'])
      expected = cases.drop_and_grow(
        mask,
        np.abs(np.asarray(phi[name]['w'])),
        np.asarray(grow[name]['w']),
        int(0.3 * mask.sum() + 1e-6),
        [k] * mask.shape[-1],
      )
      np.testing.assert_array_equal(new.masks[name]['w'], expected)

  def test_leaves_that_are_not_selected_stay_dense(self):
    select = select_lib.exclude(select_lib.is_weight, 'logits')
    tx = aliases.rigl(optax.sgd(0.1), 0.7, select=select, **_MOVES, **_OPTIONS)
    for state in cases.states(tx, 9):
      self.assertTrue(state.masks['logits']['w'].all())
      np.testing.assert_array_equal(cases.inputs(state.masks, 'linear'), 6)

  def test_dense_layers_and_layers_of_one_input_or_neuron(self):
    theta = {
      'dense': {'w': jnp.ones((5, 3))},
      'one_in': {'w': jnp.ones((1, 4))},
      'one_out': {'w': jnp.arange(1.0, 7).reshape(6, 1)},
    }
    sparsity = {'dense/w': 0.0, 'one_in/w': 0.5, 'one_out/w': 0.5}
    tx = aliases.rigl(
      optax.sgd(0.0), sparsity, stop=9, period=1, structure='constant_fan_in'
    )
    phi, state = views.init(tx, theta)
    update = cases.jit(tx.update)
    for i in range(6):
      grads = optax.tree.random_like(jax.random.key(i), phi, jax.random.normal)
      _, state = update(grads, state, phi)
      self.assertTrue(state.masks['dense']['w'].all())
      self.assertTrue(state.masks['one_in']['w'].all())
      self.assertEqual(int(state.masks['one_out']['w'].sum()), 3)

  def test_a_nan_leaves_the_masks_as_they_are_until_the_next_chance(self):
    tx = aliases.rigl(optax.sgd(0.0), 0.7, stop=9, period=1, **_OPTIONS)
    phi, state = views.init(tx, cases.theta())
    update = cases.jit(tx.update)
    ones = jax.tree.map(jnp.ones_like, phi)
    _, first = update(ones, state, phi)
    broken = phi | {
      'linear': phi['linear'] | {'w': phi['linear']['w'] * np.nan}
    }
    _, same = update(ones, first, broken)
    chex.assert_trees_all_equal(same.masks, first.masks)
    _, moved = update(ones, same, phi)
    self.assertFalse(
      np.array_equal(moved.masks['linear']['w'], first.masks['linear']['w'])
    )

  def test_masks_that_were_replaced_are_put_right_at_the_next_rewiring(self):
    tx = aliases.rigl(
      optax.sgd(0.0), 0.7, stop=9, period=1, start=0, **_OPTIONS
    )
    phi, state = views.init(tx, cases.theta())
    uneven = jax.tree.map(lambda x: x > 0, phi)
    uneven = {
      n: leaves | {'b': leaves['b'] | True} for n, leaves in uneven.items()
    }
    state = views.with_masks(state, uneven)
    _, state = cases.jit(tx.update)(
      jax.tree.map(jnp.ones_like, phi), state, phi
    )
    for name, k in _KEPT.items():
      np.testing.assert_array_equal(cases.inputs(state.masks, name), k)

  def test_a_tree_without_leaves(self):
    for topology in (
      constant_fan_in.at_random(0.5),
      constant_fan_in.gradual(0.5, jnp.float32, schedules.never),
    ):
      self.assertEqual(topology.init(jax.random.key(0), {}), ({}, ()))


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    aliases.rigl, aliases.sparse_evolution, aliases.snfs
  )
  def test_unknown_structures_are_named_with_a_suggestion(self, make):
    with self.assertRaisesRegex(ValueError, "Did you mean 'constant_fan_in'"):
      make(optax.sgd(0.1), 0.5, stop=500, period=1, structure='constant_fanin')
    for other in (aliases.static, aliases.one_shot_pruning):
      options = {} if other is aliases.static else {'step': 1}
      with self.assertRaisesRegex(ValueError, "must be 'unstructured' or"):
        other(optax.sgd(0.1), 0.5, structure='blocks', **options)

  def test_given_masks_have_the_structure_that_they_have(self):
    masks = jax.tree.map(lambda x: x > 0, cases.theta())
    with self.assertRaisesRegex(ValueError, 'needs a sparsity, got masks'):
      aliases.static(optax.sgd(0.1), masks=masks, structure='constant_fan_in')

  def test_neurons_are_not_ranked_globally(self):
    with self.assertRaisesRegex(
      ValueError, "scope='global'. Use scope='layer'"
    ):
      aliases.one_shot_pruning(
        optax.sgd(0.1), 0.5, step=1, scope='global', structure='constant_fan_in'
      )

  @parameterized.parameters(-0.5, 1.0, float('nan'))
  def test_bad_sparsity(self, sparsity):
    for make in (
      lambda: constant_fan_in.at_random(sparsity),
      lambda: constant_fan_in.gradual(sparsity, jnp.float32, schedules.never),
      lambda: constant_fan_in.drop_grow(
        sparsity, schedules.never, 0.3, drop_grow.at_random
      ),
    ):
      with self.assertRaisesRegex(ValueError, r'sparsity must be in \[0, 1\)'):
        make()


def test_counts_are_those_without_structure_where_they_divide():
  theta = {'w': jnp.ones((40, 10))}
  uniform = distributions.uniform
  counts = layers.kept_counts(theta, 0.8, uniform)
  assert counts == {'w': 10 * fan_in.fan_ins(theta, 0.8, uniform)['w']}
