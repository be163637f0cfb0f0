"""AlexNet-s: AlexNet's convolutions at the size of CIFAR images."""

import haiku as hk
import jax

from powerprop_jax.nets import layers

# (channels, kernel size); the stride of 2 takes the place of pooling.
_CONVOLUTIONS = ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))


class AlexNetS(hk.Module):
  """Five convolutions of stride 2, then 1024, 1024 and num_classes units.

  Batch normalisation and ReLU after every layer but the last. At 32×32×3 with
  10 classes: 5,066,784 weights (linear and convolutional).

  Its layers are conv_0 to conv_4, linear_0, linear_1 and logits, its norms
  norm_0 to norm_6.

  Source:
    Lee et al., SNIP, 2019 (https://arxiv.org/abs/1810.02340; 'alexnet-v1' in
    network.py of the authors' code).
  """

  def __init__(self, num_classes: int, name: str = 'alexnet_s'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    x = images
    for i, (channels, size) in enumerate(_CONVOLUTIONS):
      x = layers.conv(channels, size, f'conv_{i}', stride=2)(x)
      x = jax.nn.relu(_norm(f'norm_{i}')(x, is_training))
    x = layers.flatten(x)
    for i in range(2):
      x = layers.linear(1024, f'linear_{i}')(x)
      x = jax.nn.relu(_norm(f'norm_{5 + i}')(x, is_training))
    return layers.linear(self._num_classes, 'logits')(x)


def _norm(name: str) -> hk.BatchNorm:
  # The decay and epsilon of the authors' code, TensorFlow's defaults.
  return hk.BatchNorm(True, True, decay_rate=0.99, eps=1e-3, name=name)
