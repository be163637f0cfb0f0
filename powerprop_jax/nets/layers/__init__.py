"""Layers: what our networks are made of, and Haiku's with sparse weights."""

from powerprop_jax.nets.layers.basic import (
  WEIGHT_INIT,
  Conv2D,
  avg_pool,
  check_images,
  conv,
  dropout,
  flatten,
  linear,
  max_pool,
  norm,
)

__all__ = (
  'WEIGHT_INIT',
  'Conv2D',
  'avg_pool',
  'check_images',
  'conv',
  'dropout',
  'flatten',
  'linear',
  'max_pool',
  'norm',
)
