"""ResNet-50, for photographs."""

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers

# (channels inside a block, number of blocks) of each group.
_GROUPS = ((64, 3), (128, 4), (256, 6), (512, 3))


class ResNet50(hk.Module):
  """ResNet-50, version 1.5: the 3×3 convolution of a block has the stride.

  A block is three convolutions, 1×1, 3×3 and 1×1 with four times the channels,
  each followed by a norm, with ReLU between; its input is added, through a 1×1
  convolution and a norm in the first block of a group, and ReLU follows.
  Convolutions have no bias. For images of 3 channels and 1000 classes:
  25,502,912 weights (convolutional and linear), 25,557,032 parameters, and
  4,089,184,256 multiply–adds at 224×224.

  Args:
    num_classes: size of the last axis of the logits.
    name: name of the module. Its layers are stem; conv_0, conv_1, conv_2 and
      perhaps shortcut in group_1/block_0 and so on; logits.

  Source:
    He et al., Deep Residual Learning, 2016 (https://arxiv.org/abs/1512.03385),
    Table 1; the place of the stride, the decay and the epsilon as in the code
    of RigL (https://arxiv.org/abs/1911.11134).

  Note:
    That code starts the scale of the last norm of a block at 0; ours starts at
    1. At 0 no gradient reaches the weights inside the blocks on the first step,
    and whatever chooses connections by gradient there (SNIP, a first growth of
    RigL) would choose at random. It draws the weights of the output layer with
    a standard deviation of 0.01; ours are drawn as in every layer, 0.022. And
    it pads evenly before a strided convolution, where ours pads more at the
    end; the shapes are equal.
  """

  def __init__(self, num_classes: int, name: str = 'resnet_50'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C].

    Args:
      images: float images in [0, 1].
      is_training: whether to normalise by the statistics of this batch, and
        update the running ones, or to use the running ones.

    Returns:
      Logits.
    """
    layers.check_images(images)
    x = layers.conv(64, 7, 'stem', stride=2, with_bias=False)(images)
    x = jax.nn.relu(layers.norm('stem_norm')(x, is_training))
    x = layers.max_pool(x, size=3)
    for group, (channels, num_blocks) in enumerate(_GROUPS, start=1):
      with hk.name_scope(f'group_{group}'):
        for i in range(num_blocks):
          stride = 2 if group > 1 and i == 0 else 1
          with hk.name_scope(f'block_{i}'):
            x = _block(x, channels, stride, is_training)
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=(1, 2)))


def _block(
  x: jax.Array, channels: int, stride: int, is_training: bool
) -> jax.Array:
  if x.shape[-1] == 4 * channels:
    shortcut = x
  else:
    shortcut = layers.conv(
      4 * channels, 1, 'shortcut', stride=stride, with_bias=False
    )(x)
    shortcut = layers.norm('shortcut_norm')(shortcut, is_training)
  y = layers.conv(channels, 1, 'conv_0', with_bias=False)(x)
  y = jax.nn.relu(layers.norm('norm_0')(y, is_training))
  y = layers.conv(channels, 3, 'conv_1', stride=stride, with_bias=False)(y)
  y = jax.nn.relu(layers.norm('norm_1')(y, is_training))
  y = layers.conv(4 * channels, 1, 'conv_2', with_bias=False)(y)
  return jax.nn.relu(shortcut + layers.norm('norm_2')(y, is_training))
