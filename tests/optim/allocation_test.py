"""Tests of powerprop_jax.optim.topologies.allocation."""

from fractions import Fraction
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.optim.topologies import allocation


def oracle(total, weights, room):
  """Largest remainders in exact arithmetic; full layers leave the sharing."""
  weights = [Fraction(w) for w in weights]
  total = max(0, min(total, sum(room)))
  full = set()
  while True:
    free = [i for i in range(len(room)) if i not in full]
    rest = total - sum(room[i] for i in full)
    if all(weights[i] == 0 for i in free):
      shares = {i: Fraction(rest, len(free)) for i in free}
    else:
      sum_of_weights = sum(weights[i] for i in free)
      shares = {i: rest * weights[i] / sum_of_weights for i in free}
    over = [i for i in free if shares[i] > room[i]]
    if not over:
      break
    full.update(over)
  given = [
    room[i] if i in full else math.floor(shares[i]) for i in range(len(room))
  ]
  by_remainder = sorted(shares, key=lambda i: given[i] - shares[i])
  for i in by_remainder[: total - sum(given)]:
    given[i] += 1
  return given


class AllocateTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5, 20)
  def test_equals_exact_arithmetic(self, num_layers):
    generator = np.random.default_rng(num_layers)
    allocate = jax.jit(allocation.allocate)
    for _ in range(50):
      # Small numbers, so that there are many ties and full layers.
      weights = generator.integers(0, 7, num_layers)
      room = generator.integers(0, 9, num_layers)
      total = int(generator.integers(0, room.sum() + 1))
      np.testing.assert_array_equal(
        allocate(jnp.asarray(total), jnp.asarray(weights), jnp.asarray(room)),
        oracle(total, weights.tolist(), room.tolist()),
      )

  def test_millions_of_connections_are_shared_exactly_to_the_last(self):
    generator = np.random.default_rng(0)
    allocate = jax.jit(allocation.allocate)
    for _ in range(20):
      room = generator.integers(0, 20_000_000, 60)
      weights = room * generator.random(60) ** 4
      total = int(room.sum() * generator.random())
      given = np.asarray(
        allocate(total, jnp.asarray(weights, jnp.float32), jnp.asarray(room))
      )
      self.assertEqual(given.astype(np.int64).sum(), total)
      self.assertTrue(np.all((given >= 0) & (given <= room)))

  @parameterized.parameters((-3, [0, 0]), (0, [0, 0]), (99, [4, 2]))
  def test_gives_nothing_for_nothing_and_no_more_than_there_is_room(
    self, total, expected
  ):
    given = allocation.allocate(total, jnp.array([1, 5]), jnp.array([4, 2]))
    np.testing.assert_array_equal(given, expected)
