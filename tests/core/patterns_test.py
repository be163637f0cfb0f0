"""How many of each group: whole inputs for every neuron, or weights."""

from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core.top_k import patterns


class ConstantFanInTest(parameterized.TestCase):
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
    shapes = {'w': (num_inputs, neurons)}
    found = patterns.CONSTANT_FAN_IN.kept({'w': sparsity}, shapes)
    self.assertEqual(found, {'w': k})

  def test_a_scalar_has_no_neurons(self):
    with self.assertRaisesRegex(ValueError, "'s' is a scalar"):
      patterns.CONSTANT_FAN_IN.kept({'s': 0.0}, {'s': ()})


def test_groups_and_what_exists_in_them():
  mask = jnp.asarray(np.random.default_rng(0).random((3, 2, 4)) < 0.5)
  for structure, groups, expected in (
    ('unstructured', (1, 24), mask.sum()),
    ('constant_fan_in', (4, 6), mask.sum((0, 1))),
  ):
    pattern = patterns.named(structure)
    assert pattern.groups(mask.shape) == groups
    np.testing.assert_array_equal(pattern.num_active(mask), expected)
    assert pattern.num_active(mask).dtype == jnp.int32
