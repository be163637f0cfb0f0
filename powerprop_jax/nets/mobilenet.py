"""MobileNetV2 at the size of CIFAR images."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers


class _Group(NamedTuple):
  """Blocks of one number of channels."""

  expansion: int  # Channels inside a block, as a multiple of its input's.
  channels: int
  num_blocks: int
  stride: int  # Of the first block.


_GROUPS = (
  _Group(1, 16, 1, 1),
  _Group(6, 24, 2, 1),
  _Group(6, 32, 3, 2),
  _Group(6, 64, 4, 2),
  _Group(6, 96, 3, 1),
  _Group(6, 160, 3, 2),
  _Group(6, 320, 1, 1),
)


class MobileNetV2(hk.Module):
  """MobileNetV2 of width 1, with a stride of 2 three times instead of five.

  A block widens its input with a 1×1 convolution, filters each channel on its
  own with a 3×3 convolution, and narrows it with a 1×1 convolution; each is
  followed by a norm, the first two also by ReLU6. The input is added where the
  shape stays. There is a 3×3 convolution of 32 channels before, and a 1×1
  convolution of 1280 after. Convolutions have no bias. For 3 channels and 10
  classes: 2,202,560 weights (convolutional and linear), 2,236,682 parameters.

  Its layers are stem; expand (not in the first block), depthwise and project in
  group_1/block_0 and so on; head; logits.

  Source:
    Sandler et al., MobileNetV2, 2018 (https://arxiv.org/abs/1801.04381),
    Table 2; for images of 32×32 the stem and the second group have stride 1, as
    in the code of Price & Tanner, 2021 (https://arxiv.org/abs/2102.07655).

  Note:
    That code differs from the paper: ReLU instead of ReLU6, a 1×1 convolution
    in the first block too, and a 1×1 convolution and a norm on the shortcut
    where a block of stride 1 changes the channels (2,296,922 parameters). We
    follow the paper.
  """

  def __init__(self, num_classes: int, name: str = 'mobilenet_v2'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    x = layers.conv(32, 3, 'stem', with_bias=False)(images)
    x = jax.nn.relu6(layers.norm('stem_norm')(x, is_training))
    for number, group in enumerate(_GROUPS, start=1):
      with hk.name_scope(f'group_{number}'):
        for i in range(group.num_blocks):
          stride = group.stride if i == 0 else 1
          with hk.name_scope(f'block_{i}'):
            x = _block(x, group, stride, is_training)
    x = layers.conv(1280, 1, 'head', with_bias=False)(x)
    x = jax.nn.relu6(layers.norm('head_norm')(x, is_training))
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=(1, 2)))


def _block(
  x: jax.Array, group: _Group, stride: int, is_training: bool
) -> jax.Array:
  inside = group.expansion * x.shape[-1]
  y = x
  if group.expansion > 1:
    y = layers.conv(inside, 1, 'expand', with_bias=False)(y)
    y = jax.nn.relu6(layers.norm('expand_norm')(y, is_training))
  y = layers.conv(
    inside,
    3,
    'depthwise',
    stride=stride,
    feature_group_count=inside,
    with_bias=False,
  )(y)
  y = jax.nn.relu6(layers.norm('depthwise_norm')(y, is_training))
  y = layers.conv(group.channels, 1, 'project', with_bias=False)(y)
  y = layers.norm('project_norm')(y, is_training)
  return x + y if y.shape == x.shape else y
