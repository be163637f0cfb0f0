"""SET and RigL: now and then, move a share of each layer's connections.

Both drop the active weights of smallest magnitude. They differ in where they
grow: SET at random, RigL where the loss would gain most from a connection that
does not exist.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, scores, topk
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.optim.topologies import layers
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topology import Rewiring, Topology

# Scores of missing connections, larger = grow first.
Growth = Callable[[Rewiring], Any]


def at_random(rewiring: Rewiring) -> Any:
  """Uniform scores: SET grows anywhere."""
  return scores.random(rewiring.key, rewiring.theta)


def by_gradient(rewiring: Rewiring) -> Tree:
  """|∂L/∂Θ| of the dense weights: RigL grows where the loss falls fastest."""
  return scores.gradient(rewiring.grads)


def drop_grow(
  sparsity: float | Mapping[str, float],
  when: When,
  drop_fraction: float | Schedule,
  growth: Growth,
  *,
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
  replaces_step: bool = False,
) -> Topology:
  """Moves a fraction of each layer's connections, as SET and RigL do.

  Every layer keeps its number of connections for ever.

  Args:
    sparsity: share of zeros over all selected leaves, in [0, 1), or a mapping
      {'module/name': sparsity}.
    when: the steps at which connections move.
    drop_fraction: share of the active connections of a layer that is dropped,
      in (0, 1); or a schedule of it, in [0, 1].
    growth: at_random, by_gradient, or your own scores.
    distribution: shares the sparsity out between leaves.
    select: which leaves are masked.
    replaces_step: whether weights stand still at these steps.

  Returns:
    A Topology.

  Raises:
    ValueError: if sparsity or drop_fraction is out of range; from init, if a
      leaf would lose all its weights.

  Note:
    Ties go to the lowest index; the authors of RigL add noise of 1e-5 to the
    magnitudes instead.

  Source:
    Mocanu et al., Scalable training of artificial neural networks with adaptive
    sparse connectivity, 2018 (https://arxiv.org/abs/1707.04780); Evci et al.,
    Rigging the lottery, 2020, algorithm 1 (https://arxiv.org/abs/1911.11134).
  """
  if not isinstance(sparsity, Mapping):
    masks_lib.check_sparsity(sparsity)
  layers.check_fraction(drop_fraction, 'drop_fraction')
  schedule = layers.as_schedule(drop_fraction)

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Any]:
    counts = layers.kept_counts(theta, sparsity, distribution, select)
    return layers.random_masks(key, theta, counts, select), ()

  def rewire(rewiring: Rewiring) -> tuple[Masks, Any]:
    fraction = schedule(rewiring.step)
    moved = layers.map_masks(
      lambda mask, theta, grow: drop_and_grow(
        mask, scores.magnitude(theta), grow, fraction
      ),
      select,
      rewiring.theta,
      rewiring.masks,
      growth(rewiring),
    )
    return moved, rewiring.memory

  return Topology(
    init,
    rewire,
    when,
    replaces_step=replaces_step,
    needs_grads=growth is not at_random,
  )


def drop_and_grow(
  mask: jax.Array,
  drop_scores: jax.Array,
  grow_scores: jax.Array,
  fraction: float | jax.Array,
) -> jax.Array:
  """Moves a fraction of the connections of one layer.

  Drops the active weights with the lowest drop_scores, then activates as many
  of those that are not kept, highest grow_scores first. A weight dropped now
  may return now. The number of active weights does not change.

  Args:
    mask: the connections of the layer, booleans of any shape.
    drop_scores: floats of the same shape; the lowest active ones go.
    grow_scores: floats of the same shape; the highest ones not kept come.
    fraction: share of the active weights to drop, in [0, 1]; rounded down to a
      number of weights, and to the number of free places.

  Returns:
    The new mask.

  Example:
    >>> drop_and_grow(jnp.array([True, True, False, False]),
    ...               jnp.array([2., 1., 0., 0.]),
    ...               jnp.array([0., 1., 3., 2.]), 0.5)
    Array([ True, False,  True, False], dtype=bool)

  Source:
    Evci et al., Rigging the lottery, 2020, section 3(3) and (4), with the
    candidates for growth as in the authors' code: everything that is not kept.
  """
  active = layers.num_active(mask)
  moved = layers.share(jnp.asarray(fraction, jnp.float32), active)
  moved = jnp.minimum(moved, mask.size - active)
  survivors = topk.top_k_mask(drop_scores, active - moved, among=mask)
  return survivors | topk.top_k_mask(grow_scores, moved, among=~survivors)
