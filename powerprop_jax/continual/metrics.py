"""How well a network learned a stream of tasks, and how much of it that took.

All begin with the accuracy matrix R, [T, T]: R[i, j] is the test score on task
j after training through task i, and `untrained`, b, [T], the score of the
untrained network on each. Tasks count from 1 in formulas and records, rows and
columns from 0 in arrays. What was not measured is NaN, and so is every mean
that would need it. A matrix that is not square is refused with a ValueError.

The divisor D of a transfer is 'paper', T-1, the number of earlier tasks, or
'gem', T, as the code of GEM averages, with a zero for the last task:
BWT(gem) = BWT(paper) (T-1)/T. With the former a single task has the transfer
NaN.

Source:
  Lopez-Paz & Ranzato, Gradient episodic memory, 2017, section 4, and the
  authors' code.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Select

Divisor = Literal['paper', 'gem']


def accuracy_matrix(
  records: Iterable[Mapping[str, Any]], num_tasks: int
) -> np.ndarray:
  """R from flat records, float64[T, T].

  Of records with tasks_learned (i) and task (j), both from 1, and accuracy;
  others are passed over. An accuracy of None is NaN.

  Example:
    >>> accuracy_matrix([{'tasks_learned': 1, 'task': 1, 'accuracy': 0.5},
    ...                  {'tasks_learned': 2, 'task': 1, 'accuracy': 0.25}], 2)
    array([[0.5 ,  nan],
           [0.25,  nan]])
  """
  if num_tasks < 1:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}.')
  matrix = np.full((num_tasks, num_tasks), np.nan)
  for record in records:
    if not {'tasks_learned', 'task', 'accuracy'} <= set(record):
      continue
    row, column = record['tasks_learned'], record['task']
    if not (1 <= row <= num_tasks and 1 <= column <= num_tasks):
      raise ValueError(
        f'there are {num_tasks} tasks, but a record is about task {column} '
        f'after {row}; both count from 1.'
      )
    value = record['accuracy']
    matrix[row - 1, column - 1] = np.nan if value is None else value
  return matrix


def average_accuracy(matrix: ArrayLike) -> float:
  """Mean score on all tasks after the last one, mean_j R[T, j].

  Example:
    >>> average_accuracy([[0.9, 0.1], [0.5, 0.7]])
    0.6
  """
  return _mean(_checked(matrix)[-1])


def backward_transfer(matrix: ArrayLike, divisor: Divisor = 'paper') -> float:
  """What later tasks did to earlier ones, Σ_{j<T} (R[T, j] - R[j, j]) / D.

  Negative if tasks were forgotten.

  Example:
    >>> matrix = [[0.9, 0.1], [0.5, 0.7]]
    >>> backward_transfer(matrix), backward_transfer(matrix, 'gem')
    (-0.4, -0.2)
  """
  matrix = _checked(matrix)
  return _mean((matrix[-1] - matrix.diagonal())[:-1], divisor)


def forward_transfer(
  matrix: ArrayLike, untrained: ArrayLike, divisor: Divisor = 'paper'
) -> float:
  """What earlier tasks did for later ones, Σ_{j≥2} (R[j-1, j] - b_j) / D.

  Example:
    >>> matrix, untrained = [[0.9, 0.3], [0.5, 0.7]], [0.1, 0.1]
    >>> forward_transfer(matrix, untrained, 'gem')
    0.1
  """
  matrix = _checked(matrix)
  before = np.asarray(untrained, np.float64)
  if before.shape != matrix.shape[:1]:
    raise ValueError(
      f'untrained must have a score for each of the {len(matrix)} tasks, got '
      f'the shape {before.shape}.'
    )
  return _mean(np.diagonal(matrix, 1) - before[1:], divisor)


def forgetting(matrix: ArrayLike) -> float:
  """Mean over j < T of max_{i<T} R[i, j] - R[T, j].

  The maximum is over what was measured. 0 if nothing was forgotten, NaN for a
  single task.

  Example:
    >>> forgetting([[0.9, 0.1], [0.5, 0.7]])
    0.4

  Source:
    Chaudhry et al., Riemannian walk for incremental learning, 2018, section 3.
  """
  matrix = _checked(matrix)
  earlier = matrix[:-1, :-1]
  measured = np.where(np.isnan(earlier), -np.inf, earlier)
  best = np.max(measured, axis=0, initial=-np.inf)
  best = np.where(np.isfinite(best), best, np.nan)
  return _mean(best - matrix[-1, :-1])


def learning_accuracy(matrix: ArrayLike) -> float:
  """Mean score on each task right after it was learned, mean_j R[j, j].

  Example:
    >>> learning_accuracy([[0.9, 0.1], [0.5, 0.7]])
    0.8

  Source:
    Riemer et al., Learning to learn without forgetting, 2019.
  """
  return _mean(_checked(matrix).diagonal())


def summary(
  matrix: ArrayLike, untrained: ArrayLike | None = None
) -> dict[str, float]:
  """All of the above, as a flat record.

  Returns:
    average_accuracy, learning_accuracy, forgetting, and backward_transfer and,
    if untrained is given, forward_transfer, with the divisor of the paper and,
    as …_gem, with GEM's.

  Example:
    >>> summary([[0.9, 0.1], [0.5, 0.7]])['average_accuracy']
    0.6
  """
  found = {
    'average_accuracy': average_accuracy(matrix),
    'learning_accuracy': learning_accuracy(matrix),
    'forgetting': forgetting(matrix),
    'backward_transfer': backward_transfer(matrix),
    'backward_transfer_gem': backward_transfer(matrix, 'gem'),
  }
  if untrained is not None:
    found['forward_transfer'] = forward_transfer(matrix, untrained)
    found['forward_transfer_gem'] = forward_transfer(matrix, untrained, 'gem')
  return found


def capacity(
  masks: Iterable[Masks], select: Select = select_lib.is_weight
) -> list[dict[str, Any]]:
  """How much of the network each task took, and how much it shares.

  Args:
    masks: the forward masks M¹, M², … of the tasks in their order; may be a
      generator, they are looked at one by one.
    select: which leaves are shared between tasks.

  Returns:
    A record for each task, with tasks_learned from 1 and shares of the selected
    weights, dim of them: density = |M^t|/dim, what it uses; new = |M^t ∧
    ¬(M^1 ∨ … ∨ M^(t-1))|/dim, what it takes of the free ones; capacity_used =
    |M^1 ∨ … ∨ M^t|/dim; and overlap = |M^t ∧ (M^1 ∨ … ∨ M^(t-1))|/|M^t|, the
    share of its own mask that earlier tasks own, NaN for an empty mask.

  Example:
    >>> first = {'linear': {'w': np.array([[True, True, False, False]])}}
    >>> second = {'linear': {'w': np.array([[False, True, True, False]])}}
    >>> for record in capacity([first, second]):
    ...   print(record['new'], record['overlap'], record['capacity_used'])
    0.5 0.0 0.5
    0.25 0.5 0.75
  """
  records: list[dict[str, Any]] = []
  past: dict[str, np.ndarray] = {}
  for number, tree in enumerate(masks, start=1):
    mask = {
      path: np.asarray(leaf, bool)
      for path, leaf in masks_lib.selected(tree, select).items()
    }
    past = past or {path: np.zeros_like(m) for path, m in mask.items()}
    masks_lib.check_same_shapes(past, mask, 'the first mask', f'mask {number}')
    dim = sum(m.size for m in mask.values())
    kept = sum(int(m.sum()) for m in mask.values())
    shared = sum(int((m & past[path]).sum()) for path, m in mask.items())
    past = {path: m | past[path] for path, m in mask.items()}
    records.append(
      {
        'tasks_learned': number,
        'density': kept / dim,
        'new': (kept - shared) / dim,
        'overlap': shared / kept if kept else float('nan'),
        'capacity_used': sum(int(m.sum()) for m in past.values()) / dim,
      }
    )
  return records


def _checked(matrix: ArrayLike) -> np.ndarray:
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
    raise ValueError(
      'the accuracy matrix must have a row and a column for each task, got the '
      f'shape {matrix.shape}.'
    )
  return matrix


def _mean(values: np.ndarray, divisor: Divisor = 'paper') -> float:
  """Mean, rounded to twelve places; with 'gem', one zero more is counted."""
  names.check_choice('divisor', divisor, get_args(Divisor))
  count = len(values) + (divisor == 'gem')
  return round(float(np.sum(values)) / count, 12) if count else float('nan')
