"""Constant fan-in: exact at every step, and rewired as a slow oracle does."""

from absl.testing import parameterized
import fan_in_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.core.top_k import patterns
from powerprop_jax.optim.topologies import allocation, drop_grow, snfs
from powerprop_jax.optim.topologies.counts import Budget

_OPTIONS = {'structure': 'constant_fan_in', **cases.UNIFORM}
# The fan-in of each leaf at a sparsity of 0.7, of 18, 20 and 12 inputs.
_KEPT = {'conv': 5, 'linear': 6, 'logits': 4}


def _oracle_of_layer(tree, name):
  return np.abs(np.asarray(tree[name]['w']))


@jax.jit
def _moved(mask, drop, grow, num_dropped, wanted):
  return drop_grow.drop_and_grow(
    mask, drop, grow, num_dropped, wanted, patterns.CONSTANT_FAN_IN
  )


def _whole_fan_ins(counts, neurons):
  """As allocation.whole_fan_ins, with a list and a loop."""
  counts = [int(c) for c in counts]
  neurons = [int(n) for n in neurons]
  inputs = [max(c // n, 1) for c, n in zip(counts, neurons, strict=True)]
  rest = lambda: sum(counts) - sum(np.multiply(inputs, neurons))
  over = lambda i: (
    np.float32(inputs[i])
    - np.float32(np.float32(counts[i]) / np.float32(neurons[i]))
  )
  layers = range(len(counts))
  while rest() < 0:
    inputs[max((i for i in layers if inputs[i] > 1), key=over)] -= 1
  while True:
    short = [
      i
      for i in layers
      if inputs[i] * neurons[i] < counts[i] and neurons[i] <= rest()
    ]
    if not short:
      return inputs
    inputs[min(short, key=over)] += 1


class ConstantFanInTest(parameterized.TestCase):
  def test_random_masks_are_uniform_over_inputs(self):
    budget = Budget({'w': 0.7}, structure='constant_fan_in')
    theta = {'w': jnp.zeros((6, 500))}
    mask = budget.random_masks(jax.random.key(0), theta)['w']
    np.testing.assert_array_equal(np.sum(mask, axis=0), 2)
    share = np.mean(mask, axis=1)
    np.testing.assert_allclose(share, 1 / 3, atol=5 * np.sqrt(2 / 9 / 500))

  @parameterized.parameters(range(25))
  @pytest.mark.slow
  def test_equals_the_oracle_on_random_shapes_with_ties(self, seed):
    rng = np.random.default_rng(seed)
    mask, drop, grow, k = cases.layer(rng)
    num_dropped = int(rng.integers(0, mask.sum() + 1))
    size = mask.size // mask.shape[-1]
    # The fan-in may stay, rise, fall, and be 0 for some.
    new_k = int(rng.integers(1, size + 1)) if seed % 2 else k
    wanted = np.where(rng.random(mask.shape[-1]) < 0.8, new_k, 0)
    got = _moved(mask, drop, grow, jnp.int32(num_dropped), jnp.asarray(wanted))
    expected = cases.drop_and_grow(mask, drop, grow, num_dropped, wanted)
    np.testing.assert_array_equal(got, expected)

  def test_pruning_keeps_the_largest_inputs_of_every_neuron(self):
    tx = pp.one_shot_pruning(
      optax.sgd(0.1), 0.7, step=0, structure='constant_fan_in'
    )
    phi, state = pp.init(tx, cases.theta())
    zeros = jax.tree.map(jnp.zeros_like, phi)
    _, state = jax.jit(tx.update)(zeros, state, phi)
    for name, k in _KEPT.items():
      flat = _oracle_of_layer(phi, name).reshape(-1, cases.NEURONS[name])
      mask = np.asarray(state.masks[name]['w']).reshape(flat.shape)
      least = np.sort(flat, axis=0)[-k]
      np.testing.assert_array_equal(mask, flat >= least)

  def test_dense_layers_and_layers_of_one_input_or_neuron(self):
    theta = {
      'dense': {'w': jnp.ones((5, 3))},
      'one_in': {'w': jnp.ones((1, 4))},
      'one_out': {'w': jnp.arange(1.0, 7).reshape(6, 1)},
    }
    sparsity = {'dense/w': 0.0, 'one_in/w': 0.5, 'one_out/w': 0.5}
    tx = pp.rigl(optax.sgd(0.0), sparsity, stop=9, period=1, **_OPTIONS)
    phi, state = pp.init(tx, theta)
    update = jax.jit(tx.update)
    for i in range(6):
      _, state = update(small.grads(i, phi), state, phi)
      self.assertTrue(state.masks['dense']['w'].all())
      self.assertTrue(state.masks['one_in']['w'].all())
      self.assertEqual(int(state.masks['one_out']['w'].sum()), 3)

  def test_masks_that_were_replaced_are_put_right_at_the_next_rewiring(self):
    tx = pp.rigl(optax.sgd(0.0), 0.7, stop=9, period=1, start=0, **_OPTIONS)
    phi, state = pp.init(tx, cases.theta())
    uneven = jax.tree.map(lambda x: (x > 0) | (x.ndim == 1), phi)
    state = pp.with_masks(state, uneven)
    ones = jax.tree.map(jnp.ones_like, phi)
    _, state = jax.jit(tx.update)(ones, state, phi)
    for name, k in _KEPT.items():
      np.testing.assert_array_equal(cases.inputs(state.masks, name), k)

  def test_equals_the_oracle_and_fills_up_to_one_input(self):
    rng = np.random.default_rng(0)
    whole = jax.jit(allocation.whole_fan_ins)
    for turn in range(60):
      neurons = rng.integers(1, 9, 5)
      counts = rng.integers(1, 40, 5)
      if turn % 3 == 0:  # some layers should have fewer than one input
        counts[:2] = 1
      counts[4] += max(0, neurons.sum() - counts.sum())
      if turn % 3 == 1:  # whole numbers are kept
        counts = neurons * rng.integers(1, 9, 5)
      got = np.asarray(whole(jnp.asarray(counts), jnp.asarray(neurons)))
      np.testing.assert_array_equal(got, _whole_fan_ins(counts, neurons))
      self.assertGreaterEqual(got.min(), 1)
      rest = counts.sum() - (got * neurons).sum()
      self.assertBetween(rest, 0, 0 if turn % 3 == 1 else neurons.max() - 1)

  @parameterized.product(alpha=(1.0, 2.0), second_moment=(None, 0.99))
  @pytest.mark.slow
  def test_layers_exchange_whole_inputs(self, alpha, second_moment):
    tx = pp.snfs(
      pp.powerprop(optax.sgd(0.05), alpha),
      0.7,
      period=4,
      stop=90,
      second_moment=second_moment,
      **_OPTIONS,
    )
    total = 5 * 6 + 6 * 12 + 4 * 4
    seen = set()
    for state in cases.states(tx, 66):
      inputs = {name: cases.inputs(state.masks, name) for name in cases.NEURONS}
      for counts in inputs.values():
        self.assertLen(set(counts), 1)
        self.assertGreaterEqual(counts[0], 1)
      connections = sum(counts.sum() for counts in inputs.values())
      self.assertBetween(total - connections, 0, 11)
      seen.add(tuple(counts[0] for counts in inputs.values()))
    self.assertGreater(len(seen), 1)
    self.assertEqual(state.memory.num_rewirings, 16)

  @pytest.mark.slow
  def test_a_rewiring_drops_small_weights_and_grows_by_momentum(self):
    """Each layer as drop_and_grow does it, with whole fan-ins."""
    tx = pp.snfs(optax.sgd(0.0), 0.7, period=1, start=0, stop=100, **_OPTIONS)
    theta = cases.theta()
    state = tx.init(theta)
    grads = small.grads(5, theta)
    _, new = jax.jit(tx.update)(grads, state, theta)
    masks = [np.asarray(state.masks[name]['w']) for name in cases.NEURONS]
    momenta = [_oracle_of_layer(grads, name) for name in cases.NEURONS]
    means = [m[mask].mean() for m, mask in zip(momenta, masks, strict=True)]
    counts = jnp.array([mask.sum() for mask in masks])
    sizes = jnp.array([mask.size for mask in masks])
    share = jnp.array(means) / sum(means)
    dropped = snfs.num_to_drop(0.5, counts, sizes, share)
    left = counts - dropped
    grown, _ = snfs.exact_growth(
      jnp.sum(dropped), jnp.float32(0), share, sizes - left
    )
    fan_ins = _whole_fan_ins(left + grown, cases.NEURONS.values())
    for i, name in enumerate(cases.NEURONS):
      expected = cases.drop_and_grow(
        masks[i],
        _oracle_of_layer(theta, name),
        momenta[i],
        int(dropped[i]),
        [fan_ins[i]] * masks[i].shape[-1],
      )
      np.testing.assert_array_equal(new.masks[name]['w'], expected)
