"""Networks by name."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import haiku as hk
import jax

from powerprop_jax.core import names
from powerprop_jax.jaxprs.dct import Method
from powerprop_jax.nets import (
  alexnet,
  cnn,
  fixup,
  lenet,
  mlp,
  mobilenet,
  resnet,
  transformer,
  vgg,
  wide_resnet,
)
from powerprop_jax.nets.layers import forms

# num_classes -> a module, called with (images, is_training).
_MODULES: dict[str, Callable[[int], Callable[..., jax.Array]]] = {
  'lenet_300_100': lenet.LeNet300100,
  'lenet_5': lenet.LeNet5,
  # PyTorch's initial weights, uniform with a third of our variance, as in the
  # code of SNFS: with ours its rate of 0.1 diverges for some keys.
  'lenet_5_relu': functools.partial(
    lenet.LeNet5,
    conv_relu=True,
    w_init=hk.initializers.VarianceScaling(1 / 3, 'fan_in', 'uniform'),
    name='lenet_5_relu',
  ),
  'lenet_5_small': lenet.LeNet5Small,
  'mlp': mlp.OneHiddenMLP,
  'mnist_cnn': cnn.MnistCNN,
  'cifar_cnn': cnn.CifarCNN,
  'alexnet_s': alexnet.AlexNetS,
  'vgg_like': functools.partial(vgg.VGG, variant='like'),
  'vgg_c': functools.partial(vgg.VGG, variant='c'),
  'vgg_d': functools.partial(vgg.VGG, variant='d'),
  'vgg_19': vgg.VGG19,
  'wrn_22_2': functools.partial(wide_resnet.WideResNet, depth=22, width=2),
  'wrn_28_2': functools.partial(wide_resnet.WideResNet, depth=28, width=2),
  'wrn_16_8': functools.partial(wide_resnet.WideResNet, depth=16, width=8),
  'resnet_18': functools.partial(resnet.ResNet, depth=18),
  'resnet_50': functools.partial(resnet.ResNet, depth=50),
  'resnet_18_cifar': functools.partial(resnet.ResNet, depth=18, stem='cifar'),
  'resnet_50_cifar': functools.partial(resnet.ResNet, depth=50, stem='cifar'),
  'resnet_8': functools.partial(
    resnet.ResNet, depth=8, stem='cifar', name='resnet_8'
  ),
  'resnet_20': functools.partial(
    resnet.ResNet, depth=20, stem='cifar', name='resnet_20'
  ),
  'mobilenet_v2': mobilenet.MobileNetV2,
  'fixup_resnet_110': functools.partial(fixup.FixUpResNet, depth=110),
  'vit_tiny': functools.partial(
    transformer.ViT, num_blocks=12, num_heads=3, width=192, patch=4
  ),
  # For text.
  'gpt_small': functools.partial(
    transformer.GPT, num_blocks=4, num_heads=4, width=128, context=64
  ),
  'gpt_mini': functools.partial(
    transformer.GPT, num_blocks=6, num_heads=6, width=384, context=128
  ),
}

# What make knows.
NAMES = tuple(_MODULES)
# Those of text take integers [N, T] and give logits of each place.
TEXT_NAMES = ('gpt_small', 'gpt_mini')


def make(
  name: str,
  num_classes: int,
  *,
  dct: bool = False,
  w_init: hk.initializers.Initializer | None = None,
  method: Method = 'auto',
  variance: float = 1.0,
) -> hk.TransformedWithState:
  """A network as a pair of functions, ready for any image size.

  The function transformed is forward(images, is_training) -> logits:
  init(key, images, is_training) gives (theta, net_state), and
  apply(theta, net_state, key, images, is_training) gives (logits, net_state).
  Images are floats in [0, 1], [N, H, W, C]. The layer that computes the logits
  is called 'logits' in every network. The networks for text, TEXT_NAMES, take
  tokens [N, T], integers below num_classes, in the place of images.

  about says of each what it is.

  Only the wide residual networks need the key, in training, for their dropout,
  and raise a ValueError without one; for the others, and in evaluation, it may
  be None. The lenets, mlp, cnns, transformers and fixup_resnet_110 have an
  empty net_state and ignore is_training; the others normalise by batch, keep
  running statistics in net_state, and need a step in training before they can
  be evaluated.

  Args:
    dct: whether every linear and convolutional layer adds the fixed cosine
      transform of layers/dct.py, times a scale that is trained. That is the
      parameter 'transform_scale', which select.is_weight does not choose: masks
      concern the weights alone. These then start at 0. method is how the
      transform is computed: 'auto', 'matrix' or 'fft'.
    w_init: initialiser of the weights in place of the usual one. With dct and
      powerpropagation give one, since a weight at 0 never moves under α > 1;
      likewise for fixup_resnet_110, some of whose weights start at 0.
    variance: of the first weights, as a multiple of the usual one, greater than
      0. Layers that are sparse from the start want more, as few inputs are left
      to add up: at most one over their density.

  Example:
    >>> net = make('lenet_300_100', num_classes=10)
    >>> images = jax.numpy.zeros((2, 8, 8, 1))
    >>> theta, net_state = net.init(jax.random.key(0), images, True)
    >>> logits, _ = net.apply(theta, net_state, None, images, False)
    >>> logits.shape
    (2, 10)
  """
  _check_known(name)
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}.')
  if method != 'auto' and not dct:
    raise ValueError(
      f'method={method!r} is about the cosine transform. Pass dct=True too, or '
      'leave it out.'
    )
  if not 0 < variance < math.inf:
    raise ValueError(f'variance must be positive and finite, got {variance}.')
  form = forms.Form(dct, w_init, method, variance)

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    with forms.use(form):
      return _MODULES[name](num_classes)(images, is_training)

  return hk.transform_with_state(forward)


def about(name: str) -> str:
  """What a network is, in a line: that of its module, and its arguments.

  Example:
    >>> about('vgg_c')
    'Thirteen convolutions with five poolings, then one or two layers of 512;
    variant c.'
  """
  _check_known(name)
  module: Any = _MODULES[name]
  options: Mapping[str, object] = {}
  if isinstance(module, functools.partial):
    module, options = module.func, module.keywords
  line = str(module.__doc__).partition('\n')[0].rstrip('.')
  shown = ', '.join(
    key.replace('_', ' ') + ('' if value is True else f' {value}')
    for key, value in options.items()
    if key not in ('name', 'w_init')
  )
  return f'{line}; {shown}.' if shown else f'{line}.'


def _check_known(name: str) -> None:
  if name not in _MODULES:
    hint = names.hint(name, NAMES)
    raise ValueError(
      f'unknown network {name!r}.{hint} There are: {", ".join(NAMES)}.'
    )
