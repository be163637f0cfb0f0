"""A race over α: successive halving with the training steps of a single run.

Which power is best for pruning to a given density is not known beforehand, and
the share of weights near zero does not tell. So several powers start together
from the same weights. After each rung of a ladder the better half goes on,
judged by what matters in the end: the accuracy on validation data after
one-shot pruning to the target density. The last one gets what is left of the
budget. All networks together take as many training steps as one run with a
fixed power, so that the final one trains on a part of the budget only: with six
candidates and final_share = 0.6 on 0.73 of it. That is the price of not being
told the power.

Early on, small powers are ahead even after pruning, because they learn faster;
later they fall behind. Powers that start together are therefore judged too
early where training is short. Branches of one trained network are not: see
methods.py.

    rungs ──▶ train every network ──▶ prune and score ──survivors──▶ …

Source: successive halving, Karnin et al., Almost optimal exploration in
multi-armed bandits, 2013; for training, Jamieson & Talwalkar, Non-stochastic
best arm identification and hyperparameter optimization, 2016
(https://arxiv.org/abs/1502.07943). Its rungs, too, have equal shares of the
budget, the last one here excepted.
"""

from collections.abc import Callable, Sequence
import math
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from powerprop_jax.files.tables import Row
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.runs.errors import UserError

# Stacked states of networks, or what distinguishes them.
S = TypeVar('S')


class Rung(NamedTuple):
  """One stretch of a race.

  Attributes:
    num_members: powers that take part.
    num_steps: training steps of each of them.
  """

  num_members: int
  num_steps: int


class Outcome(NamedTuple, Generic[S]):
  """How a race ended.

  Attributes:
    members: the power that won for each key, in the order of their powers.
    state: their stacked final states.
    verdicts: a record for each rung but the last, and network: rung, candidate
      (its power), key, accuracy and loss after pruning, and survives.
  """

  members: Members
  state: S
  verdicts: list[Row]


def rungs(
  num_candidates: int, num_steps: int, final_share: float = 0.6
) -> tuple[Rung, ...]:
  """The ladder: how many networks train for how many steps, rung by rung.

  Their number is halved, rounded up, until one is left. The last rung gets at
  least final_share of the steps, in (0, 1); the others share the rest equally.
  num_members · num_steps of all of them add up to num_steps.

  Raises:
    UserError: if an argument is out of range, or the budget has not a step for
      each network.

  Example:
    >>> [tuple(rung) for rung in rungs(6, 900)]
    [(6, 20), (3, 40), (2, 60), (1, 540)]
  """
  if num_candidates < 1:
    raise UserError(
      f'a race needs at least one candidate, got {num_candidates}.'
    )
  if not 0 < final_share < 1:
    raise UserError(f'final_share must be in (0, 1), got {final_share:g}.')
  sizes = []
  left = num_candidates
  while left > 1:
    sizes.append(left)
    left = -(-left // 2)
  # Rounded, because (1 - 0.9) · 900 is a little less than 90.
  explored = math.floor(round((1 - final_share) * num_steps, 6))
  share = explored // max(1, len(sizes))
  if num_steps < 1 or (sizes and share < num_candidates):
    raise UserError(
      f'{num_steps} training steps are too few for a race of {num_candidates} '
      f'powers with final_share {final_share:g}: each of {len(sizes)} rungs '
      f'would have {share}. Train longer, or with fewer candidates.'
    )
  ladder = [Rung(size, share // size) for size in sizes]
  spent = sum(rung.num_members * rung.num_steps for rung in ladder)
  return (*ladder, Rung(1, num_steps - spent))


def own_steps(ladder: Sequence[Rung]) -> int:
  """Training steps of the network that wins.

  Example:
    >>> own_steps(rungs(6, 900))
    660
  """
  return sum(rung.num_steps for rung in ladder)


def survivors(
  scores: Sequence[float] | np.ndarray,
  losses: Sequence[float] | np.ndarray,
  num: int,
) -> np.ndarray:
  """Which networks go on, int[num], ascending: those with the highest scores.

  Of equal scores the lower loss is better, of equal losses the lower index. One
  whose score or loss is not finite comes last.

  Example:
    >>> survivors([0.5, 0.9, 0.5, 0.9], [2.0, 1.0, 1.0, float('nan')], 2)
    array([1, 2])
  """
  score, loss = np.asarray(scores, float), np.asarray(losses, float)
  if score.shape != loss.shape or not 1 <= num <= score.size:
    raise ValueError(
      f'survivors needs a score and a loss for each network and num from 1 to '
      f'their number, got {score.size} scores, {loss.size} losses, num {num}.'
    )
  lost = ~(np.isfinite(score) & np.isfinite(loss))
  order = np.lexsort((np.where(lost, 0, loss), np.where(lost, 0, -score), lost))
  return np.sort(order[:num])


def run(
  state: S,
  members: Members,
  ladder: Sequence[Rung],
  *,
  train: Callable[[S, Members, int, int], S],
  score: Callable[[S, Members], tuple[np.ndarray, np.ndarray]],
) -> Outcome[S]:
  """Runs the race, once for every key that the members hold.

  Args:
    state: stacked states before the first step; they may be donated.
    members: every power with every key.
    train: (state, members, number of the rung, its num_steps) -> state.
    score: (state, members) -> scores and losses, one for each.

  Raises:
    ValueError: if a key has another number of networks than the first rung.
  """
  verdicts: list[Row] = []
  for number, rung in enumerate(ladder):
    counts = {int(key): int(np.sum(members.key == key)) for key in members.key}
    if set(counts.values()) != {rung.num_members}:
      raise ValueError(
        f'rung {number} is for {rung.num_members} networks of each key, got '
        f'{counts} by key.'
      )
    state = train(state, members, number, rung.num_steps)
    if number + 1 == len(ladder):
      break
    scores, losses = score(state, members)
    chosen = []
    for key in counts:
      places = np.flatnonzero(members.key == key)
      num = ladder[number + 1].num_members
      chosen.append(places[survivors(scores[places], losses[places], num)])
    indices = np.sort(np.concatenate(chosen))
    verdicts += [
      {
        'rung': number,
        'candidate': float(members.alpha[index]),
        'key': int(members.key[index]),
        'accuracy': float(scores[index]),
        'loss': float(losses[index]),
        'survives': index in indices,
      }
      for index in range(len(members.key))
    ]
    state, members = _take(state, indices), _take(members, indices)
  return Outcome(members, state, verdicts)


def _take(tree: S, indices: np.ndarray) -> S:
  return jax.tree.map(lambda x: x[indices], tree)
