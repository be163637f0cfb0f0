"""Networks by name."""

from collections.abc import Callable
import difflib
import functools

import haiku as hk
import jax

from powerprop_jax.nets import (
  alexnet,
  cnn,
  lenet,
  mlp,
  resnet,
  vgg,
  wide_resnet,
)

# num_classes -> a module, called with (images, is_training).
_MODULES: dict[str, Callable[[int], Callable[..., jax.Array]]] = {
  'lenet_300_100': lenet.LeNet300100,
  'lenet_5': lenet.LeNet5,
  'lenet_5_relu': functools.partial(
    lenet.LeNet5, conv_relu=True, name='lenet_5_relu'
  ),
  'mlp': mlp.OneHiddenMLP,
  'mnist_cnn': cnn.MnistCNN,
  'cifar_cnn': cnn.CifarCNN,
  'alexnet_s': alexnet.AlexNetS,
  'vgg_like': functools.partial(vgg.VGG, variant='like'),
  'vgg_c': functools.partial(vgg.VGG, variant='c'),
  'vgg_d': functools.partial(vgg.VGG, variant='d'),
  'wrn_22_2': functools.partial(wide_resnet.WideResNet, depth=22, width=2),
  'wrn_28_2': functools.partial(wide_resnet.WideResNet, depth=28, width=2),
  'wrn_16_8': functools.partial(wide_resnet.WideResNet, depth=16, width=8),
  'resnet_50': resnet.ResNet50,
}

NAMES = tuple(_MODULES)


def make(name: str, num_classes: int) -> hk.TransformedWithState:
  """A network as a pair of functions, ready for any image size.

  The function transformed is forward(images, is_training) -> logits:
  init(key, images, is_training) gives (theta, net_state), and
  apply(theta, net_state, key, images, is_training) gives (logits, net_state).
  Images are floats in [0, 1], [N, H, W, C].

  Only the wide residual networks (wrn_*) need the key, in training, for their
  dropout, and raise a ValueError without one; for the others, and in
  evaluation, it may be None. The lenets, mlp and cnns have an empty net_state
  and ignore is_training; the others normalise by batch, keep running
  statistics in net_state, and need a step in training before they can be
  evaluated.

  Args:
    name: one of NAMES.
    num_classes: size of the last axis of the logits, at least 1. The layer
      that computes them is called 'logits' in every network.

  Returns:
    The transformed network.

  Raises:
    ValueError: if the name is unknown or num_classes is less than 1.

  Example:
    >>> net = make('lenet_300_100', num_classes=10)
    >>> images = jax.numpy.zeros((2, 8, 8, 1))
    >>> theta, net_state = net.init(jax.random.key(0), images, True)
    >>> logits, _ = net.apply(theta, net_state, None, images, False)
    >>> logits.shape
    (2, 10)
  """
  if name not in _MODULES:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'unknown network {name!r}.{hint} There are: {", ".join(NAMES)}.'
    )
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}.')

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    return _MODULES[name](num_classes)(images, is_training)

  return hk.transform_with_state(forward)
