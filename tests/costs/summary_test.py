import math
import pickle

from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.core import select as select_lib
from powerprop_jax.costs import summary
from powerprop_jax.files import tables

_THETA = {
  'net/~/linear_0': {
    'b': np.zeros(2, np.float32),
    'w': np.array([[3.0, 0.0], [-4.0, 5e-4], [0.1, -0.2]], np.float32),
  },
  'net/~/linear_1': {
    'b': np.ones(1, np.float32),
    'w': np.array([[1.0], [2.0]], np.float32),
  },
}
_MASKS = {
  'net/~/linear_0': {
    'b': np.ones(2, bool),
    'w': np.array([[True, True], [True, False], [False, False]]),
  },
  'net/~/linear_1': {'b': np.ones(1, bool), 'w': np.array([[False], [True]])},
}


class SummaryTest(parameterized.TestCase):
  def test_rows_are_the_leaves_then_selected_and_total(self):
    rows = summary.summary(_THETA)
    leaves = [f'net/~/linear_{i}/{name}' for i in (0, 1) for name in 'bw']
    self.assertEqual(
      [row['leaf'] for row in rows], [*leaves, 'selected', 'total']
    )
    self.assertEqual(
      [row['selected'] for row in rows], [False, True, False, True, True, None]
    )
    self.assertEqual([row['size'] for row in rows], [2, 6, 1, 2, 8, 11])
    self.assertEqual(rows[1]['shape'], '3×2')
    # Without masks zeros count as removed, in selected leaves only.
    self.assertEqual([row['kept'] for row in rows], [2, 5, 1, 2, 7, 10])

  def test_masks_decide_what_is_kept_and_measured(self):
    rows = summary.summary(_THETA, _MASKS)
    weights, together = rows[1], rows[4]
    fields = ('kept', 'sparsity', 'near_zero', 'mean_abs', 'norm')
    np.testing.assert_allclose(
      [weights[field] for field in fields], [3, 0.5, 1 / 3, 7 / 3, 5]
    )
    self.assertEqual((together['kept'], together['sparsity']), (4, 0.5))
    self.assertAlmostEqual(together['norm'], math.sqrt(29))

  def test_alpha_turns_latent_weights_into_effective_ones(self):
    rows = summary.summary(_THETA, alpha=2.0)
    self.assertAlmostEqual(rows[3]['mean_abs'], 2.5)
    self.assertAlmostEqual(rows[2]['mean_abs'], 1.0)  # a bias stays as it is

  def test_half_precision_and_empty_leaves_are_measured(self):
    theta = {'a': {'w': jnp.ones((2, 2), jnp.bfloat16), 'b': jnp.ones(0)}}
    rows = summary.summary(theta)
    self.assertEqual(rows[1]['norm'], 2.0)
    self.assertTrue(math.isnan(rows[0]['sparsity']))

  def test_what_does_not_fit_is_refused(self):
    wide = {'b': np.ones(1), 'w': np.ones((1, 2))}
    for settings, message in (
      (dict(masks=_MASKS | {'net/~/linear_1': wide}), r'ear_1/w.*\(1, 2\)'),
      (dict(masks={'net/~/linear_0': _MASKS['net/~/linear_0']}), 'same struct'),
      (dict(select=select_lib.by_regex('embeddings')), 'net/~/linear_0/w'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        summary.summary(_THETA, **settings)


class TextTest(parameterized.TestCase):
  def test_table_lines_up_and_has_a_line_for_each_row(self):
    lines = summary.summary_table(_THETA, _MASKS).split('\n')
    self.assertLen(lines, 7)
    end = lines[0].index('size') + 3
    for line in lines[1:]:
      self.assertIn(line[end], '0123456789')
      self.assertEqual(line, line.rstrip())

  def test_columns_are_the_union_of_the_keys(self):
    text = tables.text_table([{'a_b': 1}, {'c': 2.5}])
    self.assertEqual(text.split('\n'), ['a b    c', '  1    -', '  -  2.5'])
    self.assertEqual(tables.text_table([]), '')

  @parameterized.parameters(
    ([1.0, 1.5], ['1.0', '1.5']),
    ([0, 0.5], ['0.0', '0.5']),
    ([0.98123456, 1.0], ['0.9812', '1.0000']),
    ([1e-7, 1.0], ['1e-07', '1']),
    ([math.nan, 2.0], ['nan', '2']),
    ([None, True, False], ['-', 'yes', '-']),
    ([50000, 3], ['50,000', '3']),
    ([np.float32(0.5), np.int64(2000)], ['0.5', '2,000.0']),
  )
  def test_numbers_of_a_column_share_their_decimals(self, values, expected):
    self.assertEqual(tables.format_column(values), expected)

  def test_a_column_of_numbers_is_recognised(self):
    self.assertTrue(tables.is_numeric([1, 2.0, None]))
    for values in ([None], [True], [1, 'w']):
      self.assertFalse(tables.is_numeric(values))


def test_a_notebook_shows_tables_as_tables():
  formatters = pytest.importorskip('IPython.core.formatters')
  table = summary.summary_table(_THETA, _MASKS)
  selection = summary.selection_table(select_lib.is_weight, {'<a>': _THETA})
  for text, first in ((table, '<th scope="col">leaf'), (selection, 'selected')):
    found, _ = formatters.DisplayFormatter().format(text)
    page = found['text/html']
    assert first in page and '<a>' not in page
    assert page.count('<tr>') == len(text.splitlines()) - (text is selection)
    assert found['text/plain'] == str(text)
  assert '<p>' in page
  again = pickle.loads(pickle.dumps(table))
  assert (again, again._repr_html_()) == (table, table._repr_html_())
