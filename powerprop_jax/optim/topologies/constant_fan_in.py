"""Constant fan-in: every neuron of a layer has the same number of inputs.

    [in, out]                  k of the n_in = in inputs of each output
    [height, width, in, out]   k of the n_in = height · width · in

Such masks can be stored and multiplied as dense arrays [k, out]. The methods
are those of fixed, drop_grow and gradual, chosen neuron by neuron; SNFS is in
constant_fan_in_snfs.py.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, scores, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.optim.topologies import drop_grow as drop_grow_lib
from powerprop_jax.optim.topologies import fan_in, layers, neuron_ablation
from powerprop_jax.optim.topologies import gradual as gradual_lib
from powerprop_jax.optim.topologies.drop_grow import Growth
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Rewiring, Topology


def at_random(
  sparsity: float | Mapping[str, float],
  *,
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
) -> Topology:
  """Random masks with constant fan-in, drawn once.

  Args:
    sparsity: share of zeros over all selected leaves, in [0, 1), or a mapping
      {'module/name': sparsity}; rounded to whole inputs, see fan_in.fan_ins.
    distribution: shares the sparsity out between leaves.
    select: which leaves are masked.

  Returns:
    A Topology that never rewires.

  Raises:
    ValueError: if sparsity is out of range; from init, as for fan_in.fan_ins.
  """
  _check(sparsity)

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Any]:
    kept = fan_in.fan_ins(theta, sparsity, distribution, select)
    return fan_in.random_masks(key, theta, kept, select), ()

  return Topology(init, regrow='zero')


def drop_grow(
  sparsity: float | Mapping[str, float],
  when: When,
  drop_fraction: float | Schedule,
  growth: Growth,
  *,
  ablation: Ablation | None = None,
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
  replaces_step: bool = False,
) -> Topology:
  """RigL with constant fan-in (SRigL), and SET: k inputs per neuron, always.

  In a layer with N connections and a fraction f, the K = floor(f N) smallest
  |θ| of the whole layer are dropped. Then each neuron grows as many as it
  lacks, highest scores first, of all inputs that it did not keep. A neuron of
  large weights loses few of them, and one of small weights may lose all.

  With an ablation, neurons that are hardly salient lose all of their inputs
  first, and the others take over their connections; see Ablation.

  Args:
    sparsity: share of zeros over all selected leaves, in [0, 1), or a mapping
      {'module/name': sparsity}; rounded to whole inputs, see fan_in.fan_ins.
    when: the steps at which connections move.
    drop_fraction: f, share of the connections of a layer that is dropped, in
      (0, 1); or a schedule of it, in [0, 1].
    growth: drop_grow.at_random (SET), drop_grow.by_gradient (RigL), or your own
      scores.
    ablation: when neurons are removed; None for never.
    distribution: shares the sparsity out between leaves.
    select: which leaves are masked.
    replaces_step: whether weights stand still at these steps.

  Returns:
    A Topology. Without ablation every neuron keeps the k of fan_in.fan_ins.

  Raises:
    ValueError: if sparsity or drop_fraction is out of range; from init, as for
      fan_in.fan_ins.

  Note:
    All that is not kept may grow, what was just dropped too, as in drop_grow.

  Source:
    Lasby et al., Dynamic sparse training with structured sparsity, 2024
    (https://arxiv.org/abs/2305.02299), after the authors' code: the smallest
    weights of the layer go, each neuron grows by itself.
  """
  _check(sparsity)
  layers.check_fraction(drop_fraction, 'drop_fraction')
  schedule = layers.as_schedule(drop_fraction)
  counts_growth = growth is not drop_grow_lib.at_random

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Any]:
    kept = fan_in.fan_ins(theta, sparsity, distribution, select)
    return fan_in.random_masks(key, theta, kept, select), ()

  def rewire(rewiring: Rewiring) -> tuple[Masks, Any]:
    fraction = jnp.asarray(schedule(rewiring.step), jnp.float32)
    kept = fan_in.fan_ins(rewiring.theta, sparsity, distribution, select)

    def visit(
      module_name: str, name: str, theta: Params, mask: Tree, grow: Any
    ) -> jax.Array:
      if not select(module_name, name, theta):
        return mask
      start = kept[trees.join_name(module_name, name)]
      k: int | jax.Array = start
      drop = scores.magnitude(theta)
      dropped = layers.share(fraction, layers.num_active(mask))
      if ablation is not None and ablation.select(module_name, name, theta):
        merit = grow if counts_growth else None
        k = neuron_ablation.fan_ins_left(
          mask, drop, merit, dropped, start, ablation.min_salient
        )
      return fan_in.drop_and_grow(mask, drop, grow, dropped, k)

    moved = trees.map_named(
      visit, rewiring.theta, rewiring.masks, growth(rewiring)
    )
    return moved, rewiring.memory

  return Topology(
    init,
    rewire,
    when,
    replaces_step=replaces_step,
    needs_grads=counts_growth,
  )


def gradual(
  sparsity: float | Mapping[str, float],
  progress: Callable[[jax.Array], jax.Array],
  when: When,
  *,
  distribution: Distribution = distributions.uniform,
  score: Callable[[Any], Any] = scores.magnitude,
  select: Select = select_lib.is_weight,
) -> Topology:
  """Removes the lowest-scoring inputs of every neuron, more and more of them.

  Args:
    sparsity: share of zeros over all selected leaves in the end, in [0, 1), or
      a mapping {'module/name': sparsity}; rounded to whole inputs, see
      fan_in.fan_ins.
    progress: step -> share of the inputs to remove that are gone by then, in
      [0, 1], rounded down to whole inputs; 1 in the end.
    when: the steps at which inputs are removed.
    distribution: shares the sparsity out between leaves.
    score: theta -> tree of scores like theta, larger = keep.
    select: which leaves are pruned.

  Returns:
    A Topology that starts dense. An input that was removed never returns.

  Raises:
    ValueError: if sparsity is out of range; from init, as for fan_in.fan_ins.

  Source:
    The schedule is that of topologies.gradual.
  """
  _check(sparsity)

  def kept(theta: Params) -> dict[str, int]:
    return fan_in.fan_ins(theta, sparsity, distribution, select)

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Any]:
    del key
    if not jax.tree.leaves(theta):
      return theta, ()
    kept(theta)  # refuses what cannot be reached, before training
    return masks_lib.full_masks(theta), ()

  def rewire(rewiring: Rewiring) -> tuple[Masks, Any]:
    done = jnp.asarray(progress(rewiring.step), jnp.float32)
    sizes = {
      leaf.path: math.prod(leaf.value.shape[:-1])
      for leaf in trees.named_leaves(rewiring.theta)
    }
    left = {
      name: sizes[name] - gradual_lib.portion(done, sizes[name] - k)
      for name, k in kept(rewiring.theta).items()
    }
    ranked = score(rewiring.theta)
    smaller = fan_in.top_inputs(ranked, left, select, rewiring.masks)
    return smaller, rewiring.memory

  return Topology(init, rewire, when, needs_grads=False, regrow='zero')


def _check(sparsity: float | Mapping[str, float]) -> None:
  if not isinstance(sparsity, Mapping):
    masks_lib.check_sparsity(sparsity)
