"""Pruning procedures that live outside a train step."""

from powerprop_jax.prune.one_shot import (
  kept_counts,
  masks_from_counts,
  prune,
  sweep,
)

__all__ = ('kept_counts', 'masks_from_counts', 'prune', 'sweep')
