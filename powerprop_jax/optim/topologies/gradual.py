"""Magnitude pruning while training: from dense to sparse, at once or in steps.

Weights only leave. Each time, those of the lowest scores among the survivors
go, until as many are left as the schedule says.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, ranking, scores, topk, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import When
from powerprop_jax.core.trees import Params, Select
from powerprop_jax.optim.topologies import layers
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topology import Rewiring, Topology

Scope = Literal['layer', 'global']
_SCOPES = ('layer', 'global')


def gradual(
  sparsity: float | Mapping[str, float],
  progress: Callable[[jax.Array], jax.Array],
  when: When,
  *,
  scope: Scope = 'layer',
  distribution: Distribution = distributions.uniform,
  score: Callable[[Any], Any] = scores.magnitude,
  normalise: bool = False,
  select: Select = select_lib.is_weight,
) -> Topology:
  """Removes the lowest-scoring weights, more and more of them.

  Args:
    sparsity: share of zeros over all selected leaves in the end, in [0, 1), or,
      per layer, a mapping {'module/name': sparsity}.
    progress: step -> share of that sparsity to have by then, in [0, 1]; 1 in
      the end, when the number of weights left is exact.
    when: the steps at which weights are removed.
    scope: 'layer' ranks the weights of each leaf by themselves, 'global' all of
      them together, where every leaf keeps at least its best weight.
    distribution: per layer, shares the sparsity out between leaves.
    score: theta -> tree of scores like theta, larger = keep.
    normalise: divide the scores of each leaf by their Euclidean norm, which
      matters with scope='global' only.
    select: which leaves are pruned.

  Returns:
    A Topology that starts dense. A weight that was removed never returns.

  Raises:
    ValueError: if an argument is out of range; from init, if a leaf would lose
      all its weights.

  Note:
    JaxPruner normalises by default when it prunes globally; the literature that
    it compares with does not say so, and here it is off.

  Source:
    Zhu & Gupta, To prune, or not to prune, 2017
    (https://arxiv.org/abs/1710.01878).
  """
  if scope not in _SCOPES:
    raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")
  if isinstance(sparsity, Mapping):
    if scope == 'global':
      raise ValueError(
        "scope='global' takes one sparsity for all leaves, got a mapping. Use "
        "scope='layer', or a number."
      )
  else:
    masks_lib.check_sparsity(sparsity)

  def kept(theta: Params) -> dict[str, int]:
    if isinstance(sparsity, Mapping) or scope == 'layer':
      return layers.kept_counts(theta, sparsity, distribution, select)
    sizes = _sizes(theta, select)
    count = masks_lib.num_kept(sum(sizes.values()), sparsity)
    if count < len(sizes):
      raise ValueError(
        f'sparsity {sparsity} would keep {count} weights for {len(sizes)} '
        'leaves, so that some would lose all of theirs. Lower the sparsity.'
      )
    return {ranking.SHARED: count}

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Any]:
    del key
    if not jax.tree.leaves(theta):
      return theta, ()
    kept(theta)  # refuses what cannot be reached, before training
    return masks_lib.full_masks(theta), ()

  def rewire(rewiring: Rewiring) -> tuple[Masks, Any]:
    sizes = _sizes(rewiring.theta, select)
    sizes[ranking.SHARED] = sum(sizes.values())
    done = jnp.asarray(progress(rewiring.step), jnp.float32)
    counts = {
      name: sizes[name] - portion(done, sizes[name] - count)
      for name, count in kept(rewiring.theta).items()
    }
    ranked = score(rewiring.theta)
    if normalise:
      ranked = jax.tree.map(_normalised, ranked)
    if scope == 'global':
      ranked = trees.map_selected(
        _with_best_on_top, select, ranked, rewiring.masks
      )
    smaller = ranking.masks_from_counts(
      ranked, counts, among=rewiring.masks, select=select
    )
    return smaller, rewiring.memory

  return Topology(init, rewire, when, needs_grads=False, regrow='zero')


def _sizes(theta: Params, select: Select) -> dict[str, int]:
  leaves = trees.named_leaves(theta)
  return {leaf.path: leaf.value.size for leaf in leaves if select(*leaf)}


def portion(done: jax.Array, count: int) -> jax.Array:
  """A share of count, rounded down; all of it, exactly, where done is 1."""
  whole = jnp.asarray(count, jnp.int32)
  return jnp.where(done >= 1, whole, layers.share(done, whole))


def _normalised(x: jax.Array) -> jax.Array:
  norm = jnp.sqrt(jnp.sum(jnp.square(x)))
  return x / jnp.where(norm == 0, jnp.ones_like(norm), norm)


def _with_best_on_top(ranked: jax.Array, mask: jax.Array) -> jax.Array:
  """Ranks the best weight left in a leaf above those of all others."""
  return jnp.where(topk.top_k_mask(ranked, 1, among=mask), jnp.inf, ranked)
