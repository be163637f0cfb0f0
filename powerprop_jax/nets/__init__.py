"""Networks in Haiku, and ψ inside a Haiku function."""

from powerprop_jax.nets.alexnet import AlexNetS
from powerprop_jax.nets.cnn import CifarCNN, MnistCNN
from powerprop_jax.nets.lenet import LeNet5, LeNet300100
from powerprop_jax.nets.mlp import OneHiddenMLP
from powerprop_jax.nets.registry import NAMES, make
from powerprop_jax.nets.scope import power_scope

__all__ = (
  'NAMES',
  'AlexNetS',
  'CifarCNN',
  'LeNet5',
  'LeNet300100',
  'MnistCNN',
  'OneHiddenMLP',
  'make',
  'power_scope',
)
