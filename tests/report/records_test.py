import math

from absl.testing import absltest

from powerprop_jax.report import records


class PivotTest(absltest.TestCase):
  def test_means_are_over_all_other_fields(self):
    points = [
      {
        'alpha': alpha,
        'sparsity': sparsity,
        'key': key,
        'accuracy': alpha * key,
      }
      for alpha in (2.0, 1.0)
      for sparsity in (0.9, 0.0)
      for key in (1, 3)
    ]
    self.assertEqual(
      records.pivot(points),
      [
        {'sparsity': 0.0, 'alpha 1': 2.0, 'alpha 2': 4.0},
        {'sparsity': 0.9, 'alpha 1': 2.0, 'alpha 2': 4.0},
      ],
    )

  def test_combinations_not_measured_are_none_and_nan_is_not_hidden(self):
    points = [
      {'alpha': 1, 'sparsity': 0.5, 'accuracy': 0.25},
      {'alpha': 2, 'sparsity': 0.9, 'accuracy': math.nan},
      {'alpha': 2, 'sparsity': 0.9, 'accuracy': 0.5},
      {'alpha': 2, 'sparsity': 0.9, 'accuracy': None},
      {'alpha': 2},
    ]
    first, second = records.pivot(points)
    self.assertEqual(first, {'sparsity': 0.5, 'alpha 1': 0.25, 'alpha 2': None})
    self.assertTrue(math.isnan(second['alpha 2']))

  def test_no_records_give_no_rows(self):
    self.assertEqual(records.pivot([]), [])


class ChooseTest(absltest.TestCase):
  def test_records_without_a_field_are_passed_over(self):
    points = [{'step': 1, 'loss': None}, {'step': 2}]
    self.assertEqual(records.usable(points, 'step', 'loss'), points[:1])

  def test_no_usable_record_is_an_error_that_names_the_fields(self):
    with self.assertRaisesRegex(ValueError, 'alpha, loss.*first has step'):
      records.usable([{'step': 1}], 'alpha', 'loss')
    with self.assertRaisesRegex(ValueError, 'none given'):
      records.usable([], 'alpha')

  def test_groups_are_ascending_and_hold_finite_values(self):
    points = [
      {'x': 2, 'y': math.inf},
      {'x': 1, 'y': 0.5},
      {'x': 1, 'y': 0.25},
      {'x': 0},
    ]
    found = records.group(points, lambda record: -record['x'], 'y')
    self.assertEqual(list(found.items()), [(-2, []), (-1, [0.5, 0.25])])

  def test_note_counts_keys_and_values_left_out(self):
    points = [{'key': 0, 'loss': 1.0}, {'key': 0, 'loss': math.nan}, {'key': 0}]
    note = records.spread_note(points, 'loss')
    self.assertEqual(note, 'One key (random seed). Not finite: 1.')


class ShortNamesTest(absltest.TestCase):
  def test_shared_parts_are_dropped(self):
    leaves = ['net/~/a/conv/w', 'net/~/b/conv/w']
    self.assertEqual(list(records.short_names(leaves).values()), ['a', 'b'])

  def test_names_stay_different_and_not_empty(self):
    for leaves in (['w'], ['a/w', 'w'], ['a/w', 'a/v'], ['a/b/w', 'b/w'], []):
      names = records.short_names(leaves)
      self.assertLen(set(names.values()), len(leaves))
      self.assertTrue(all(names.values()))


if __name__ == '__main__':
  absltest.main()
