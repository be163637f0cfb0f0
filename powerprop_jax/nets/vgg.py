"""VGG at the size of CIFAR images: four variants of the pruning literature."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.core import names
from powerprop_jax.nets import layers

# Channels of the three convolutions, or two, between two poolings.
_GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512,) * 3, (512,) * 3)
_GROUPS_19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


class _Variant(NamedTuple):
  """What the variants differ in."""

  has_small_kernels: bool  # The third convolution of a group is 1×1.
  num_hidden: int  # Fully connected layers of 512 units before the logits.


_VARIANTS = {
  'like': _Variant(False, 1),
  'c': _Variant(True, 2),
  'd': _Variant(False, 2),
}


class VGG(hk.Module):
  """Thirteen convolutions with five poolings, then one or two layers of 512.

  Convolutions are followed by a norm and ReLU, the layers of 512 units by ReLU
  and a norm, which takes the place of VGG's dropout. At 32×32×3, 10 classes:

  =======  ================================  =========================
  variant  differs in                        weights (conv and linear)
  =======  ================================  =========================
  like     one layer of 512 units            14,977,728
  c        two; the third of a group is 1×1  11,307,712
  d        two                               15,239,872
  =======  ================================  =========================

  Its layers are conv_0 to conv_12, linear_0, perhaps linear_1, and logits; its
  norms norm_0 to norm_13 or norm_14. Variant c takes images from 4×4 on.

  Source:
    Simonyan & Zisserman, 2014 (https://arxiv.org/abs/1409.1556), Table 1,
    columns C and D; made smaller by Lee et al., SNIP, 2019
    (https://arxiv.org/abs/1810.02340), as in the code of SNFS
    (https://arxiv.org/abs/1907.04840).

  Note:
    That code surrounds the input of a 1×1 convolution with zeros too, so an 8×8
    image becomes 10×10, and 2×2 positions are left where variant d has one:
    without it the first layer of 512 would have a quarter of the weights and
    variant c 10,521,280. We do the same. Pooling rounds odd sizes down in
    variant c, as there, and up in the others, so that they take images smaller
    than 32×32.
  """

  def __init__(self, num_classes: int, variant: str, name: str | None = None):
    names.check_choice('variant', variant, _VARIANTS)
    super().__init__(name=name or f'vgg_{variant}')
    self._num_classes = num_classes
    self._variant = _VARIANTS[variant]

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    has_small_kernels, num_hidden = self._variant
    if has_small_kernels and min(images.shape[1:3]) < 4:
      height, width = images.shape[1:3]
      raise ValueError(
        f'vgg_c needs images of at least 4×4, got {height}×{width}. Use vgg_d.'
      )
    x, index = images, 0
    for group in _GROUPS:
      for i, channels in enumerate(group):
        size = 3
        if has_small_kernels and i == 2:
          x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
          size = 1
        x = layers.conv(channels, size, f'conv_{index}')(x)
        x = jax.nn.relu(layers.norm(f'norm_{index}')(x, is_training))
        index += 1
      x = layers.max_pool(x, 'VALID' if has_small_kernels else 'SAME')
    x = layers.flatten(x)
    for i in range(num_hidden):
      x = jax.nn.relu(layers.linear(512, f'linear_{i}')(x))
      x = layers.norm(f'norm_{index + i}')(x, is_training)
    return layers.linear(self._num_classes, 'logits')(x)


class VGG19(hk.Module):
  """Sixteen convolutions with four poolings, their mean, and the logits.

  3×3 convolutions without bias, each followed by a norm and ReLU; 64, 64, 128,
  128, then four times 256 and eight times 512 channels, with a pooling where
  the number changes and in the middle of the last eight. The mean over all
  positions takes the place of the fifth pooling, and one linear layer that of
  VGG's three. At 32×32×3, 10 classes: 20,024,000 weights, 20,035,018
  parameters.

  Its layers are conv_0 to conv_15 and logits; its norms norm_0 to norm_15.

  Source:
    Simonyan & Zisserman, 2014 (https://arxiv.org/abs/1409.1556), Table 1,
    column E; the CIFAR form of the code of Liu et al., Rethinking the value of
    network pruning, 2019 (https://arxiv.org/abs/1810.05270), which that of
    Price & Tanner, 2021 (https://arxiv.org/abs/2102.07655) uses too.
  """

  def __init__(self, num_classes: int, name: str = 'vgg_19'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    x, index = images, 0
    for group in _GROUPS_19:
      if index:
        x = layers.max_pool(x)
      for channels in group:
        x = layers.conv(channels, 3, f'conv_{index}', with_bias=False)(x)
        x = jax.nn.relu(layers.norm(f'norm_{index}')(x, is_training))
        index += 1
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=(1, 2)))
