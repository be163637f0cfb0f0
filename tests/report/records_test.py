import math

import pytest

from powerprop_jax.report import records


def test_means_are_over_all_other_fields():
  points = [
    {'alpha': alpha, 'sparsity': sparsity, 'key': key, 'accuracy': alpha * key}
    for alpha in (2.0, 1.0)
    for sparsity in (0.9, 0.0)
    for key in (1, 3)
  ]
  assert records.pivot(points) == [
    {'sparsity': 0.0, 'alpha 1': 2.0, 'alpha 2': 4.0},
    {'sparsity': 0.9, 'alpha 1': 2.0, 'alpha 2': 4.0},
  ]
  assert records.pivot([]) == []


def test_combinations_not_measured_are_none_and_nan_is_not_hidden():
  points = [
    {'alpha': 1, 'sparsity': 0.5, 'accuracy': 0.25},
    {'alpha': 2, 'sparsity': 0.9, 'accuracy': math.nan},
    {'alpha': 2, 'sparsity': 0.9, 'accuracy': 0.5},
    {'alpha': 2, 'sparsity': 0.9, 'accuracy': None},
    {'alpha': 2},
  ]
  first, second = records.pivot(points)
  assert first == {'sparsity': 0.5, 'alpha 1': 0.25, 'alpha 2': None}
  assert math.isnan(second['alpha 2'])


def test_records_without_a_field_are_passed_over_and_none_is_an_error():
  points = [{'step': 1, 'loss': None}, {'step': 2}]
  assert records.usable(points, 'step', 'loss') == points[:1]
  with pytest.raises(ValueError, match=r'alpha, loss.*first has step'):
    records.usable([{'step': 1}], 'alpha', 'loss')
  with pytest.raises(ValueError, match='none given'):
    records.usable([], 'alpha')


def test_groups_are_ascending_and_hold_finite_values():
  points = [{'x': 2, 'y': math.inf}, {'x': 1, 'y': 0.5}, {'x': 1, 'y': 0.25}]
  found = records.group([*points, {'x': 0}], lambda r: -r['x'], 'y')
  assert list(found.items()) == [(-2, []), (-1, [0.5, 0.25])]


@pytest.mark.parametrize(
  'leaves', [['w'], ['a/w', 'w'], ['a/w', 'a/v'], ['a/b/w', 'b/w'], []]
)
def test_short_names_stay_different_and_not_empty(leaves):
  names = records.short_names(leaves)
  assert len(set(names.values())) == len(leaves) and all(names.values())
  leaves = ['net/~/a/conv/w', 'net/~/b/conv/w']
  assert list(records.short_names(leaves).values()) == ['a', 'b']
