"""The inputs of each neuron: how many, which, and how a layer moves them.

A neuron is an index of the last axis of a leaf, and its inputs are the entries
there: n_in = in for a weight [in, out], height · width · in for a kernel
[height, width, in, out]. These are the pieces of constant_fan_in.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, scores, topk, topk_columns, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Params, Select
from powerprop_jax.optim.topologies import layers
from powerprop_jax.optim.topologies.layers import Distribution

# num_kept rounds up to whole parts of an input, so that what is nearest shows.
_PARTS = 2**20


def fan_ins(
  theta: Params,
  sparsity: float | Mapping[str, float],
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
) -> dict[str, int]:
  """How many inputs each neuron of each selected leaf keeps.

  The whole number nearest to density · n_in, halves up, and at least 1. So the
  density of a leaf is rounded to a multiple of 1 / n_in: with 784 inputs and a
  sparsity of 0.98 it is 16 / 784. Leaves of few inputs may be much denser than
  was asked for: 12 inputs at a sparsity of 0.99 keep 1, which is 8 %.

  Args:
    theta: parameters, or their shapes.
    sparsity: share of zeros over all selected leaves, in [0, 1), to be shared
      out by distribution; or a mapping {'module/name': sparsity}.
    distribution: such as distributions.erk.
    select: which leaves are masked; of rank 1 or more.

  Returns:
    {'module/name': k}, each in [1, n_in]; empty for a tree without leaves.

  Raises:
    ValueError: as for layers.leaf_sparsities, or if a selected leaf is a
      scalar.

  Example:
    >>> theta = {'a': {'w': jnp.ones((784, 10))}, 'b': {'w': jnp.ones((4, 5))}}
    >>> fan_ins(theta, 0.98, distributions.equal_per_layer)
    {'a/w': 14, 'b/w': 4}
    >>> fan_ins(theta, {'a/w': 0.98, 'b/w': 0.9})
    {'a/w': 16, 'b/w': 1}
  """
  shapes = {x.path: jnp.shape(x.value) for x in trees.named_leaves(theta)}
  by_leaf = layers.leaf_sparsities(theta, sparsity, distribution, select)
  found = {}
  for name, share in by_leaf.items():
    if not shapes[name]:
      raise ValueError(
        f'{name!r} is a scalar and has no neurons. Leave it out of select.'
      )
    size = math.prod(shapes[name][:-1])
    parts = masks_lib.num_kept(_PARTS * size, share)
    found[name] = max(1, (2 * parts + _PARTS) // (2 * _PARTS))
  return found


def random_masks(
  key: jax.Array,
  theta: Params,
  fan_ins: Mapping[str, int],
  select: Select = select_lib.is_weight,
) -> Masks:
  """Masks with an exact number of inputs per neuron, drawn uniformly.

  Args:
    key: PRNG key.
    theta: parameters, for structure, shapes and shardings.
    fan_ins: {'module/name': k} of the selected leaves.
    select: which leaves are masked.

  Returns:
    Masks like theta, True on leaves that are not selected; the same on any
    number of devices.

  Example:
    >>> theta = {'a': {'w': jnp.ones((5, 4))}}
    >>> masks = random_masks(jax.random.key(0), theta, {'a/w': 2})
    >>> masks['a']['w'].sum(axis=0)
    Array([2, 2, 2, 2], dtype=int32)
  """
  if not jax.tree.leaves(theta):
    return theta
  return top_inputs(scores.random(key, theta), fan_ins, select)


def top_inputs(
  ranked: Any,
  kept: Mapping[str, int | jax.Array],
  select: Select,
  among: Masks | None = None,
) -> Masks:
  """Masks that keep the best inputs of every neuron.

  Args:
    ranked: tree of scores like the parameters, larger = keep.
    kept: {'module/name': k} of the selected leaves; each an int, or int32 of
      shape [] or [neurons] that may be traced.
    select: which leaves are masked.
    among: masks like ranked; only inputs where they are True are kept.

  Returns:
    Masks like ranked, True for unselected leaves.

  Example:
    >>> ranked = {'w': jnp.array([[1., 4.], [2., 3.]])}
    >>> top_inputs(ranked, {'w': 1}, select_lib.is_weight)['w'].astype(int)
    Array([[0, 1],
           [1, 0]], dtype=int32)
  """
  if among is None:
    among = masks_lib.full_masks(ranked)

  def visit(
    module_name: str, name: str, value: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    if not select(module_name, name, value):
      return eligible
    k = kept[trees.join_name(module_name, name)]
    return topk_columns.top_k_columns(value, k, among=eligible)

  return trees.map_named(visit, ranked, among)


def drop_and_grow(
  mask: jax.Array,
  drop_scores: jax.Array,
  grow_scores: jax.Array,
  num_dropped: jax.Array,
  fan_in: int | jax.Array,
) -> jax.Array:
  """Moves connections of one layer, so that every neuron has fan_in of them.

  The connections with the lowest drop_scores go, num_dropped in all; those of
  neurons that are to have none go first. A neuron that still has more than
  fan_in keeps its best; one that has fewer grows where its grow_scores are
  highest.

  Args:
    mask: the connections of the layer, booleans [..., neurons].
    drop_scores: floats of the same shape; the lowest active ones go.
    grow_scores: floats of the same shape; the highest ones not kept come.
    num_dropped: how many go, int32 scalar.
    fan_in: k, an int or int32 [neurons]; at most n_in, 0 for a neuron that is
      removed.

  Returns:
    The new mask, with exactly fan_in connections for every neuron.

  Example:
    >>> mask = jnp.array([[True, True], [True, True], [False, False]])
    >>> magnitude = jnp.array([[5., 1.], [4., 2.], [0., 0.]])
    >>> gradient = jnp.array([[0., 0.], [0., 1.], [9., 9.]])
    >>> drop_and_grow(mask, magnitude, gradient, 2, 2).astype(int)
    Array([[1, 0],
           [1, 1],
           [0, 1]], dtype=int32)
  """
  wanted = jnp.broadcast_to(jnp.asarray(fan_in, jnp.int32), mask.shape[-1:])
  stays = beside(wanted > 0, mask)
  kept = topk.top_k_mask(
    drop_scores, layers.num_active(mask) - num_dropped, among=mask & stays
  )
  kept = topk_columns.top_k_columns(drop_scores, wanted, among=kept)
  missing = wanted - num_inputs(kept)
  return kept | topk_columns.top_k_columns(grow_scores, missing, among=~kept)


def num_inputs(mask: jax.Array) -> jax.Array:
  """How many inputs each neuron of a mask [..., neurons] has, int32."""
  return jnp.sum(mask, tuple(range(mask.ndim - 1)), dtype=jnp.int32)


def beside(values: jax.Array, layer: jax.Array) -> jax.Array:
  """One value for each neuron, with the rank of a layer."""
  return jnp.expand_dims(values, tuple(range(layer.ndim - 1)))
