"""Pruning at initialisation: which weights to train, before any training.

    loss_fn, batches ─▶ snip, grasp ─┐
                                     ├─ scores ──masks_from_scores──▶ masks
    apply_fn ─────────▶ synflow ─────┘

    iterative_snip, force, synflow_masks: the same in many steps, from all
    weights down to the sparsity.

All of it is about effective weights θ: with powerpropagation pass
effective_params(phi, opt_state). Train the masks with pp.static, which draws
random ones too. Magnitude and random scores are in pp.scores.
"""

from powerprop_jax.prune.at_init.from_scores import (
  LayerCollapseWarning,
  masks_from_scores,
)
from powerprop_jax.prune.at_init.gradients import (
  Batches,
  Loss,
  classification_loss,
  mean_curvature,
  mean_gradient,
)
from powerprop_jax.prune.at_init.in_steps import (
  force,
  iterative_snip,
  synflow_masks,
)
from powerprop_jax.prune.at_init.sensitivity import grasp, snip
from powerprop_jax.prune.at_init.synaptic_flow import (
  neutral_norm_state,
  synflow,
)

__all__ = (
  'Batches',
  'LayerCollapseWarning',
  'Loss',
  'classification_loss',
  'force',
  'grasp',
  'iterative_snip',
  'masks_from_scores',
  'mean_curvature',
  'mean_gradient',
  'neutral_norm_state',
  'snip',
  'synflow',
  'synflow_masks',
)
