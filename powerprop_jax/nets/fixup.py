"""Residual networks without norms, by the rules of FixUp."""

import math

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers

_CHANNELS = (16, 32, 64)


class FixUpResNet(hk.Module):
  """A ResNet for CIFAR whose initialisation takes the place of norms.

  A block is a 3×3 convolution, ReLU, and a 3×3 convolution; its input is added
  and ReLU follows. A scalar bias comes before and after each convolution, and
  the second is multiplied by a scalar. Three groups of L / 3 blocks have 16, 32
  and 64 channels. The second and third start with a stride of 2, and their
  input is then added with every other position left out, filled up with
  channels of zeros. At the start every block is the identity (its second
  convolution is 0), the first convolution of a block is smaller by L^(-1/2),
  and the logits are 0.

  FixUp-ResNet-110, for 3 channels and 10 classes: 1,719,856 weights
  (convolutional and linear), 282 other parameters.

  With the cosine transform (make(..., dct=True)) the scales of the transforms
  start where the weights do not: at transform_scale(...) for the first
  convolution of a block, and at 0 for the second and for the logits.

  Its layers are stem, conv_0 and conv_1 in group_1/block_0 and so on, and
  logits. A block also has bias_0 to bias_3 and scale, the network bias_0 and
  bias_1.

  Args:
    depth: number of layers, 6n + 2 for n blocks in a group.

  Source:
    Zhang et al., Fixup initialization, 2019 (https://arxiv.org/abs/1901.09321),
    with the shortcut of the authors' code for CIFAR; the scales of the
    transforms as in the code of Price & Tanner, 2021
    (https://arxiv.org/abs/2102.07655).

  Note:
    Weights of the stem are drawn as in all our networks; the authors' code
    leaves them to PyTorch, whose standard deviation is smaller by √3. A w_init
    given to make is used for every weight, those that start at 0 included:
    powerpropagation with α > 1 needs that, as a weight at 0 never moves there.
    The paper trains the biases and scales at a tenth of the learning rate.
  """

  def __init__(
    self, num_classes: int, depth: int = 110, name: str | None = None
  ):
    if depth < 8 or depth % 6 != 2:
      raise ValueError(
        'depth must be 6n + 2 for n blocks in a group (8, 14, 20, ..., 110), '
        f'got {depth}.'
      )
    super().__init__(name=name or f'fixup_resnet_{depth}')
    self._num_classes = num_classes
    self._num_blocks = (depth - 2) // 6

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    x = layers.conv(16, 3, 'stem', with_bias=False)(images)
    x = jax.nn.relu(x + _scalar('bias_0', x))
    num_blocks = len(_CHANNELS) * self._num_blocks
    for group, channels in enumerate(_CHANNELS, start=1):
      with hk.name_scope(f'group_{group}'):
        for i in range(self._num_blocks):
          stride = 2 if group > 1 and i == 0 else 1
          with hk.name_scope(f'block_{i}'):
            x = _block(x, channels, stride, num_blocks)
    x = jnp.mean(x, axis=(1, 2))
    return layers.linear(
      self._num_classes, 'logits', w_init=jnp.zeros, transform_init=0.0
    )(x + _scalar('bias_1', x))


def transform_scale(
  kernel_size: int, in_channels: int, out_channels: int, num_blocks: int
) -> float:
  """First scale of the cosine transform in the first convolution of a block.

  √(t / a), where t is the expected norm of the weights of one output channel
  that FixUp would draw, normal with standard deviation σ = √(2 / (C_out k²))
  L^(-1/2): t = √2 σ Γ((m+1)/2) / Γ(m/2) for m = k² C_in weights; and a is the
  mean norm of the rows of the transform, which is 1, as it has at least as many
  inputs as outputs here.

  C_out is at most k² C_in, and L the number of blocks in the network.

  Example:
    >>> round(transform_scale(3, 16, 16, num_blocks=54), 4)
    0.4383

  Source:
    The code of Price & Tanner, 2021 (https://arxiv.org/abs/2102.07655).

  Note:
    To give the transform the norm that FixUp's weights have, the scale would be
    t / a without the root, 0.19 instead of 0.44 in the example: probably a slip
    of that code. We do as it does.
  """
  num_inputs = kernel_size**2 * in_channels
  std = math.sqrt(2 / (out_channels * kernel_size**2 * num_blocks))
  log_ratio = math.lgamma((num_inputs + 1) / 2) - math.lgamma(num_inputs / 2)
  return math.sqrt(math.sqrt(2) * std * math.exp(log_ratio))


def _block(
  x: jax.Array, channels: int, stride: int, num_blocks: int
) -> jax.Array:
  in_channels = x.shape[-1]
  std = math.sqrt(2 / (channels * 3**2 * num_blocks))
  shifted = x + _scalar('bias_0', x)
  y = layers.conv(
    channels,
    3,
    'conv_0',
    stride=stride,
    with_bias=False,
    w_init=hk.initializers.RandomNormal(std),
    transform_init=transform_scale(3, in_channels, channels, num_blocks),
  )(shifted)
  y = jax.nn.relu(y + _scalar('bias_1', y))
  y = layers.conv(
    channels,
    3,
    'conv_1',
    with_bias=False,
    w_init=jnp.zeros,
    transform_init=0.0,
  )(y + _scalar('bias_2', y))
  y = y * _scalar('scale', y, 1.0) + _scalar('bias_3', y)
  if stride == 1:
    return jax.nn.relu(x + y)
  shortcut = shifted[:, ::stride, ::stride]
  missing = channels - in_channels
  shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, missing)))
  return jax.nn.relu(shortcut + y)


def _scalar(name: str, x: jax.Array, value: float = 0.0) -> jax.Array:
  init = hk.initializers.Constant(value)
  return hk.get_parameter(name, (), x.dtype, init=init)
