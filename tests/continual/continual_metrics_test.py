"""The metrics agree with published code and with their definitions."""

import math

import numpy as np
import pytest

from powerprop_jax.continual import metrics

# Five tasks, of which the third is forgotten most.
MATRIX = np.array(
  [
    [0.95, 0.20, 0.11, 0.09, 0.15],
    [0.90, 0.93, 0.12, 0.10, 0.11],
    [0.80, 0.85, 0.97, 0.21, 0.10],
    [0.82, 0.70, 0.60, 0.91, 0.13],
    [0.75, 0.66, 0.41, 0.85, 0.90],
  ]
)
UNTRAINED = np.array([0.1, 0.12, 0.08, 0.1, 0.11])


def gem(matrix, untrained):
  """The published code of GEM: final accuracy, backward, forward."""
  tasks = len(matrix)
  final = matrix[tasks - 1].sum() / tasks
  change = matrix[-1] - matrix.diagonal()
  forward = np.zeros(tasks)
  for t in range(1, tasks):
    forward[t] = matrix[t - 1, t] - untrained[t]
  return final, change.mean(), forward.mean()


@pytest.mark.parametrize('tasks', [2, 3, 5])
def test_agrees_with_the_code_of_gem(tasks):
  matrix, untrained = MATRIX[:tasks, :tasks], UNTRAINED[:tasks]
  final, backward, forward = gem(matrix, untrained)
  found = metrics.summary(matrix, untrained)
  assert found['average_accuracy'] == pytest.approx(final)
  assert found['backward_transfer_gem'] == pytest.approx(backward)
  assert found['forward_transfer_gem'] == pytest.approx(forward)
  # The two divisors differ by a factor.
  for name in ('backward_transfer', 'forward_transfer'):
    expected = (tasks - 1) / tasks * found[name]
    assert found[f'{name}_gem'] == pytest.approx(expected)


def test_without_forgetting_all_that_measures_it_is_zero():
  matrix = np.tril(np.ones((4, 4))) * np.array([0.9, 0.8, 0.7, 0.6])
  matrix[np.triu_indices(4, 1)] = np.nan
  found = metrics.summary(matrix)
  assert found['forgetting'] == found['backward_transfer'] == 0
  assert found['average_accuracy'] == found['learning_accuracy'] == 0.75


def test_what_needs_an_entry_that_was_not_measured_is_nan():
  only_last = np.full((3, 3), np.nan)
  only_last[-1] = 0.9
  found = metrics.summary(only_last, np.zeros(3))
  assert found.pop('average_accuracy') == 0.9
  assert all(math.isnan(value) for value in found.values())


def test_a_row_that_was_not_measured_does_not_hide_what_was_known_before():
  matrix = np.array(
    [[0.9, np.nan, np.nan], [np.nan, 0.8, np.nan], [0.7, 0.8, 0.9]]
  )
  assert metrics.forgetting(matrix) == pytest.approx(0.1)


def test_a_single_task_has_no_earlier_ones():
  found = metrics.summary([[0.5]], [0.1])
  assert found['average_accuracy'] == 0.5
  assert found['backward_transfer_gem'] == found['forward_transfer_gem'] == 0
  for name in ('backward_transfer', 'forward_transfer', 'forgetting'):
    assert math.isnan(found[name])


RECORDS = [
  *(
    {'tasks_learned': i + 1, 'task': j + 1, 'accuracy': MATRIX[i, j]}
    for i in range(5)
    for j in range(i + 1)
  ),
  {'tasks_learned': 1, 'density': 0.5},
  {'tasks_learned': 1, 'task': 5, 'accuracy': None},
]


def test_matrix_comes_back_from_its_records():
  expected = np.where(np.tri(5) > 0, MATRIX, np.nan)
  np.testing.assert_array_equal(metrics.accuracy_matrix(RECORDS, 5), expected)


def random_masks(num_tasks):
  generator = np.random.default_rng(0)
  draw = lambda *shape: generator.random(shape) < 0.4
  return [
    {
      'linear': {'w': draw(3, 4), 'b': draw(4) | True},
      'logits': {'w': draw(4, 2)},
    }
    for _ in range(num_tasks)
  ]


def test_capacity_agrees_with_sets_of_positions():
  masks = random_masks(6)
  found = metrics.capacity(iter(masks))
  dim, past = 20, set()
  for number, (mask, record) in enumerate(zip(masks, found, strict=True), 1):
    flat = [mask['linear']['w'].ravel(), mask['logits']['w'].ravel()]
    own = set(np.flatnonzero(np.concatenate(flat)))
    assert record['tasks_learned'] == number
    assert record['density'] == len(own) / dim
    assert record['new'] == len(own - past) / dim
    assert record['overlap'] == len(own & past) / len(own)
    past |= own
    assert record['capacity_used'] == len(past) / dim
  new = sum(record['new'] for record in found)
  assert new == pytest.approx(found[-1]['capacity_used'])


def test_overlap_of_an_empty_mask_is_unknown():
  (record,) = metrics.capacity([{'linear': {'w': np.zeros((2, 2), bool)}}])
  assert record['density'] == 0
  assert math.isnan(record['overlap'])


@pytest.mark.parametrize(
  ('call', 'named'),
  [
    (lambda: metrics.average_accuracy([0.5, 0.6]), r'shape \(2,\)'),
    (lambda: metrics.forgetting(np.zeros((2, 3))), r'shape \(2, 3\)'),
    (lambda: metrics.learning_accuracy(np.zeros((0, 0))), r'\(0, 0\)'),
    (lambda: metrics.backward_transfer([[1.0]], 'mean'), "got 'mean'"),
    (lambda: metrics.forward_transfer(MATRIX, [0.1]), 'each of the 5 tasks'),
    (lambda: metrics.accuracy_matrix([], 0), 'at least 1, got 0'),
    (lambda: metrics.accuracy_matrix(RECORDS, 2), 'there are 2 tasks'),
    (lambda: metrics.capacity(random_masks(1), lambda *_: False), 'linear/b'),
  ],
)
def test_bad_input_is_named(call, named):
  with pytest.raises(ValueError, match=named):
    call()
