"""Sparse training with Powerpropagation for JAX, Haiku and Optax.

    θ = φ |φ|^(α-1)

The latent weights φ are trained, the network computes with the effective
weights θ, and most of them end up near zero, safe to prune. See
`pp.powerprop` for the optimiser, `pp.init` and `pp.effective_params` for the
two lines that a train step needs besides, `pp.drop_in` for a loop that somebody
else owns, `pp.prune` for masks, and `pp.rigl` and its like for masks that
change during training. `pp.without_zeros` runs any function of weights without
their zeros.

What these take and give has rooms of its own:

    pp.masks          trees of booleans: count, combine, pack
    pp.distributions  how many connections each layer gets
    pp.scores         what is worth keeping
    pp.schedules      when, and how many
    pp.at_init        masks from the gradients of an untrained network
    pp.nets           networks, and layers that skip zeros
    pp.continual      many tasks in one network
    pp.costs          multiply-adds and bytes

Data sets, checkpoints, plots and command lines are in `powerprop_jax.train` and
`powerprop_jax.report.plotting`, which load heavier packages.
"""

from typing import Any

from powerprop_jax import _moved, continual, costs, nets
from powerprop_jax.core import distributions, masks, schedules, scores
from powerprop_jax.core.distributions import erk, uniform
from powerprop_jax.core.masks import Masks, apply_masks
from powerprop_jax.core.reparam import psi, psi_derivative, psi_inverse
from powerprop_jax.core.select import (
  by_regex,
  exclude,
  is_weight,
)
from powerprop_jax.core.top_k.topk import top_k_mask
from powerprop_jax.core.trees import Select
from powerprop_jax.costs.summary import selection_table, summary_table
from powerprop_jax.jaxprs.dct import with_dct
from powerprop_jax.jaxprs.observe import observe
from powerprop_jax.jaxprs.walk import leaf_axes, products
from powerprop_jax.nets.scope import power_scope
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
from powerprop_jax.optim.alphas.adaptive import adaptive_alpha
from powerprop_jax.optim.alphas.alpha import (
  AlphaController,
  near_zero_controller,
)
from powerprop_jax.optim.decay import decay_phi, decay_theta
from powerprop_jax.optim.drop_in import drop_in, sparse_start
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
from powerprop_jax.prune import at_init
from powerprop_jax.prune.iterative import (
  Cycle,
  Rewind,
  geometric_sparsities,
  iterative_pruning,
)
from powerprop_jax.prune.one_shot import prune, sweep
from powerprop_jax.sparse.network import condense, expand, without_zeros

__version__ = '0.1.0'

__all__ = (
  'Ablation',
  'AlphaController',
  'Cycle',
  'Masks',
  'PowerState',
  'Rewind',
  'Rewiring',
  'Select',
  'SparseState',
  'Topology',
  'adaptive_alpha',
  'apply_masks',
  'at_init',
  'by_regex',
  'condense',
  'continual',
  'costs',
  'current_masks',
  'decay_phi',
  'decay_theta',
  'distributions',
  'drop_in',
  'dsr',
  'effective_params',
  'erk',
  'exclude',
  'expand',
  'geometric_sparsities',
  'gradual_pruning',
  'init',
  'is_weight',
  'iterative_pruning',
  'latent_params',
  'leaf_axes',
  'masks',
  'near_zero_controller',
  'nets',
  'observe',
  'one_shot_pruning',
  'power_scope',
  'powerprop',
  'products',
  'prune',
  'psi',
  'psi_derivative',
  'psi_inverse',
  'rigl',
  'schedules',
  'scores',
  'selection_table',
  'snfs',
  'sparse_evolution',
  'sparse_start',
  'sparsify',
  'static',
  'summary_table',
  'sweep',
  'top_k_mask',
  'top_kast',
  'uniform',
  'with_alpha',
  'with_dct',
  'with_masks',
  'without_zeros',
)

_moved.keep_modules()


def __getattr__(name: str) -> Any:
  return _moved.attribute(name)
