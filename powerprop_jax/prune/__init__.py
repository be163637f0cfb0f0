"""Pruning procedures that live outside a train step."""

from powerprop_jax.prune.iterative import (
  Cycle,
  Rewind,
  geometric_sparsities,
  iterative_pruning,
)
from powerprop_jax.prune.one_shot import (
  kept_counts,
  masks_from_counts,
  prune,
  sweep,
)

__all__ = (
  'Cycle',
  'Rewind',
  'geometric_sparsities',
  'iterative_pruning',
  'kept_counts',
  'masks_from_counts',
  'prune',
  'sweep',
)
