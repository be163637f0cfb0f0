"""Sparse training with Powerpropagation for JAX, Haiku and Optax.

    θ = φ |φ|^(α-1)

The latent weights φ are trained, the network computes with the effective
weights θ, and most of them end up near zero, safe to prune. See
`pp.powerprop` for the optimiser, `pp.init` and `pp.effective_params` for the
two lines that a train step needs besides, `pp.prune` for masks, and `pp.rigl`
and its like for masks that change during training.

Data sets, checkpoints, plots and command lines are in `powerprop_jax.train` and
`powerprop_jax.report.plotting`, which load heavier packages.
"""

# Arrays and trees.
from powerprop_jax.core.distributions import (
  equal_per_filter,
  equal_per_layer,
  er,
  erk,
  uniform,
)
from powerprop_jax.core.masks import (
  Masks,
  apply_masks,
  density,
  full_masks,
  intersect,
  num_kept,
  overlap,
  pack_masks,
  union,
  unpack_masks,
)
from powerprop_jax.core.reparam import psi, psi_derivative, psi_inverse
from powerprop_jax.core.schedules import (
  at,
  constant,
  every,
  never,
  one_shot,
  polynomial,
)
from powerprop_jax.core.scores import (
  gradient,
  magnitude,
  movement,
  random,
  saliency,
)
from powerprop_jax.core.select import (
  by_regex,
  exclude,
  is_weight,
  selection_table,
)
from powerprop_jax.core.topk import top_k_mask, top_k_masks
from powerprop_jax.core.topk_columns import top_k_columns
from powerprop_jax.core.trees import Select

# Reports.
from powerprop_jax.costs.flops import flops_table, inference_flops, model_bytes
from powerprop_jax.costs.layers import layer_costs
from powerprop_jax.costs.summary import summary_table
from powerprop_jax.costs.training import training_flops

# Networks.
from powerprop_jax.nets.condensed import (
  CondensedConv2D,
  CondensedLinear,
  condense,
  expand,
  faster_supports,
  supports,
)
from powerprop_jax.nets.dct import DctConv2D, DctLinear
from powerprop_jax.nets.scope import power_scope

# Optimisation.
from powerprop_jax.optim.adaptive import adaptive_alpha
from powerprop_jax.optim.aliases import (
  dsr,
  gradual_pruning,
  one_shot_pruning,
  rigl,
  snfs,
  sparse_evolution,
  static,
  top_kast,
)
from powerprop_jax.optim.alpha import (
  AlphaController,
  AlphaState,
  near_zero_controller,
  next_alpha,
)
from powerprop_jax.optim.decay import decay_phi, decay_theta
from powerprop_jax.optim.powerprop import PowerState, powerprop
from powerprop_jax.optim.sparsify import sparsify
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Rewiring, SparseState, Topology
from powerprop_jax.optim.views import (
  current_masks,
  effective_params,
  init,
  latent_params,
  with_alpha,
  with_masks,
)

# Pruning.
from powerprop_jax.prune.at_init import (
  LayerCollapseWarning,
  classification_loss,
  force,
  grasp,
  iterative_snip,
  masks_from_scores,
  neutral_norm_state,
  snip,
  synflow,
  synflow_masks,
)
from powerprop_jax.prune.iterative import (
  Cycle,
  Rewind,
  geometric_sparsities,
  iterative_pruning,
)
from powerprop_jax.prune.one_shot import prune, sweep

__version__ = '0.1.0'

__all__ = (
  'Ablation',
  'AlphaController',
  'AlphaState',
  'CondensedConv2D',
  'CondensedLinear',
  'Cycle',
  'DctConv2D',
  'DctLinear',
  'LayerCollapseWarning',
  'Masks',
  'PowerState',
  'Rewind',
  'Rewiring',
  'Select',
  'SparseState',
  'Topology',
  'adaptive_alpha',
  'apply_masks',
  'at',
  'by_regex',
  'classification_loss',
  'condense',
  'constant',
  'current_masks',
  'decay_phi',
  'decay_theta',
  'density',
  'dsr',
  'effective_params',
  'equal_per_filter',
  'equal_per_layer',
  'er',
  'erk',
  'every',
  'exclude',
  'expand',
  'faster_supports',
  'flops_table',
  'force',
  'full_masks',
  'geometric_sparsities',
  'gradient',
  'gradual_pruning',
  'grasp',
  'inference_flops',
  'init',
  'intersect',
  'is_weight',
  'iterative_pruning',
  'iterative_snip',
  'latent_params',
  'layer_costs',
  'magnitude',
  'masks_from_scores',
  'model_bytes',
  'movement',
  'near_zero_controller',
  'neutral_norm_state',
  'never',
  'next_alpha',
  'num_kept',
  'one_shot',
  'one_shot_pruning',
  'overlap',
  'pack_masks',
  'polynomial',
  'power_scope',
  'powerprop',
  'prune',
  'psi',
  'psi_derivative',
  'psi_inverse',
  'random',
  'rigl',
  'saliency',
  'selection_table',
  'snfs',
  'snip',
  'sparse_evolution',
  'sparsify',
  'static',
  'summary_table',
  'supports',
  'sweep',
  'synflow',
  'synflow_masks',
  'top_k_columns',
  'top_k_mask',
  'top_k_masks',
  'top_kast',
  'training_flops',
  'uniform',
  'union',
  'unpack_masks',
  'with_alpha',
  'with_masks',
)
