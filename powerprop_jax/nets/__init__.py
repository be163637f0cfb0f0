"""Networks in Haiku, and ψ inside a Haiku function."""

from powerprop_jax.nets.alexnet import AlexNetS
from powerprop_jax.nets.cnn import CifarCNN, MnistCNN
from powerprop_jax.nets.lenet import LeNet5, LeNet300100
from powerprop_jax.nets.mlp import OneHiddenMLP
from powerprop_jax.nets.registry import NAMES, make
from powerprop_jax.nets.resnet import ResNet50
from powerprop_jax.nets.scope import power_scope
from powerprop_jax.nets.vgg import VGG
from powerprop_jax.nets.wide_resnet import WideResNet

__all__ = (
  'NAMES',
  'VGG',
  'AlexNetS',
  'CifarCNN',
  'LeNet5',
  'LeNet300100',
  'MnistCNN',
  'OneHiddenMLP',
  'ResNet50',
  'WideResNet',
  'make',
  'power_scope',
)
