"""Sparse training in one line: each is sparsify around a topology.

    tx = rigl(powerprop(optax.sgd(0.1, momentum=0.9), 2.0), 0.9, stop=7_500)

All take the optimiser first and the final sparsity second; what is left out has
the value of the paper. `topologies` has the parts to build others from.
"""

from powerprop_jax.optim.aliases.drop_grow import rigl, sparse_evolution
from powerprop_jax.optim.aliases.pruning import (
  gradual_pruning,
  one_shot_pruning,
  static,
)
from powerprop_jax.optim.aliases.rewiring import dsr, snfs, top_kast

__all__ = (
  'dsr',
  'gradual_pruning',
  'one_shot_pruning',
  'rigl',
  'snfs',
  'sparse_evolution',
  'static',
  'top_kast',
)
