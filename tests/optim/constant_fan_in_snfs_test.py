"""SNFS with constant fan-in: whole inputs, no more connections than given."""

from absl.testing import parameterized
import fan_in_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.optim import aliases, powerprop
from powerprop_jax.optim.topologies import constant_fan_in_snfs, snfs


def _oracle(counts, neurons):
  """As whole_fan_ins, with a list and a loop."""
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


class WholeFanInsTest(parameterized.TestCase):
  def test_equals_the_oracle_and_fills_up_to_one_input(self):
    rng = np.random.default_rng(0)
    whole = jax.jit(constant_fan_in_snfs.whole_fan_ins)
    for turn in range(60):
      neurons = rng.integers(1, 9, 5)
      counts = rng.integers(1, 40, 5)
      if turn % 3 == 0:  # some layers should have fewer than one input
        counts[:2] = 1
      counts[4] += max(0, neurons.sum() - counts.sum())
      got = np.asarray(whole(jnp.asarray(counts), jnp.asarray(neurons)))
      np.testing.assert_array_equal(got, _oracle(counts, neurons))
      self.assertGreaterEqual(got.min(), 1)
      rest = counts.sum() - (got * neurons).sum()
      self.assertBetween(rest, 0, neurons.max() - 1)

  def test_whole_numbers_are_kept(self):
    neurons, inputs = jnp.array([7, 3, 5]), jnp.array([2, 9, 1])
    got = constant_fan_in_snfs.whole_fan_ins(neurons * inputs, neurons)
    np.testing.assert_array_equal(got, inputs)


class TrainingTest(parameterized.TestCase):
  @parameterized.product(alpha=(1.0, 2.0), second_moment=(None, 0.99))
  def test_layers_exchange_whole_inputs(self, alpha, second_moment):
    tx = aliases.snfs(
      powerprop.powerprop(optax.sgd(0.05), alpha),
      0.7,
      period=4,
      stop=90,
      second_moment=second_moment,
      structure='constant_fan_in',
      **cases.UNIFORM,
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

  def test_a_rewiring_drops_small_weights_and_grows_by_momentum(self):
    """Each layer as fan_in.drop_and_grow does it, with whole fan-ins."""
    tx = aliases.snfs(
      optax.sgd(0.0),
      0.7,
      period=1,
      start=0,
      stop=100,
      structure='constant_fan_in',
      **cases.UNIFORM,
    )
    theta = cases.theta()
    state = tx.init(theta)
    grads = optax.tree.random_like(jax.random.key(5), theta, jax.random.normal)
    _, new = cases.jit(tx.update)(grads, state, theta)
    names = tuple(cases.NEURONS)
    weight = lambda tree, name: np.asarray(tree[name]['w'])
    masks = [weight(state.masks, name) for name in names]
    means = [
      np.abs(weight(grads, name))[mask].mean()
      for name, mask in zip(names, masks, strict=True)
    ]
    counts = jnp.array([mask.sum() for mask in masks])
    sizes = jnp.array([mask.size for mask in masks])
    share = jnp.array(means) / sum(means)
    dropped = snfs.num_to_drop(0.5, counts, sizes, share)
    left = counts - dropped
    grown, _ = snfs.exact_growth(
      jnp.sum(dropped), jnp.float32(0), share, sizes - left
    )
    fan_ins = _oracle(left + grown, cases.NEURONS.values())
    for name, mask, num, k in zip(names, masks, dropped, fan_ins, strict=True):
      expected = cases.drop_and_grow(
        mask,
        np.abs(weight(theta, name)),
        np.abs(weight(grads, name)),
        int(num),
        [k] * mask.shape[-1],
      )
      np.testing.assert_array_equal(weight(new.masks, name), expected)
