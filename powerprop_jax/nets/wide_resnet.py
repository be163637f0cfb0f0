"""Wide residual networks, with the activation before each convolution."""

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers


class WideResNet(hk.Module):
  """A WRN: one convolution, three groups of residual blocks, a linear layer.

  A block is norm, ReLU, 3×3 convolution, norm, ReLU, dropout, 3×3 convolution,
  added to its input. The groups have 16, 32 and 64 channels times the width,
  and (depth - 4) / 6 blocks each; the second and third start with a stride of
  2. Where a block changes the number of channels its input passes through a 1×1
  convolution, after the first norm and ReLU. Convolutions have no bias, as a
  norm follows. In training, apply needs a key for the dropout.

  For images of 3 channels and 10 classes, the width leaves three 1×1
  convolutions, and the networks in the literature have

  ============  =========================  ==============
  depth, width  weights (conv and linear)  all parameters
  ============  =========================  ==============
  22, 2         1,076,912                  1,079,642
  28, 2         1,463,984                  1,467,610
  16, 8         10,954,160                 10,961,370
  ============  =========================  ==============

  Its layers are stem; conv_0, conv_1 and perhaps shortcut in group_1/block_0
  and so on; logits.

  Args:
    depth: number of layers, 6n + 4 for n blocks in a group.
    dropout: share of activations dropped inside a block in training, in [0, 1).

  Source:
    Zagoruyko & Komodakis, Wide Residual Networks, 2016
    (https://arxiv.org/abs/1605.07146), with the dropout, decay and epsilon of
    the CIFAR-10 experiments of RigL (https://arxiv.org/abs/1911.11134) and SNFS
    (https://arxiv.org/abs/1907.04840).

  Note:
    Weights are drawn as in all our networks, over the fan-in with scale 1. RigL
    draws them over the mean of fan-in and fan-out, SNFS over the fan-out with
    scale 2. The mean over all positions takes the place of pooling over 8×8.
  """

  def __init__(
    self,
    num_classes: int,
    depth: int,
    width: int,
    dropout: float = 0.3,
    name: str | None = None,
  ):
    if depth < 10 or depth % 6 != 4:
      raise ValueError(
        f'depth must be 6n + 4 for n blocks in a group (10, 16, 22, 28, ...), '
        f'got {depth}.'
      )
    if width < 1:
      raise ValueError(f'width must be at least 1, got {width}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'dropout must be in [0, 1), got {dropout}.')
    super().__init__(name=name or f'wrn_{depth}_{width}')
    self._num_classes = num_classes
    self._num_blocks = (depth - 4) // 6
    self._width = width
    self._dropout = dropout

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    dropout = self._dropout if is_training else 0.0
    x = layers.conv(16, 3, 'stem', with_bias=False)(images)
    for group in (1, 2, 3):
      channels = 8 * 2**group * self._width
      with hk.name_scope(f'group_{group}'):
        for i in range(self._num_blocks):
          stride = 2 if group > 1 and i == 0 else 1
          with hk.name_scope(f'block_{i}'):
            x = _block(x, channels, stride, dropout, is_training)
    x = jax.nn.relu(layers.norm('norm')(x, is_training))
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=(1, 2)))


def _block(
  x: jax.Array, channels: int, stride: int, dropout: float, is_training: bool
) -> jax.Array:
  y = jax.nn.relu(layers.norm('norm_0')(x, is_training))
  if x.shape[-1] == channels:
    shortcut = x
  else:
    shortcut = layers.conv(
      channels, 1, 'shortcut', stride=stride, with_bias=False
    )(y)
  y = layers.conv(channels, 3, 'conv_0', stride=stride, with_bias=False)(y)
  y = jax.nn.relu(layers.norm('norm_1')(y, is_training))
  if dropout:
    y = layers.dropout(y, dropout)
  return shortcut + layers.conv(channels, 3, 'conv_1', with_bias=False)(y)
