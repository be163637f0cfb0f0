"""Two small convolutional networks, for images of any size.

3×3 kernels and pooling, padded, so that 8×8 digits pass as well as 32×32
photographs. One convolution more for colour images; otherwise the same.
"""

import haiku as hk
import jax

from powerprop_jax.nets import layers


class MnistCNN(hk.Module):
  """Convolutions of 32 and 64 channels, then 128 and num_classes units.

  At 28×28×1: 421,408 weights and 234 biases. Its layers are conv_0, conv_1,
  linear_0 and logits.
  """

  num_channels: tuple[int, ...] = (32, 64)

  def __init__(self, num_classes: int, name: str = 'mnist_cnn'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    x = images
    for i, channels in enumerate(self.num_channels):
      x = jax.nn.relu(layers.conv(channels, 3, f'conv_{i}')(x))
      x = layers.max_pool(x)
    x = jax.nn.relu(layers.linear(128, 'linear_0')(layers.flatten(x)))
    return layers.linear(self._num_classes, 'logits')(x)


class CifarCNN(MnistCNN):
  """Convolutions of 32, 64 and 128 channels, then 128 and num_classes units.

  At 32×32×3: 356,448 weights and 362 biases.
  """

  num_channels = (32, 64, 128)

  def __init__(self, num_classes: int, name: str = 'cifar_cnn'):
    super().__init__(num_classes, name)
