"""How sparse may a task be? The search for a density in a grid.

The score is asked for at some densities, and the sparsest that meets a
threshold is kept. Nothing here knows of weights or masks.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from powerprop_jax.core import names

How = Literal['scan', 'bisect']


class Trial(NamedTuple):
  """One evaluation: the share of weights kept, and the validation score."""

  density: float
  score: float


class Found(NamedTuple):
  """The outcome of a search: what to keep, its score, and all evaluations.

  Attributes:
    met: whether the score reaches the threshold. If not, no density did that
      was tried, and this is the largest.
  """

  density: float
  score: float
  met: bool
  trials: tuple[Trial, ...]


def sparsest(
  score_at: Callable[[float], float],
  densities: Sequence[float],
  threshold: float,
  how: How = 'scan',
) -> Found:
  """The sparsest density whose score is at least the threshold.

  Args:
    densities: the grid, in any order; each in (0, 1].
    threshold: γP, the share γ of the dense score P.
    how: 'scan' goes from the densest to sparser ones, stops at the first that
      fails and keeps the one before. 'bisect' halves the grid, with at most
      floor(log2 n) + 1 evaluations for n densities. The two agree where the
      score rises with the density; where it does not, 'bisect' may keep another
      density that meets the threshold.

  Returns:
    The densest, with met = False, if even that fails.

  Example:
    >>> found = sparsest(lambda density: 2 * density, (0.1, 0.3, 0.5), 0.6)
    >>> found.density, found.score, [t.density for t in found.trials]
    (0.3, 0.6, [0.5, 0.3, 0.1])

  Source:
    Schwarz et al., Powerpropagation, 2021, Algorithm 1 (EfficientPackNet),
    lines 6 to 12; the text proposes a binary search.

  Note:
    The printed loop assigns a mask before it tests it, and ends with the first
    mask that misses γP; its "sparsity rates" s keep ⌊s·dim⌋ weights and are
    densities; and its strict > would refuse a mask that ties with the dense
    network at γ = 1. Here the last mask that met the threshold counts, with ≥.
  """
  names.check_choice('search', how, get_args(How))
  ascending = grid(densities)
  trials: list[Trial] = []

  def meets(density: float) -> bool:
    trials.append(Trial(density, score_at(density)))
    return trials[-1].score >= threshold

  if how == 'scan':
    for density in reversed(ascending):
      if not meets(density):
        break
  else:
    low, high = 0, len(ascending)
    while low < high:
      middle = (low + high) // 2
      if meets(ascending[middle]):
        high = middle
      else:
        low = middle + 1
  passed = [trial for trial in trials if trial.score >= threshold]
  # Both ways have tried the densest by now if none has passed.
  best = min(passed) if passed else max(trials)
  return Found(best.density, best.score, bool(passed), tuple(trials))


def grid(densities: Sequence[float]) -> tuple[float, ...]:
  """The densities in ascending order, each once; refuses those not in (0, 1].

  Example:
    >>> grid((0.5, 0.1, 0.5))
    (0.1, 0.5)
  """
  # str first: 0.1, not 0.10000000149, for np.float32(0.1).
  values = sorted({float(str(density)) for density in densities})
  if not values:
    raise ValueError(
      'densities must hold at least one share of weights to keep, got none.'
    )
  # NaN sorts anywhere, so look at each.
  for value in values:
    if not 0 < value <= 1:
      raise ValueError(
        f'densities must be in (0, 1], got {value}. They are shares of weights '
        'to keep; for a sparsity s write 1 - s.'
      )
  return tuple(values)


def checked_score(value: Any, where: str) -> float:
  """A score as a float; refuses what cannot be compared with γP.

  Example:
    >>> checked_score(-2.0, 'task 1')
    Traceback (most recent call last):
      ...
    ValueError: evaluate returned -2.0 for task 1. It must return a score that \
is positive and larger where the network is better, such as an accuracy; a \
loss or its negative cannot be compared with a share of the dense score.
  """
  shape = np.shape(value)
  if shape != ():
    raise ValueError(
      f'evaluate returned an array of shape {shape} for {where}. It must '
      'return one number, such as the mean accuracy.'
    )
  try:
    score = float(value)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f'evaluate returned {value!r} for {where}. It must return a number, such '
      'as an accuracy.'
    ) from error
  if not math.isfinite(score):
    raise ValueError(
      f'evaluate returned {score} for {where}. Look for a division by zero '
      'examples, or for a training that diverged.'
    )
  if score < 0:
    raise ValueError(
      f'evaluate returned {score} for {where}. It must return a score that is '
      'positive and larger where the network is better, such as an accuracy; a '
      'loss or its negative cannot be compared with a share of the dense score.'
    )
  return score
