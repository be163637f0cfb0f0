"""Fully connected networks with hidden layers of any width."""

from collections.abc import Sequence

import haiku as hk
import jax

from powerprop_jax.nets import layers


class MLP(hk.Module):
  """Fully connected layers of the given widths, then num_classes, ReLU between.

  At 28×28×1 with hidden layers of 2,000 and 2,000: 5,588,000 weights and 4,010
  biases. Its layers are linear_0, linear_1, … and logits.

  Example:
    >>> net = hk.transform(lambda x: MLP(10, hidden=(8,))(x))
    >>> sorted(net.init(jax.random.key(0), jax.numpy.zeros((1, 2, 2, 1))))
    ['mlp/linear_0', 'mlp/logits']
  """

  def __init__(
    self,
    num_classes: int,
    hidden: Sequence[int] = (2000, 2000),
    name: str = 'mlp',
  ):
    super().__init__(name=name)
    if any(width < 1 for width in hidden):
      raise ValueError(
        f'hidden layers must have at least one unit, got {tuple(hidden)}.'
      )
    self._num_classes = num_classes
    self._hidden = tuple(hidden)

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    del is_training
    layers.check_images(images)
    x = layers.flatten(images)
    for number, width in enumerate(self._hidden):
      x = jax.nn.relu(layers.linear(width, f'linear_{number}')(x))
    return layers.linear(self._num_classes, 'logits')(x)


class OneHiddenMLP(MLP):
  """A layer of 100 units, at 28×28×1: 79,400 weights and 110 biases."""

  def __init__(self, num_classes: int, name: str = 'mlp'):
    super().__init__(num_classes, (100,), name)
