"""Figures; the only folder that imports matplotlib. No global state is kept.

Functions take the flat records of results.json or metrics.jsonl and return a
matplotlib Figure, which a notebook shows; `save` writes it, and within `paper`
it is drawn for one. `title` says what was trained on what. A record may have a
key beside what a function names: lines are means over keys. How they all look
is in style.py.
"""

from powerprop_jax.files import extras

if message := extras.lack('matplotlib'):
  raise ImportError(message)

from powerprop_jax.report.plotting.accuracy import (
  accuracy_against_density,
  accuracy_against_sparsity,
)
from powerprop_jax.report.plotting.style import paper, save
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
  'layer_densities',
  'learning_curves',
  'mask_churn',
  'mask_overlap',
  'near_zero',
  'paper',
  'save',
  'weight_histograms',
]
