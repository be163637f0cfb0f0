"""Magnitude pruning while training: from dense to sparse, at once or in steps.

Weights only leave. Each time, those of the lowest scores among the survivors
go, until as many are left as the schedule says.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Unpack, get_args

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, names, scores, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import When
from powerprop_jax.core.top_k import patterns, ranking, topk
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.optim.topologies import counts
from powerprop_jax.optim.topologies.counts import (
  Budget,
  Patterned,
  check_options,
)
from powerprop_jax.optim.topology import Rewiring, Topology

Scope = Literal['layer', 'global']


def gradual(
  sparsity: Sparsity,
  progress: Callable[[jax.Array], jax.Array],
  when: When,
  *,
  scope: Scope = 'layer',
  score: Callable[[Params], Tree] = scores.magnitude,
  normalise: bool = False,
  **leaves: Unpack[Patterned],
) -> Topology:
  """Removes the lowest-scoring weights, more and more of them.

  Args:
    sparsity: share of zeros in the end; a mapping only per layer.
    progress: step -> share of that sparsity to have by then, in [0, 1]; 1 in
      the end, when the number of weights left is exact. With constant fan-in,
      share of the inputs to remove, rounded down to whole ones.
    scope: 'layer', or 'global', where every leaf keeps at least its best
      weight.
    score: theta -> tree of scores like theta.
    normalise: divide the scores of each leaf by their Euclidean norm, with
      scope='global'; within a leaf it changes no ranking.
    **leaves: see Patterned. With constant fan-in the inputs of each neuron are
      ranked by themselves; the distribution is used per layer.

  Returns:
    A Topology that starts dense. A weight that was removed never returns.

  Note:
    JaxPruner normalises by default when it prunes globally; the literature that
    it compares with does not say so, and here it is off.

  Source:
    As for aliases.gradual_pruning.
  """
  leaves.setdefault('distribution', distributions.uniform)
  check_options(leaves, Patterned)
  budget = Budget(sparsity, **leaves)
  pattern, select = budget.pattern, budget.select
  names.check_choice('scope', scope, get_args(Scope))
  if scope == 'global' and pattern is not patterns.UNSTRUCTURED:
    raise ValueError(
      "structure='constant_fan_in' ranks the inputs of each neuron by "
      f"themselves, got scope={scope!r}. Use scope='layer'."
    )
  if scope == 'global' and isinstance(sparsity, Mapping):
    raise ValueError(
      "scope='global' takes one sparsity for all leaves, got a mapping. Use "
      "scope='layer', or a number."
    )

  def sizes_of(theta: Params) -> dict[str, int]:
    """How many weights a group of each leaf has, and all leaves together."""
    shapes = budget.shapes(theta)
    chosen = select_lib.selected(select, theta)
    sizes = {path: pattern.groups(shapes[path])[1] for path in chosen}
    return {**sizes, ranking.SHARED: sum(sizes.values())}

  def kept(theta: Params) -> dict[str, int]:
    if isinstance(sparsity, Mapping) or scope == 'layer':
      return budget.counts(theta)
    sizes = sizes_of(theta)
    count = masks_lib.num_kept(sizes[ranking.SHARED], sparsity)
    if count < len(sizes) - 1:
      raise ValueError(
        f'sparsity {sparsity} would keep {count} weights for {len(sizes) - 1} '
        'leaves, so that some would lose all of theirs. Lower the sparsity.'
      )
    return {ranking.SHARED: count}

  def init(key: jax.Array, theta: Params) -> tuple[Masks, tuple[()]]:
    del key
    if not jax.tree.leaves(theta):
      return theta, ()
    kept(theta)  # refuses what cannot be reached, before training
    return masks_lib.full_masks(theta), ()

  def rewire(rewiring: Rewiring) -> tuple[Masks, Tree]:
    sizes = sizes_of(rewiring.theta)
    done = jnp.asarray(progress(rewiring.step), jnp.float32)
    left = {
      name: sizes[name] - _portion(done, sizes[name] - count)
      for name, count in kept(rewiring.theta).items()
    }
    ranked = score(rewiring.theta)
    if scope == 'global':
      if normalise:
        ranked = jax.tree.map(_normalised, ranked)
      ranked = trees.map_selected(
        _with_best_on_top, select, ranked, rewiring.masks
      )
    smaller = ranking.masks_from_counts(
      ranked,
      left,
      among=rewiring.masks,
      select=select,
      pattern=pattern,
      axes=budget.axes,
    )
    return smaller, rewiring.memory

  return Topology(init, rewire, when, needs_grads=False, regrow='zero')


def _portion(done: jax.Array, count: int) -> jax.Array:
  """A share of count, rounded down; all of it, exactly, where done is 1."""
  whole = jnp.asarray(count, jnp.int32)
  return jnp.where(done >= 1, whole, counts.share(done, whole))


def _normalised(x: jax.Array) -> jax.Array:
  norm = jnp.sqrt(jnp.sum(jnp.square(x)))
  return x / jnp.where(norm == 0, jnp.ones_like(norm), norm)


def _with_best_on_top(ranked: jax.Array, mask: jax.Array) -> jax.Array:
  """Ranks the best weight left in a leaf above those of all others."""
  return jnp.where(topk.top_k_mask(ranked, 1, among=mask), jnp.inf, ranked)
