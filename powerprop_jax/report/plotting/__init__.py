"""Figures; the only folder that imports matplotlib. No global state is kept.

Functions take the flat records of results.json or metrics.jsonl and return a
matplotlib Figure; `save` writes it. How they all look is in style.py.
"""

from powerprop_jax.report import extras

if message := extras.lack('matplotlib'):
  raise ImportError(message)

from powerprop_jax.report.plotting.accuracy import (
  accuracy_against_density,
  accuracy_against_sparsity,
)
from powerprop_jax.report.plotting.alpha import (
  accuracy_by_method,
  alpha_over_steps,
  histograms_by_method,
  near_zero_over_steps,
)
from powerprop_jax.report.plotting.features import class_specialisation
from powerprop_jax.report.plotting.propagation import signal_propagation
from powerprop_jax.report.plotting.speed import speed_ups
from powerprop_jax.report.plotting.style import save
from powerprop_jax.report.plotting.supports import accuracy_by_support
from powerprop_jax.report.plotting.training import (
  layer_densities,
  learning_curves,
  mask_churn,
)
from powerprop_jax.report.plotting.weights import (
  mask_overlap,
  near_zero,
  weight_histograms,
)

__all__ = [
  'accuracy_against_density',
  'accuracy_against_sparsity',
  'accuracy_by_method',
  'accuracy_by_support',
  'alpha_over_steps',
  'class_specialisation',
  'histograms_by_method',
  'layer_densities',
  'learning_curves',
  'mask_churn',
  'mask_overlap',
  'near_zero',
  'near_zero_over_steps',
  'save',
  'signal_propagation',
  'speed_ups',
  'weight_histograms',
]
