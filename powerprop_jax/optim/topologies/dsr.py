"""DSR: one threshold for all layers, and connections that change layers.

Weights below the threshold are dropped wherever they are. As many are grown at
random, most in the layers that kept most. The threshold follows the number that
it dropped.
"""

import operator
from typing import Unpack

import jax
import jax.numpy as jnp

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import scores
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import When
from powerprop_jax.core.top_k import ranking, topk
from powerprop_jax.core.trees import NamedLeaf, Params
from powerprop_jax.optim.topologies import allocation, counts
from powerprop_jax.optim.topologies.counts import Budget, Leaves, check_options
from powerprop_jax.optim.topology import Rewiring, Topology

_TOLERANCE = 0.1
# Halving and doubling end here, where float32 still has room on both sides.
_LOWEST, _HIGHEST = 1e-30, 1e30


def dsr(
  sparsity: Sparsity,
  when: When,
  *,
  num_dropped: int = 600,
  threshold: float = 1e-3,
  replaces_step: bool = False,
  **leaves: Unpack[Leaves],
) -> Topology:
  """Drops the weights below a global threshold, grows as many at random.

  A rewiring drops all connections with |θ| < H. Their number goes back to the
  layers in proportion to the connections that each has left, to random places
  that had none. Then H is halved if more than 1.1 N were dropped, and doubled
  if fewer than 0.9 N.

  Args:
    sparsity: what to start from, and the distribution likewise.
    num_dropped: N, how many connections a rewiring should drop in all layers
      together, at least 1; 400_000 for ResNet-50.
    threshold: H at the start, greater than 0; H stays between 1e-30 and 1e30.

  Returns:
    A Topology whose memory is H, a float32 scalar. The total number of
    connections never changes; those of each leaf do, and are at least one.

  Raises:
    ValueError: from init, if there are not num_dropped connections to drop.

  Note:
    The authors start from equal densities. From those, extremely sparse
    networks do worse: docs/results/sparse_training.md.
    A layer whose weights are all below H keeps its largest one; the authors'
    code keeps the first. It rounds shares at random, here the total is settled
    by largest remainders (see allocation). Where all places that had no
    connection are taken, dropped connections return.

  Source:
    Algorithm 1 of the paper, see aliases.dsr; the defaults are those of its
    code.
  """
  check_options(leaves, Leaves)
  budget = Budget(sparsity, **leaves)
  select = budget.select
  if operator.index(num_dropped) < 1:
    raise ValueError(f'num_dropped must be at least 1, got {num_dropped}.')
  if not _LOWEST <= threshold <= _HIGHEST:
    raise ValueError(
      f'threshold must be in [{_LOWEST}, {_HIGHEST}], got {threshold}.'
    )

  def init(key: jax.Array, theta: Params) -> tuple[Masks, jax.Array]:
    start = budget.counts(theta)
    spare = sum(start.values()) - len(start)
    if start and spare < num_dropped:
      raise ValueError(
        f'num_dropped is {num_dropped:,}, but of {sum(start.values()):,} '
        f'connections in {len(start)} leaves, each of which keeps one, only '
        f'{spare:,} can be dropped. Choose a smaller num_dropped.'
      )
    masks = budget.random_masks(key, theta)
    return masks, jnp.asarray(threshold, jnp.float32)

  def rewire(rewiring: Rewiring) -> tuple[Masks, jax.Array]:
    limit, old = rewiring.memory, rewiring.masks

    def surviving(leaf: NamedLeaf, mask: jax.Array) -> jax.Array:
      return _at_least(leaf.value, limit, mask)

    survivors = counts.map_masks(surviving, select, rewiring)
    names = select_lib.selected_names(select, rewiring.theta)
    before, sizes = counts.held(old, names)
    left, _ = counts.held(survivors, names)
    dropped = jnp.sum(before - left)
    # First to where nothing was; to where something was if that is too little.
    grown = allocation.allocate(dropped, left, sizes - before)
    grown += allocation.allocate(
      dropped - jnp.sum(grown), left, sizes - left - grown
    )
    drawn = jax.tree.map(
      lambda score, mask: jnp.where(mask, score, score + 1),
      scores.random(rewiring.key, rewiring.theta),
      old,
    )
    new = ranking.masks_from_counts(
      drawn,
      dict(zip(names, grown, strict=True)),
      among=jax.tree.map(jnp.logical_not, survivors),
      select=select,
    )
    return masks_lib.union(survivors, new), _adapted(
      limit, dropped, num_dropped
    )

  return Topology(
    init, rewire, when, replaces_step=replaces_step, needs_grads=False
  )


def _at_least(theta: jax.Array, limit: jax.Array, mask: jax.Array) -> jax.Array:
  """The connections of a layer with |θ| ≥ limit; the largest if none has."""
  size = jnp.abs(theta.astype(jnp.float32))
  return mask & ((size >= limit) | topk.top_k_mask(size, 1, among=mask))


def _adapted(limit: jax.Array, dropped: jax.Array, target: int) -> jax.Array:
  """The next threshold, which should drop about target connections."""
  count = dropped.astype(jnp.float32)
  is_high = count > (1 + _TOLERANCE) * target
  is_low = count < (1 - _TOLERANCE) * target
  factor = jnp.where(is_high, 0.5, jnp.where(is_low, 2.0, 1.0))
  return jnp.clip(limit * factor.astype(jnp.float32), _LOWEST, _HIGHEST)
