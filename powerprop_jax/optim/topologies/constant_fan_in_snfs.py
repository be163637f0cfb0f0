"""SNFS with constant fan-in: layers exchange whole inputs per neuron.

As snfs, but a layer can only gain or lose an input for all of its neurons at
once, which is as many connections as it has neurons.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.optim.topologies import (
  allocation,
  constant_fan_in,
  fan_in,
  layers,
)
from powerprop_jax.optim.topologies import snfs as snfs_lib
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topologies.snfs import SparseMomentum
from powerprop_jax.optim.topology import Rewiring, Topology


def snfs(
  sparsity: float | Mapping[str, float],
  when: When,
  drop_fraction: float | Schedule = 0.5,
  *,
  momentum: float = 0.9,
  second_moment: float | None = None,
  redistribute: bool = True,
  distribution: Distribution = distributions.uniform,
  select: Select = select_lib.is_weight,
  replaces_step: bool = False,
) -> Topology:
  """Drops by magnitude, grows by momentum, the same fan-in within each layer.

  Steps 1 to 5 are those of snfs.snfs and say how many connections each layer
  should have. whole_fan_ins makes whole inputs per neuron of that. Then each
  layer drops its smallest |θ|, as many as step 2 says, and each neuron grows
  what it lacks where |m| is largest.

  Args:
    sparsity: share of zeros over all selected leaves, in [0, 1), or a mapping
      {'module/name': sparsity} to start from; rounded to whole inputs, see
      fan_in.fan_ins.
    when: as for snfs.snfs.
    drop_fraction: likewise.
    momentum: likewise.
    second_moment: likewise.
    redistribute: False to leave every layer its fan-in for ever.
    distribution: shares the sparsity out between leaves at the start.
    select: which leaves are masked.
    replaces_step: whether weights stand still at these steps.

  Returns:
    A Topology whose memory is a snfs.SparseMomentum. The number of connections
    never exceeds that of the start, and falls short of it by less than the
    neurons of the widest layer; what is left over is shared out again the next
    time.

  Raises:
    ValueError: as for snfs.snfs; from init, as for fan_in.fan_ins.
  """
  base = snfs_lib.snfs(
    sparsity,
    when,
    drop_fraction,
    momentum=momentum,
    second_moment=second_moment,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  is_adaptive = second_moment is not None
  schedule = layers.as_schedule(drop_fraction)

  def init(key: jax.Array, theta: Params) -> tuple[Masks, SparseMomentum]:
    kept = fan_in.fan_ins(theta, sparsity, distribution, select)
    _, memory = base.init(key, theta)
    return fan_in.random_masks(key, theta, kept, select), memory

  def rewire(rewiring: Rewiring) -> tuple[Masks, SparseMomentum]:
    memory, masks = rewiring.memory, rewiring.masks
    ranked = snfs_lib.steadiness(memory, is_adaptive)
    start = fan_in.fan_ins(rewiring.theta, sparsity, distribution, select)
    names = tuple(start)
    counts, sizes = allocation.counts_and_sizes(masks, names)
    neurons = _num_neurons(rewiring.theta, names)
    total = sum(k * n for k, n in zip(start.values(), neurons, strict=True))
    share = snfs_lib.importances(ranked, masks, names)
    fraction = jnp.asarray(schedule(rewiring.step), jnp.float32)
    dropped = snfs_lib.num_to_drop(fraction, counts, sizes, share)
    left = counts - dropped
    grown, missing = snfs_lib.exact_growth(
      total - jnp.sum(left), memory.correction, share, sizes - left
    )
    inputs = whole_fan_ins(left + grown, jnp.asarray(neurons, jnp.int32))
    plans = dict(zip(names, zip(dropped, inputs, strict=True), strict=True))

    def visit(
      module_name: str, name: str, theta: Params, mask: Tree, grow: Any
    ) -> jax.Array:
      if not select(module_name, name, theta):
        return mask
      num_dropped, k = plans[trees.join_name(module_name, name)]
      drop = scores.magnitude(theta)
      return fan_in.drop_and_grow(mask, drop, grow, num_dropped, k)

    moved = trees.map_named(visit, rewiring.theta, masks, ranked)
    return moved, snfs_lib.corrected(memory, missing)

  if not redistribute:
    alone = constant_fan_in.drop_grow(
      sparsity,
      when,
      drop_fraction,
      lambda rewiring: snfs_lib.steadiness(rewiring.memory, is_adaptive),
      distribution=distribution,
      select=select,
      replaces_step=replaces_step,
    )
    return alone._replace(init=init, observe=base.observe)
  return base._replace(init=init, rewire=rewire)


def whole_fan_ins(counts: jax.Array, neurons: jax.Array) -> jax.Array:
  """Whole inputs per neuron, near to given numbers of connections.

  Rounded down, but to 1 at least. If these are too many connections, layers
  give up an input each, first those that are furthest above what they should
  have. What is left over goes the other way, to those furthest below, one input
  at most to each and as long as it suffices for all neurons of the layer.

  Args:
    counts: how many connections each layer should have, int32[L]; their sum is
      at least that of neurons.
    neurons: how many neurons it has, int32[L].

  Returns:
    int32[L], at least 1. The connections are at most the sum of counts, and
    fewer by less than the neurons of the widest layer.

  Example:
    >>> whole_fan_ins(jnp.array([25, 19]), jnp.array([10, 4]))
    Array([2, 5], dtype=int32)
  """
  total = jnp.sum(counts)
  exact = counts.astype(jnp.float32) / neurons.astype(jnp.float32)

  def rest(inputs: jax.Array) -> jax.Array:
    return total - jnp.sum(inputs * neurons)

  def one_less(inputs: jax.Array) -> jax.Array:
    above = jnp.where(inputs > 1, inputs.astype(jnp.float32) - exact, -jnp.inf)
    return inputs.at[jnp.argmax(above)].add(-1)

  def can_grow(inputs: jax.Array) -> jax.Array:
    return (inputs * neurons < counts) & (neurons <= rest(inputs))

  def one_more(inputs: jax.Array) -> jax.Array:
    below = exact - inputs.astype(jnp.float32)
    below = jnp.where(can_grow(inputs), below, -jnp.inf)
    return inputs.at[jnp.argmax(below)].add(1)

  inputs = jnp.maximum(counts // neurons, 1)
  inputs = jax.lax.while_loop(lambda x: rest(x) < 0, one_less, inputs)
  found: jax.Array = jax.lax.while_loop(
    lambda x: jnp.any(can_grow(x)), one_more, inputs
  )
  return found


def _num_neurons(theta: Params, names: tuple[str, ...]) -> list[int]:
  shapes = {leaf.path: leaf.value.shape for leaf in trees.named_leaves(theta)}
  return [shapes[name][-1] for name in names]
