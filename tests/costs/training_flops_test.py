from absl.testing import parameterized
import numpy as np

from powerprop_jax.costs import training


class TrainingFlopsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('dense', 30.0),
    ('static', 6.0),
    ('snip', 6.0),
    ('set', 6.0),
    ('dsr', 6.0),
    ('rigl', (3 * 2 * 100 + 2 * 2 + 10) / 101),
    ('snfs', 14.0),
    ('pruning', 6.0),
    ('top_kast', 2 + 2 + 5),
  )
  def test_methods(self, method, expected):
    sparse = [2.0] if method == 'pruning' else 2.0
    found = training.training_flops(method, 10.0, sparse, backward=5.0)
    self.assertAlmostEqual(found, expected)

  @parameterized.parameters(*training.METHODS)
  def test_a_method_that_stays_dense_costs_what_the_dense_one_does(
    self, method
  ):
    sparse = np.full(4, 10.0) if method == 'pruning' else 10
    self.assertAlmostEqual(
      training.training_multiplier(method, 10, sparse, backward=10), 1
    )

  def test_rigl_approaches_static_training_as_updates_become_rare(self):
    rare = training.training_flops('rigl', 10, 2, period=10**9)
    self.assertAlmostEqual(rare, training.training_flops('static', 10, 2))

  @parameterized.parameters(
    (('adam', 10, 2), {}, "unknown method 'adam'. There are: dense, static"),
    (('rigl', 0, 0), {}, 'dense must be a positive'),
    (('rigl', 10), {}, 'needs sparse, a number of FLOPs, got None'),
    (('rigl', 10, [2, 2]), {}, r'got \[2, 2\]'),
    (('rigl', 2, 10), {}, 'between 0 and the 2 FLOPs.*got 10'),
    (('set', 10, float('nan')), {}, 'got nan'),
    (('rigl', 10, 2), {'period': 0}, 'period must be at least 1, got 0'),
    (('pruning', 10, 2), {}, 'a sequence, as sparse; got 2'),
    (('pruning', 10, []), {}, r'got \[\]'),
    (('pruning', 10, [2, 11]), {}, 'got 11'),
    (('top_kast', 10, 2), {}, 'needs backward'),
  )
  def test_bad_input_is_refused(self, args, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      training.training_flops(*args, **kwargs)

  @parameterized.parameters(0.0, -1.0, float('inf'))
  def test_a_length_that_is_not_positive_is_refused(self, length):
    with self.assertRaisesRegex(ValueError, 'length must be a positive'):
      training.training_multiplier('set', 10, 2, length=length)
