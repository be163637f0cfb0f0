"""The LeNets of the pruning literature.

LeNet-300-100 is the network of the paper's MNIST experiment; LeNet-5 is the
Caffe variant, larger than LeCun's, with or without activations after its
convolutions; LeNet-5-small is close to LeCun's.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers, mlp


class LeNet300100(mlp.MLP):
  """Fully connected layers of 300, 100 and num_classes units, ReLU between.

  At 28×28×1: 266,200 weights and 410 biases. Its layers are linear_0, linear_1
  and logits.

  Source:
    LeCun et al., Gradient-based learning applied to document recognition, 1998;
    initialised as in the authors' notebook for Powerpropagation.
  """

  def __init__(self, num_classes: int, name: str = 'lenet_300_100'):
    super().__init__(num_classes, (300, 100), name)


class LeNet5(hk.Module):
  """Two 5×5 convolutions with pooling, then 500 and num_classes units.

  Convolutions are not padded; a ReLU follows the layer of 500 units and, if
  told so, each convolution. At 28×28×1: 430,500 weights and 580 biases. Its
  layers are conv_0, conv_1, linear_0 and logits. Images are at least 16×16:
  nothing would be left of smaller ones after the second pooling.

  Args:
    conv_relu: whether a ReLU follows each convolution. Caffe's example and SNIP
      have none, SNFS has.

  Source:
    The 'lenet' example of Caffe, as in Lee et al., SNIP, 2019
    (https://arxiv.org/abs/1810.02340, network.py of the authors' code), and,
    with the ReLUs, LeNet_5_Caffe in the code of Dettmers & Zettlemoyer, Sparse
    networks from scratch, 2019 (https://arxiv.org/abs/1907.04840).
  """

  def __init__(
    self,
    num_classes: int,
    conv_relu: bool = False,
    w_init: hk.initializers.Initializer | None = None,
    name: str = 'lenet_5',
  ):
    super().__init__(name=name)
    self._num_classes = num_classes
    self._w_init = w_init
    self._activation = jax.nn.relu if conv_relu else lambda x: x

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    height, width = images.shape[1:3]
    if min(height, width) < 16:
      raise ValueError(
        f'lenet_5 needs images of at least 16×16, got {height}×{width}. '
        'Use mnist_cnn, which pads its convolutions; for rows of features, '
        'lenet_300_100 or mlp.'
      )
    conv = functools.partial(layers.conv, padding='VALID', w_init=self._w_init)
    linear = functools.partial(layers.linear, w_init=self._w_init)
    x = conv(20, 5, 'conv_0')(images)
    x = layers.max_pool(self._activation(x), 'VALID')
    x = conv(50, 5, 'conv_1')(x)
    x = layers.flatten(layers.max_pool(self._activation(x), 'VALID'))
    x = jax.nn.relu(linear(500, 'linear_0')(x))
    return linear(self._num_classes, 'logits')(x)


class LeNet5Small(hk.Module):
  """Three 5×5 convolutions with average pools, then 82 and num_classes units.

  Convolutions of 6, 16 and 120 channels, not padded, with pooling after the
  first two; ReLU after every layer but the last; no biases. Images smaller than
  32×32 are surrounded with zeros up to that size, MNIST by 2 on each side. For
  32×32×3 and 10 classes: 61,510 weights and nothing else; for 28×28×1, 61,210.

  Its layers are conv_0, conv_1, conv_2, linear_0 and logits.

  Source:
    Price & Tanner, Dense for the price of sparse, 2021
    (https://arxiv.org/abs/2102.07655), the 'lenet' of the authors' code.

  Note:
    LeCun's LeNet-5 has 84 units where this one has 82, biases, and saturating
    activations.
  """

  def __init__(self, num_classes: int, name: str = 'lenet_5_small'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    missing = [max(0, 32 - size) for size in images.shape[1:3]]
    pads = [(zeros // 2, zeros - zeros // 2) for zeros in missing]
    x = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    for i, channels in enumerate((6, 16, 120)):
      x = layers.conv(
        channels, 5, f'conv_{i}', padding='VALID', with_bias=False
      )(x)
      x = jax.nn.relu(x)
      x = layers.avg_pool(x) if i < 2 else layers.flatten(x)
    x = jax.nn.relu(layers.linear(82, 'linear_0', with_bias=False)(x))
    return layers.linear(self._num_classes, 'logits', with_bias=False)(x)
