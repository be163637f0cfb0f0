"""Parameters, multiply-adds and bytes, dense and sparse."""

from powerprop_jax.costs.flops import flops_table, inference_flops, model_bytes
from powerprop_jax.costs.layers import function_costs, layer_costs
from powerprop_jax.costs.summary import summary_table
from powerprop_jax.costs.training import training_flops

__all__ = [
  'flops_table',
  'function_costs',
  'inference_flops',
  'layer_costs',
  'model_bytes',
  'summary_table',
  'training_flops',
]
