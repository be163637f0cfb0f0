"""The smallest network with a hidden layer."""

import haiku as hk
import jax

from powerprop_jax.nets import layers


class OneHiddenMLP(hk.Module):
  """Fully connected layers of 100 and num_classes units, ReLU between.

  At 28×28×1: 79,400 weights and 110 biases.

  Args:
    num_classes: size of the last axis of the logits.
    name: name of the module; its layers are linear_0 and logits.
  """

  def __init__(self, num_classes: int, name: str = 'mlp'):
    super().__init__(name=name)
    self._num_classes = num_classes

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    x = layers.flatten(images)
    x = jax.nn.relu(layers.linear(100, 'linear_0')(x))
    return layers.linear(self._num_classes, 'logits')(x)
