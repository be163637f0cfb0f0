"""Networks in Haiku, layers with a cosine transform, ψ inside a function.

A network is a Haiku module, made with num_classes, the size of the last axis of
its logits, and perhaps the name of the module; calling it with images
[N, H, W, C] and is_training gives logits [N, num_classes]. `make` has them
ready, by name.
"""

from powerprop_jax.nets.alexnet import AlexNetS
from powerprop_jax.nets.cnn import CifarCNN, MnistCNN
from powerprop_jax.nets.fixup import FixUpResNet
from powerprop_jax.nets.layers.dct import DctConv2D, DctLinear
from powerprop_jax.nets.lenet import LeNet5, LeNet5Small, LeNet300100
from powerprop_jax.nets.mlp import OneHiddenMLP
from powerprop_jax.nets.mobilenet import MobileNetV2
from powerprop_jax.nets.registry import NAMES, TEXT_NAMES, about, make
from powerprop_jax.nets.resnet import ResNet
from powerprop_jax.nets.scope import power_scope
from powerprop_jax.nets.transformer import GPT, Transformer, ViT
from powerprop_jax.nets.vgg import VGG, VGG19
from powerprop_jax.nets.wide_resnet import WideResNet

__all__ = (
  'GPT',
  'NAMES',
  'TEXT_NAMES',
  'VGG',
  'VGG19',
  'AlexNetS',
  'CifarCNN',
  'DctConv2D',
  'DctLinear',
  'FixUpResNet',
  'LeNet5',
  'LeNet5Small',
  'LeNet300100',
  'MnistCNN',
  'MobileNetV2',
  'OneHiddenMLP',
  'ResNet',
  'Transformer',
  'ViT',
  'WideResNet',
  'about',
  'make',
  'power_scope',
)
