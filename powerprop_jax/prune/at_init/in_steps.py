"""Pruning at initialisation in many steps: scores of what earlier ones left.

    iterative_snip   |θ ∂L/∂θ| of the pruned network
    force            |θ ∂L/∂θ'| of the dense θ, θ' the pruned network
    synflow_masks    SynFlow of the pruned network, without data

A step scores the network anew and keeps fewer weights than the one before, by
the same share each time ('exponential') or by the same number ('linear'). The
last one keeps exactly as many as prune does.
"""

from collections.abc import Callable, Sequence
from typing import Unpack

import jax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names as names_lib
from powerprop_jax.core import scores
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.prune import one_shot
from powerprop_jax.prune.at_init import (
  from_scores,
  gradients,
  sensitivity,
  synaptic_flow,
)
from powerprop_jax.prune.at_init.gradients import Batches, Loss
from powerprop_jax.prune.one_shot import Overridden

# The same batches at every step, or those of each step.
StepBatches = Batches | Callable[[int], Batches]


class Steps(Overridden, total=False):
  """How many weights each of several steps keeps, and where.

  The scope is 'global' by default. The density of leaves with a sparsity of
  their own falls along the same schedule.

  Attributes:
    schedule: 'exponential', the density after step k of T being ρ^((k + 1)/T),
      or 'linear'.
  """

  schedule: str


def iterative_snip(
  loss_fn: Loss,
  theta: Params,
  batches: StepBatches,
  sparsity: Sparsity,
  *,
  steps: int = 100,
  **options: Unpack[Steps],
) -> Masks:
  """Masks by SNIP in steps: a weight that is pruned never returns.

  Step k ranks |θ ∂L/∂θ| of the network that step k - 1 left. A single step is
  SNIP. Warns with a LayerCollapseWarning if a layer ends up empty.

  Args:
    loss_fn: as for snip.
    batches: as for snip, for every step; or a function of the step, counted
      from 0, that returns fresh ones.
    sparsity: share of zeros at the end; a mapping only with scope='layer'.
    steps: number of steps, at least 1.
    **options: see Steps.

  Returns:
    Masks like theta with exactly as many connections as prune keeps.

  Raises:
    ValueError: as for snip, in any step, or for masks_from_scores.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean((x @ theta['linear']['w'] - 1) ** 2)
    >>> theta = {'linear': {'w': jnp.array([[1.], [-3.], [2.]])}}
    >>> batches = [(jnp.ones((1, 3)),)]
    >>> masks = iterative_snip(loss_fn, theta, batches, 0.5, steps=2)
    >>> masks['linear']['w'].ravel()
    Array([False,  True,  True], dtype=bool)

  Source:
    de Jorge et al., Progressive skeletonization: trimming more fat from a
    network at initialization, 2021 (https://arxiv.org/abs/2006.09081).
  """
  at_step = _at_step(batches)
  select = options.get('select', select_lib.is_weight)
  score = lambda step, pruned: sensitivity.snip(
    loss_fn, pruned, at_step(step), select=select
  )
  return _in_steps(score, theta, sparsity, steps, **options)


def force(
  loss_fn: Loss,
  theta: Params,
  batches: StepBatches,
  sparsity: Sparsity,
  *,
  steps: int = 10,
  **options: Unpack[Steps],
) -> Masks:
  """Masks by FORCE: as iterative_snip, but pruned weights can return.

  Step k ranks |θ ∂L/∂θ'|, where θ are the dense weights and θ' those of the
  network that step k - 1 left, so that a weight is ranked by what it would do
  if it came back. A single step is SNIP; the authors run 60 for their results.

  Note:
    The code published with DCT-plus-sparse networks calls iterative SNIP by
    this name.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean((x @ theta['linear']['w'] - 1) ** 2)
    >>> theta = {'linear': {'w': jnp.array([[1.], [-3.], [2.]])}}
    >>> masks = force(loss_fn, theta, [(jnp.ones((1, 3)),)], 0.5, steps=2)
    >>> masks['linear']['w'].ravel()
    Array([False,  True,  True], dtype=bool)

  Source:
    de Jorge et al., as for iterative_snip, equation 7.
  """
  at_step = _at_step(batches)
  select = options.get('select', select_lib.is_weight)

  def score(step: int, pruned: Params) -> Tree:
    grads = gradients.mean_gradient(loss_fn, pruned, at_step(step))
    ranked = scores.saliency(theta, grads)
    from_scores.check_scores(ranked, 'FORCE', select)
    return ranked

  return _in_steps(score, theta, sparsity, steps, revives=True, **options)


def synflow_masks(
  apply_fn: Callable[[Params, jax.Array], jax.Array],
  theta: Params,
  input_shape: Sequence[int],
  sparsity: Sparsity,
  *,
  steps: int = 100,
  **options: Unpack[Steps],
) -> Masks:
  """Masks by SynFlow in steps, without data; arguments as for synflow.

  In a chain of layers, a layer is not emptied as long as other layers have
  weights to lose and the steps are small: a single step is no safer than
  other methods. Otherwise as iterative_snip.

  Example:
    >>> apply_fn = lambda theta, x: x @ theta['a']['w'] @ theta['b']['w']
    >>> theta = {'a': {'w': jnp.array([[1., -2.]])},
    ...          'b': {'w': jnp.array([[4.], [1.]])}}
    >>> masks = synflow_masks(apply_fn, theta, (1, 1), 0.5)
    >>> print(masks['a']['w'][0], masks['b']['w'][:, 0])
    [ True False] [ True False]

  Source:
    Tanaka et al., as for synflow, algorithm 1.
  """
  select = options.get('select', select_lib.is_weight)
  score = lambda step, pruned: synaptic_flow.synflow(
    apply_fn, pruned, input_shape, select=select
  )
  return _in_steps(score, theta, sparsity, steps, **options)


def _at_step(batches: StepBatches) -> Callable[[int], Batches]:
  if callable(batches):
    return batches
  kept = list(batches)
  return lambda step: kept


def _in_steps(
  score: Callable[[int, Params], Tree],
  theta: Params,
  sparsity: Sparsity,
  steps: int,
  *,
  schedule: str = 'exponential',
  revives: bool = False,
  **ranked: Unpack[Overridden],
) -> Masks:
  """Masks after steps that each rank score(step, θ that earlier ones left)."""
  final = from_scores.final_counts(theta, sparsity, **ranked)
  if steps < 1:
    raise ValueError(f'steps must be at least 1, got {steps}.')
  names_lib.check_choice('schedule', schedule, ('exponential', 'linear'))
  select = ranked.get('select', select_lib.is_weight)
  leaves = select_lib.selected(select, theta)
  sizes = one_shot.by_group({n: x.size for n, x in leaves.items()}, final)

  def count(name: str, share: float) -> int:
    size, last = sizes[name], final[name]
    if not last:
      return 0
    if schedule == 'linear':
      return last + round((size - last) * (1 - share))
    return max(last, round(size * (last / size) ** share))

  kept = masks_lib.full_masks(theta)
  for step in range(steps):
    kept = ranking.masks_from_counts(
      score(step, masks_lib.apply_masks(theta, kept)),
      {name: count(name, (step + 1) / steps) for name in final},
      among=None if revives else kept,
      select=select,
    )
  # The caller of the public function.
  from_scores.warn_of_collapse(kept, select, stacklevel=4)
  return kept
