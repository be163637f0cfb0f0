"""SET and RigL: now and then, move a share of each layer's connections.

Both drop the active weights of smallest magnitude. They differ in where they
grow: SET at random, RigL where the loss would gain most from a connection that
does not exist.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp

from powerprop_jax.core import scores
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.core.top_k import patterns, topk
from powerprop_jax.core.top_k.counting import Count
from powerprop_jax.core.top_k.patterns import Pattern
from powerprop_jax.core.trees import NamedLeaf, Tree
from powerprop_jax.optim.topologies import counts
from powerprop_jax.optim.topologies.counts import (
  Budget,
  Patterned,
  check_options,
)
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Rewiring, Topology

# Scores of missing connections, larger = grow first.
Growth = Callable[[Rewiring], Tree]


def at_random(rewiring: Rewiring) -> Tree:
  """Uniform scores: SET grows anywhere."""
  return scores.random(rewiring.key, rewiring.theta)


def by_gradient(rewiring: Rewiring) -> Tree:
  """|∂L/∂Θ| of the dense weights: RigL grows where the loss falls fastest."""
  return scores.gradient(rewiring.grads)


def drop_grow(
  sparsity: Sparsity,
  when: When,
  drop_fraction: float | Schedule,
  growth: Growth = at_random,
  *,
  ablation: Ablation | None = None,
  replaces_step: bool = False,
  **leaves: Unpack[Patterned],
) -> Topology:
  """Moves a fraction of each layer's connections, as SET and RigL do.

  In a layer with N connections and a fraction f, the floor(f N) smallest |θ|
  are dropped, and as many grow where nothing was kept, highest scores first: a
  weight dropped now may return now. Every layer keeps its number of connections
  for ever.

  With constant fan-in (SRigL), each neuron grows as many as it lacks of its k:
  one of large weights loses few of them, one of small weights may lose all.
  With an ablation, neurons that are hardly salient lose all of their inputs
  first, and the others take over their connections; see Ablation.

  Args:
    drop_fraction: f, in (0, 1); or a schedule of it, in [0, 1].
    growth: at_random, by_gradient, or your own scores.
    ablation: with constant fan-in, when neurons are removed; None for never.

  Note:
    Ties go to the lowest index; the authors of RigL add noise of 1e-5 to the
    magnitudes instead.

  Source:
    As for aliases.sparse_evolution and aliases.rigl; with constant fan-in after
    the code of Lasby et al.
  """
  check_options(leaves, Patterned)
  budget = Budget(sparsity, **leaves)
  pattern = budget.pattern
  if ablation is not None and pattern is not patterns.CONSTANT_FAN_IN:
    raise ValueError(
      "ablation removes neurons of layers with structure='constant_fan_in', "
      f'got structure={budget.structure!r}.'
    )
  schedule = counts.as_schedule(drop_fraction)
  counts_growth = growth is not at_random

  def rewire(rewiring: Rewiring) -> tuple[Masks, Tree]:
    fraction = jnp.asarray(schedule(rewiring.step), jnp.float32)
    start = budget.counts(rewiring.theta)

    def move(leaf: NamedLeaf, mask: jax.Array, grow: jax.Array) -> jax.Array:
      drop = scores.magnitude(leaf.value)
      layout = budget.layout(leaf.path, mask)
      mask, drop, grow = map(layout.to_neurons, (mask, drop, grow))
      active = counts.num_active(mask)
      dropped = counts.share(fraction, active)
      k: Count = start[leaf.path]
      if pattern is patterns.UNSTRUCTURED:
        # However many the masks have: someone may have replaced them.
        k, dropped = active, jnp.minimum(dropped, mask.size - active)
      elif ablation is not None and ablation.select(*leaf):
        merit = grow if counts_growth else None
        k = ablation.fan_ins_left(mask, drop, merit, dropped, start[leaf.path])
      moved = drop_and_grow(mask, drop, grow, dropped, k, pattern)
      return layout.from_neurons(moved)

    moved = counts.map_masks(move, budget.select, rewiring, growth(rewiring))
    return moved, rewiring.memory

  return Topology(
    lambda key, theta: (budget.random_masks(key, theta), ()),
    rewire,
    when,
    replaces_step=replaces_step,
    needs_grads=counts_growth,
  )


def drop_and_grow(
  mask: jax.Array,
  drop_scores: jax.Array,
  grow_scores: jax.Array,
  num_dropped: jax.Array,
  count: Count,
  pattern: Pattern = patterns.UNSTRUCTURED,
) -> jax.Array:
  """Moves connections of one layer, so that every group has count of them.

  The connections with the lowest drop_scores go, num_dropped in the whole
  layer; those of groups that are to have none go first. A group that still has
  more than count keeps its best; one that has fewer grows where its grow_scores
  are highest, of all that is not kept.

  Args:
    mask: the connections of the layer, booleans of any shape; the scores are
      floats of that shape.
    num_dropped: int32 scalar.
    count: how many each group has in the end, an int or int32 of shape [] or
      [groups]. Without groups at least as many as stay.

  Example:
    >>> drop_and_grow(jnp.array([True, True, False, False]),
    ...               jnp.array([2., 1., 0., 0.]),
    ...               jnp.array([0., 1., 3., 2.]), 1, 2)
    Array([ True, False,  True, False], dtype=bool)
    >>> mask = jnp.array([[True, True], [True, True], [False, False]])
    >>> magnitude = jnp.array([[5., 1.], [4., 2.], [0., 0.]])
    >>> gradient = jnp.array([[0., 0.], [0., 1.], [9., 9.]])
    >>> drop_and_grow(mask, magnitude, gradient, 2, 2,
    ...               patterns.CONSTANT_FAN_IN).astype(int)
    Array([[1, 0],
           [1, 1],
           [0, 1]], dtype=int32)

  Source:
    Evci et al., Rigging the lottery, 2020, section 3(3) and (4), with the
    candidates for growth as in the authors' code: everything that is not kept.
  """
  num_left = counts.num_active(mask) - num_dropped
  if pattern is patterns.UNSTRUCTURED:
    kept = topk.top_k_mask(drop_scores, num_left, among=mask)
  else:
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), mask.shape[-1:])
    stays = jnp.expand_dims(count > 0, tuple(range(mask.ndim - 1)))
    kept = topk.top_k_mask(drop_scores, num_left, among=mask & stays)
    kept = pattern.top_k(drop_scores, count, kept)
    num_left = pattern.num_active(kept)
  return kept | pattern.top_k(grow_scores, count - num_left, ~kept)
