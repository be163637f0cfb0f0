"""Networks by name."""

from collections.abc import Callable
import difflib

import haiku as hk
import jax

from powerprop_jax.nets import alexnet, cnn, lenet, mlp

# num_classes -> a module, called with (images, is_training).
_MODULES: dict[str, Callable[[int], Callable[..., jax.Array]]] = {
  'lenet_300_100': lenet.LeNet300100,
  'lenet_5': lenet.LeNet5,
  'mlp': mlp.OneHiddenMLP,
  'mnist_cnn': cnn.MnistCNN,
  'cifar_cnn': cnn.CifarCNN,
  'alexnet_s': alexnet.AlexNetS,
}

NAMES = tuple(_MODULES)


def make(name: str, num_classes: int) -> hk.TransformedWithState:
  """A network as a pair of functions, ready for any image size.

  The function transformed is forward(images, is_training) -> logits:
  init(key, images, is_training) gives (theta, net_state), and
  apply(theta, net_state, None, images, is_training) gives (logits, net_state).
  Images are floats in [0, 1], [N, H, W, C]. No network here needs a key in
  apply; all but alexnet_s have an empty net_state and ignore is_training.

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
