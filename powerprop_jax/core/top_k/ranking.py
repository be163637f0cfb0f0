"""Masks from scores and counts: how many weights a leaf, or all, may keep."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.layouts import LeafAxes
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import patterns, topk
from powerprop_jax.core.top_k.counting import Count
from powerprop_jax.core.top_k.patterns import Pattern
from powerprop_jax.core.trees import NamedLeaf, Select, Tree

# The key of the count that all leaves without one of their own share.
SHARED = '*'


def masks_from_counts(
  scores: Tree,
  counts: Mapping[str, Count],
  *,
  among: Masks | None = None,
  select: Select = select_lib.is_weight,
  pattern: Pattern = patterns.UNSTRUCTURED,
  axes: LeafAxes | None = None,
) -> Masks:
  """Masks that keep a given number of the largest scores.

  Args:
    counts: {'module/name': count} of the leaves that are ranked by themselves,
      for each group of the pattern, and {SHARED: count} of all the others
      together; Python integers, or int32 scalars that may be traced.
    among: masks like scores; only weights where they are True are kept, which
      may then be fewer than the count.
    select: the one the counts were made with; masks of other leaves are True.
    axes: of leaves whose names do not say them, for a pattern; see layouts.

  Example:
    >>> scores = {'a': {'w': jnp.array([[1., 4.]])},
    ...           'b': {'w': jnp.array([[3., 5.]])}}
    >>> masks_from_counts(scores, {SHARED: 2})['b']['w']
    Array([[False,  True]], dtype=bool)
    >>> masks_from_counts(scores, {'a/w': 0, 'b/w': 2})['b']['w']
    Array([[ True,  True]], dtype=bool)
  """
  leaves = select_lib.selected(select, scores)
  shared = [name for name in leaves if name not in counts]
  unknown = [name for name in counts if name not in (*leaves, SHARED)]
  if unknown or bool(shared) != (SHARED in counts):
    raise ValueError(
      f'counts for {", ".join(counts)} do not fit the selected leaves '
      f'{", ".join(leaves)}. Make them with the same select.'
    )
  eligible = dict.fromkeys(leaves) if among is None else trees.by_path(among)
  kept = {}
  for name, leaf in leaves.items():
    if name not in shared:
      layout, allowed = pattern.layout(name, leaf.shape, axes), eligible[name]
      if allowed is not None:
        allowed = layout.to_neurons(allowed)
      best = pattern.top_k(layout.to_neurons(leaf), counts[name], allowed)
      kept[name] = layout.from_neurons(best)
  if shared:
    # A list, so that ties are broken in the order of the leaves of the tree.
    ranked = [leaves[name] for name in shared]
    allowed = None if among is None else [eligible[name] for name in shared]
    together = topk.top_k_masks(ranked, counts[SHARED], allowed)
    kept.update(zip(shared, together, strict=True))

  def mask_of(leaf: NamedLeaf) -> jax.Array:
    if leaf.path in kept:
      return kept[leaf.path]
    return jnp.ones_like(leaf.value, dtype=bool)

  return trees.map_leaves(mask_of, scores)
