"""Weights without their zeros: index, products, kernels, and what pays."""

from powerprop_jax.sparse.memory import keep_memory
from powerprop_jax.sparse.tuning import Tuned, tune

__all__ = ('Tuned', 'keep_memory', 'tune')
