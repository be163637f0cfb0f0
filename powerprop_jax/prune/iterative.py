"""Iterative magnitude pruning: prune some weights, train the rest, and again.

    θ ──score──▶ masks ──start──▶ θ⊙M ──train──▶ θ⊙M
    ▲                                             │
    └─────────────── next sparsity ───────────────┘

How a cycle is trained is the caller's business: train is any function over θ.
The procedures of the literature differ only in the point of the first training
to which a cycle goes back, which a Rewind names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
from typing import NamedTuple, Unpack

import jax
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Overrides, Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.prune import one_shot
from powerprop_jax.prune.one_shot import OverridesAt, Ranked

# From effective weights that are zero where the masks are False, the masks and
# the step at which schedules start, to trained weights with the same zeros.
Train = Callable[[Params, Masks, int], Params]


class Rewind(NamedTuple):
  """Where in the first training, of T steps, each cycle starts over.

      procedure                            value
      fine-tuning (prune and retrain)      Rewind(step=T)
      learning-rate rewinding              Rewind(step=k)
      rewinding to an early checkpoint     Rewind(step=k, theta=theta_k)
      rewinding to initialisation          Rewind(step=0, theta=theta_0)

  Attributes:
    step: where the schedules of the optimiser start; handed to train.
    theta: effective weights after that many steps, dense, to which those that
      survive return. None leaves them as they were when they were pruned.
  """

  step: int
  theta: Params = None


class Cycle(NamedTuple):
  """One cycle: masks of a sparsity, and the trained θ, zero outside of them."""

  sparsity: Sparsity
  masks: Masks
  theta: Params


def iterative_pruning(
  train: Train,
  theta: Params,
  sparsities: Sequence[Sparsity],
  rewind: Rewind,
  *,
  masks: Masks | None = None,
  score: Callable[[Params], Tree] = scores.magnitude,
  overrides: Overrides | OverridesAt | None = None,
  **ranked: Unpack[Ranked],
) -> Iterator[Cycle]:
  """Prunes to each sparsity in turn, and trains after each pruning.

  A cycle ranks the trained weights that are left, removes the lowest, goes back
  to the point that rewind names and trains. What was pruned never returns.
  A cycle is computed when the iterator comes to it:

      def train(theta, masks, step):
        tx = pp.static(make_optimizer(first_step=step), masks=masks)
        phi, opt_state = pp.init(tx, theta)
        ...
        return pp.effective_params(phi, opt_state)

      for cycle in iterative_pruning(train, theta, sparsities, Rewind(0)):
        print(cycle.sparsity, evaluate(cycle.theta))

  To go on after a cycle, pass its theta, its masks and the sparsities that
  remain.

  Args:
    train: called as train(theta, masks, step) with weights that are zero where
      the masks are False; returns them trained, in θ-space, the zeros still
      zero. It may donate theta, but not the masks.
    theta: effective weights after the first training; with rewinding to
      initialisation and a first sparsity of 0 they may be untrained. A tree
      with more than weights works too, such as (theta, net_state): leaves that
      select does not choose are never pruned, but rewound with the others.
    sparsities: at least one, strictly increasing, in [0, 1); each as for prune.
    rewind: where each cycle starts over; names the procedure.
    masks: connections that are left already; all by default.
    score: called with the trained weights of the cycle before.
    overrides: as for prune, or a function of the sparsity that returns them;
      they must fix the same leaves in every cycle.
    **ranked: scope, select; as for prune.

  Raises:
    ValueError: as for prune; also if the sparsities or the masks do not allow
      nested masks. From the iterator: if a leaf would lose all its weights, or
      train returns weights that are not finite, or not zero where pruned.

  Note:
    Frankle & Carbin prune the output layer at half the rate. To get that, let
    each of the sparsities be a mapping, or overrides a function. The state of
    the optimiser is not rewound; train starts it afresh unless it keeps it.

  Example:
    >>> theta = {'linear': {'w': jnp.array([[1., -4., 2., 3.]])}}
    >>> halve = lambda theta, masks, step: jax.tree.map(lambda t: t / 2, theta)
    >>> for cycle in iterative_pruning(halve, theta, (0.5, 0.75), Rewind(10)):
    ...   print(cycle.theta['linear']['w'])
    [[ 0.  -2.   0.   1.5]]
    [[ 0. -1.  0.  0.]]

  Source:
    Han et al., 2015 (https://arxiv.org/abs/1506.02626): fine-tuning. Frankle &
    Carbin, 2019 (https://arxiv.org/abs/1803.03635): to initialisation. Frankle
    et al., 2020 (https://arxiv.org/abs/1912.05671): to an early checkpoint.
    Renda et al., 2020 (https://arxiv.org/abs/2003.02389): learning-rate
    rewinding.
  """
  _check_rewind(rewind, theta)
  existing = masks_lib.full_masks(theta) if masks is None else masks
  masks_lib.check_same_shapes(existing, theta, 'masks', 'theta')
  masks_lib.check_boolean(existing)
  counts = one_shot.counts_of_each(theta, sparsities, overrides, **ranked)
  select = ranked.get('select', select_lib.is_weight)
  left = trees.by_path(existing)
  _check_order(
    sparsities,
    counts,
    {
      n: int(np.count_nonzero(left[n]))
      for n in select_lib.selected(select, theta)
    },
  )

  @jax.jit
  def rank(scores: Tree, existing: Masks, counts: dict[str, int]) -> Masks:
    kept = ranking.masks_from_counts(
      scores, counts, among=existing, select=select
    )
    return masks_lib.intersect(kept, existing)

  def cycles() -> Iterator[Cycle]:
    kept, current = existing, masks_lib.apply_masks(theta, existing)
    for sparsity, count in zip(sparsities, counts, strict=True):
      current_scores = score(current)
      masks_lib.check_same_shapes(current_scores, current, 'scores', 'theta')
      kept = rank(current_scores, kept, count)
      if empty := one_shot.empty_leaves(kept, select):
        raise ValueError(
          f'at sparsity {sparsity} no weight of {empty[0]!r} would be left. '
          "Rank per layer with scope='layer', give this leaf a sparsity of its "
          'own with overrides, or stop at a lower sparsity.'
        )
      start = current if rewind.theta is None else rewind.theta
      # New arrays, so that train may donate them.
      start = masks_lib.apply_masks(start, kept)
      current = train(start, kept, rewind.step)
      _check_trained(current, kept, sparsity)
      yield Cycle(sparsity, kept, current)

  return cycles()


def geometric_sparsities(
  num_cycles: int, fraction: float = 0.2
) -> tuple[float, ...]:
  """Sparsities of cycles that each remove the same share of what is left.

  s_i = 1 - (1 - fraction)^i for i = 1 … num_cycles, to twelve places. To end at
  a sparsity s, let fraction be 1 - (1 - s)^(1 / num_cycles).

  Example:
    >>> geometric_sparsities(4)
    (0.2, 0.36, 0.488, 0.5904)

  Source:
    Frankle & Carbin, The lottery ticket hypothesis, 2019, section 2
    (https://arxiv.org/abs/1803.03635): a fifth of the weights each time.
  """
  if num_cycles < 1:
    raise ValueError(f'num_cycles must be at least 1, got {num_cycles}.')
  if not 0 < fraction < 1:
    raise ValueError(
      f'fraction must be in (0, 1), got {fraction}. It is the share of the '
      'remaining weights that each cycle removes.'
    )
  sparsities = tuple(
    round(1 - (1 - fraction) ** i, 12) for i in range(1, num_cycles + 1)
  )
  if sparsities[-1] == 1:
    raise ValueError(
      f'{num_cycles} cycles that remove {fraction:g} of the weights each leave '
      'none. Take fewer cycles or a smaller fraction.'
    )
  return sparsities


def _check_rewind(rewind: Rewind, theta: Params) -> None:
  if not isinstance(rewind.step, int | np.integer):
    raise TypeError(
      f'rewind.step must be an integer, got {rewind.step!r}. It is the number '
      'of training steps to go back to.'
    )
  if rewind.step < 0:
    raise ValueError(f'rewind.step must be at least 0, got {rewind.step}.')
  if rewind.theta is not None:
    masks_lib.check_same_shapes(rewind.theta, theta, 'rewind.theta', 'theta')
    one_shot.check_finite(rewind.theta, 'rewind.theta')
  one_shot.check_finite(theta, 'theta')


def _check_order(
  sparsities: Sequence[Sparsity],
  counts: Sequence[Mapping[str, int]],
  num_existing: Mapping[str, int],
) -> None:
  """Refuses sparsities to which masks cannot be nested."""
  if not counts:
    raise ValueError('iterative_pruning needs at least one sparsity, got none.')
  for earlier, later in itertools.pairwise(sparsities):
    if isinstance(earlier, Mapping) or isinstance(later, Mapping):
      increases = earlier != later
    else:
      increases = earlier < later
    if not increases:
      raise ValueError(
        f'sparsities must increase from cycle to cycle, got {later} after '
        f'{earlier}.'
      )
  left = one_shot.by_group(num_existing, counts[0])
  for sparsity, count in zip(sparsities, counts, strict=True):
    if count.keys() != left.keys():
      raise ValueError(
        'overrides must fix the same leaves in every cycle, got '
        f'{", ".join(left)} and then {", ".join(count)}.'
      )
    for name, number in count.items():
      if number > left[name]:
        where = 'all leaves' if name == ranking.SHARED else repr(name)
        raise ValueError(
          f'sparsity {sparsity} asks for {number} weights in {where}, but only '
          f'{left[name]} are left by then. Pruned weights do not return: '
          'sparsities must increase, and go on from those of the masks.'
        )
    left = dict(count)


def _check_trained(trained: Params, kept: Masks, sparsity: Sparsity) -> None:
  """Refuses what cannot be the trained weights of a masked network."""
  what = f'the weights that train returned at sparsity {sparsity}'
  masks_lib.check_same_shapes(trained, kept, what, 'those it was given')
  one_shot.check_finite(trained, what)
  kept_by_path = trees.by_path(kept)
  for leaf in trees.named_leaves(trained):
    pruned = ~kept_by_path[leaf.path]
    if wrong := int(np.count_nonzero((leaf.value != 0) & pruned)):
      raise ValueError(
        f'{what} are not zero at {wrong} of the {np.count_nonzero(pruned)} '
        f'pruned weights of {leaf.path!r}. Let the network compute with '
        'apply_masks(theta, masks), and return weights masked the same way.'
      )
