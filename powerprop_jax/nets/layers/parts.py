"""What hk.Linear and hk.Conv2D do around their weight, for weights of ours.

The functions take the module for its settings: window, strides, dilation,
padding, groups, data format, mask and bias mean what they mean in Haiku. Inputs
of a convolution are an image or a batch of images, in its data format.
"""

from collections.abc import Sequence
import math
from typing import Any

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import jax.typing

from powerprop_jax.sparse import plain_convolution
from powerprop_jax.sparse.plain_convolution import Window

Layer = hk.Linear | hk.Conv2D


def kernel_shape(
  module: hk.Conv2D, inputs: jax.Array
) -> tuple[int, int, int, int]:
  """Shape [height, width, in / groups, out] of the kernel for these inputs."""
  if inputs.ndim not in (3, 4):
    raise ValueError(
      f'{module.module_name} needs an image or a batch of images, of rank 3 or '
      f'4, got shape {inputs.shape}.'
    )
  num_in = inputs.shape[-1 if module.channel_index == -1 else -3]
  num_out, num_groups = module.output_channels, module.feature_group_count
  for size, which in ((num_in, 'input'), (num_out, 'output')):
    if size % num_groups:
      raise ValueError(
        f'feature_group_count of {module.module_name} must divide its {size} '
        f'{which} channels, got {num_groups}.'
      )
  height, width = module.kernel_shape
  return height, width, num_in // num_groups, num_out


def masked(module: hk.Conv2D, kernel: jax.Array) -> jax.Array:
  """The kernel times the mask that the module was built with, if any."""
  if module.mask is None:
    return kernel
  if module.mask.shape != kernel.shape:
    raise ValueError(
      f'the mask of {module.module_name} must have the shape of its kernel, '
      f'{kernel.shape}, got {module.mask.shape}.'
    )
  return kernel * module.mask


def convolve(
  module: hk.Conv2D,
  inputs: jax.Array,
  kernel: jax.Array,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  """Convolution of inputs with a kernel [height, width, in / groups, out].

  On a CPU it is plain_convolution.convolve where that is the same, which cannot
  be differentiated in forward mode.
  """
  x = inputs[jnp.newaxis] if inputs.ndim == 3 else inputs
  on_cpu = jax.default_backend() == 'cpu'
  if on_cpu and is_plain(module) and precision is None:
    y = plain_convolution.convolve(x, kernel, window(module, x.shape[1:3]))
  else:
    y = lax.conv_general_dilated(
      x,
      kernel,
      window_strides=module.stride,
      padding=module.padding,
      rhs_dilation=module.kernel_dilation,
      dimension_numbers=module.dimension_numbers,
      feature_group_count=module.feature_group_count,
      precision=precision,
    )
  return y[0] if inputs.ndim == 3 else y


def is_plain(module: hk.Conv2D) -> bool:
  """Whether it has no groups, no dilation, one stride and channels last."""
  return (
    module.channel_index == -1
    and module.feature_group_count == 1
    and set(module.kernel_dilation) == {1}
    and len(set(module.stride)) == 1
  )


def window(module: hk.Conv2D, image_shape: Sequence[int]) -> Window:
  """How the kernel of a plain convolution moves over [height, width]."""
  height, width = module.kernel_shape
  return Window(height, width, module.stride[0], _pads(module, image_shape))


def _pads(
  module: hk.Conv2D, image_shape: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
  """Zeros before and after, for the height and for the width."""
  pads: Any = module.padding
  if isinstance(pads, str):
    window = [
      (length - 1) * rate + 1
      for length, rate in zip(
        module.kernel_shape, module.kernel_dilation, strict=True
      )
    ]
    pads = lax.padtype_to_pads(image_shape, window, module.stride, pads)
  (top, bottom), (left, right) = pads
  return (int(top), int(bottom)), (int(left), int(right))


def add_bias(module: Layer, y: jax.Array) -> jax.Array:
  """Outputs plus the bias of the module, the parameter 'b', if it has one."""
  if not module.with_bias:
    return y
  channels_first = isinstance(module, hk.Conv2D) and module.channel_index != -1
  shape = (y.shape[-3], 1, 1) if channels_first else (y.shape[-1],)
  b = hk.get_parameter('b', shape, y.dtype, init=module.b_init)
  return y + jnp.broadcast_to(b, y.shape)


def usual_init(
  module: Layer, shape: Sequence[int]
) -> hk.initializers.Initializer:
  """The initialiser of the weight, which is Haiku's where there is none."""
  std = 1 / math.sqrt(math.prod(shape[:-1]))
  return module.w_init or hk.initializers.TruncatedNormal(std)
