from absl.testing import parameterized

from powerprop_jax.costs import training


class TrainingFlopsTest(parameterized.TestCase):
  @parameterized.parameters(
    *(('dense', 30.0), ('static', 6.0), ('snip', 6.0), ('set', 6.0)),
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
    found = training.training_multiplier(method, 10.0, sparse, backward=5.0)
    self.assertAlmostEqual(found, expected / 30)

  @parameterized.parameters(
    (('adam', 10, 2), {}, "unknown method 'adam'. There are: dense, static"),
    (('rigl', 0, 0), {}, 'dense must be a positive'),
    (('rigl', 10), {}, 'needs sparse, a number of FLOPs, got None'),
    (('rigl', 2, 10), {}, 'between 0 and the 2 FLOPs.*got 10'),
    (('set', 10, float('nan')), {}, 'got nan'),
    (('rigl', 10, 2), {'period': 0}, 'period must be at least 1, got 0'),
    (('pruning', 10, 2), {}, 'a sequence, as sparse; got 2'),
    (('pruning', 10, [2, 11]), {}, 'got 11'),
    (('top_kast', 10, 2), {}, 'needs backward'),
  )
  def test_bad_input_is_refused(self, args, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      training.training_flops(*args, **kwargs)

  def test_a_length_that_is_not_positive_is_refused(self):
    for length in (0.0, -1.0, float('inf')):
      with self.assertRaisesRegex(ValueError, 'length must be a positive'):
        training.training_multiplier('set', 10, 2, length=length)
