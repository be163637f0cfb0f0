"""Residual networks, for photographs and at the size of CIFAR images."""

import functools
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.core import names
from powerprop_jax.nets import layers

# Channels inside the blocks of each group, for photographs and for CIFAR.
_CHANNELS = (64, 128, 256, 512)
_FEW_CHANNELS = (16, 32, 64)


class _Convolution(NamedTuple):
  """One convolution of a block."""

  size: int
  expansion: int  # Of its channels, as a multiple of those of the group.
  has_stride: bool


class _Depth(NamedTuple):
  """What depths differ in: blocks in each group, and what is in a block."""

  num_blocks: tuple[int, ...]
  block: tuple[_Convolution, ...]
  channels: tuple[int, ...] = _CHANNELS


_BASIC = (_Convolution(3, 1, True), _Convolution(3, 1, False))
_DEPTHS = {
  8: _Depth((1, 1, 1), _BASIC, _FEW_CHANNELS),
  10: _Depth((1, 1, 1, 1), _BASIC),
  18: _Depth((2, 2, 2, 2), _BASIC),
  20: _Depth((3, 3, 3), _BASIC, _FEW_CHANNELS),
  50: _Depth(
    (3, 4, 6, 3),
    (
      _Convolution(1, 1, False),
      _Convolution(3, 1, True),
      _Convolution(1, 4, False),
    ),
  ),
}


class ResNet(hk.Module):
  """A residual network, version 1.5: a 3×3 convolution has the stride.

  A block of ResNet-50 is three convolutions, 1×1, 3×3 and 1×1 with four times
  the channels; one of ResNet-18 is two, 3×3, and the first has the stride. Each
  is followed by a norm, with ReLU between; the input is added, through a 1×1
  convolution and a norm where the block changes its shape, and ReLU follows.
  Convolutions have no bias. The stem for photographs is a 7×7 convolution and a
  pooling, both of stride 2; that for CIFAR a 3×3 convolution of stride 1.
  ResNet-8 and 20 are those made for CIFAR, with three groups of 16, 32 and 64
  channels and blocks like ResNet-18's. For images of 3 channels:

  ====================  =========================  ==============
  depth, stem, classes  weights (conv and linear)  all parameters
  ====================  =========================  ==============
  18, 'imagenet', 1000  11,678,912                 11,689,512
  50, 'imagenet', 1000  25,502,912                 25,557,032
  18, 'cifar', 10       11,164,352                 11,173,962
  50, 'cifar', 10       23,467,712                 23,520,842
  8, 'cifar', 10        77,360                     78,042
  20, 'cifar', 10       270,896                    272,474
  ====================  =========================  ==============

  The second has 4,089,184,256 multiply–adds at 224×224.

  Its layers are stem; conv_0, conv_1, perhaps conv_2 and perhaps shortcut in
  group_1/block_0 and so on; logits.

  Args:
    depth: number of layers, 8, 18, 20 or 50; or 10, a ResNet-18 with one block
      in each group, to try things out.
    width: number of channels, as a multiple of the usual one, rounded; more
      than 0. Less than 1 gives the small dense networks that sparse ones are
      compared with.
    remat: whether to compute the activations inside the blocks once more for
      their gradients, not to keep them: less memory, about a third more time.

  Source:
    He et al., Deep Residual Learning, 2016 (https://arxiv.org/abs/1512.03385),
    Table 1 and section 4.2; the place of the stride, the decay and the epsilon
    as in the code of RigL (https://arxiv.org/abs/1911.11134); the stem for
    CIFAR as in that of Price & Tanner, 2021 (https://arxiv.org/abs/2102.07655).

  Note:
    RigL's code starts the scale of the last norm of a block at 0; ours starts
    at 1. At 0 no gradient reaches the weights inside the blocks on the first
    step, and whatever chooses connections by gradient there (SNIP, a first
    growth of RigL) would choose at random. It draws the weights of the output
    layer with a standard deviation of 0.01; ours are drawn as in every layer,
    0.022 in ResNet-50. And it pads evenly before a strided convolution, where
    ours pads more at the end; the shapes are equal. The authors' networks for
    CIFAR change shapes without weights, by zeros for the new channels.
  """

  def __init__(
    self,
    num_classes: int,
    depth: int = 50,
    stem: str = 'imagenet',
    name: str | None = None,
    *,
    width: float = 1.0,
    remat: bool = False,
  ):
    names.check_choice('depth', depth, _DEPTHS)
    names.check_choice('stem', stem, ('imagenet', 'cifar'))
    usual = _DEPTHS[depth].channels
    channels = tuple(round(width * num) for num in usual)
    if min(channels) < 1:
      raise ValueError(
        f'width must leave at least one channel of {usual[0]}, got {width}.'
      )
    suffix = '_cifar' if stem == 'cifar' else ''
    super().__init__(name=name or f'resnet_{depth}{suffix}')
    self._num_classes = num_classes
    self._depth = _DEPTHS[depth]
    self._stem = stem
    self._channels = channels
    self._remat = remat

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    size, stride = (7, 2) if self._stem == 'imagenet' else (3, 1)
    num_stem = self._channels[0]
    x = layers.conv(num_stem, size, 'stem', stride=stride, with_bias=False)(
      images
    )
    x = jax.nn.relu(layers.norm('stem_norm')(x, is_training))
    if self._stem == 'imagenet':
      x = layers.max_pool(x, size=3)
    groups = zip(self._channels, self._depth.num_blocks, strict=True)
    for group, (channels, num_blocks) in enumerate(groups, start=1):
      with hk.name_scope(f'group_{group}'):
        for i in range(num_blocks):
          stride = 2 if group > 1 and i == 0 else 1
          with hk.name_scope(f'block_{i}'):
            block = functools.partial(
              _block,
              block=self._depth.block,
              channels=channels,
              stride=stride,
              is_training=is_training,
            )
            x = hk.remat(block)(x) if self._remat else block(x)
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=(1, 2)))


def _block(
  x: jax.Array,
  block: tuple[_Convolution, ...],
  channels: int,
  stride: int,
  is_training: bool,
) -> jax.Array:
  num_outputs = block[-1].expansion * channels
  if x.shape[-1] == num_outputs:
    shortcut = x
  else:
    shortcut = layers.conv(
      num_outputs, 1, 'shortcut', stride=stride, with_bias=False
    )(x)
    shortcut = layers.norm('shortcut_norm')(shortcut, is_training)
  y = x
  for i, (size, expansion, has_stride) in enumerate(block):
    y = layers.conv(
      expansion * channels,
      size,
      f'conv_{i}',
      stride=stride if has_stride else 1,
      with_bias=False,
    )(jax.nn.relu(y) if i else y)
    y = layers.norm(f'norm_{i}')(y, is_training)
  return jax.nn.relu(shortcut + y)
