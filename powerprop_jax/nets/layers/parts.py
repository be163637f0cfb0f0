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
import numpy as np

from powerprop_jax.sparse import plain_convolution
from powerprop_jax.sparse import weight as sparse_weight
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.plain_convolution import Window
from powerprop_jax.sparse.weight import Condensed, Support

Layer = hk.Linear | hk.Conv2D


def condensed_weight(
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike,
  init: hk.initializers.Initializer,
  support: Support,
) -> Condensed:
  """The weight of the module that calls, as its connections.

  The values are the parameter 'values' and where they are is Haiku state under
  the names of the fields of sparse.index.Index, so that a checkpoint holds both
  and the memory of values, gradients and optimiser slots grows with the
  connections, not with the dense weight.

  Args:
    init: initialiser of the dense weight; in init one is made, and the values
      are gathered from it, so that both forms of a network start the same from
      the same key.
  """
  module = hk.current_name()
  _check_support(support, shape, module)
  size, num_in = support.positions.size, math.prod(shape[:-1])

  def init_values(_: Any, dtype: Any) -> jax.Array:
    return sparse_weight.gather(init(shape, dtype), support)

  # Made only in init, where it is needed.
  made: list[Index] = []

  def get_state(name: str, length: int) -> jax.Array:
    def init_state(*_: Any) -> jax.Array:
      if not hk.running_init():
        raise ValueError(
          f'{module} keeps the positions of its connections as {name!r} in '
          'the state of the network, which has none. Transform the network '
          'with hk.transform_with_state and pass apply the state that init '
          'gave.'
        )
      if not made:
        made.append(support.make_index())
      found: jax.Array = getattr(made[0], name)
      return found

    return hk.get_state(name, (length,), jnp.int32, init=init_state)

  values = hk.get_parameter('values', (size,), dtype, init=init_values)
  index = Index(
    positions=get_state('positions', size),
    offsets=get_state('offsets', shape[-1] + 1),
    in_offsets=get_state('in_offsets', num_in + 1),
    in_positions=get_state('in_positions', size),
    order=get_state('order', size),
  )
  return Condensed(values, index, shape)


def _check_support(
  support: Support, shape: tuple[int, ...], module: str
) -> None:
  if tuple(support.shape) != shape:
    raise ValueError(
      f'{module} has a weight of shape {shape} and was given a support of '
      f'shape {tuple(support.shape)}. Take it from the mask of that weight.'
    )
  size = math.prod(shape)
  # As int64: differences of int32 could wrap around.
  steps = np.diff(support.positions.astype(np.int64), prepend=-1, append=size)
  if (steps < 1).any():
    raise ValueError(
      f'the positions of the support of {module} must be ascending and in '
      f'[0, {size}). Make supports with nets.support.'
    )


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


def check_no_mask(module: hk.Conv2D) -> None:
  """Refuses a mask beside a support."""
  if module.mask is not None:
    raise ValueError(
      f'{module.module_name} has a support and a mask. Pass the support of the '
      'connections that are left: support(mask).'
    )


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


def patches(module: hk.Conv2D, inputs: jax.Array) -> jax.Array:
  """What lies under the kernel at each of its places.

  Returns:
    [..., H', W', groups, height * width * in / groups], whatever the data
    format; each patch in the order (row, column, channel), channel fastest.
  """
  height, width, num_in, _ = kernel_shape(module, inputs)
  x = inputs[jnp.newaxis] if inputs.ndim == 3 else inputs
  if module.channel_index != -1:
    x = x.transpose(0, 2, 3, 1)
  vertical, horizontal = _pads(module, x.shape[1:3])
  pads = [(0, 0, 0), (*vertical, 0), (*horizontal, 0), (0, 0, 0)]
  x = lax.pad(x, jnp.zeros([], x.dtype), pads)
  # One strided view of the images for each entry of the kernel.
  rows, columns = (
    [
      slice(offset, offset + size - (length - 1) * rate, stride)
      for offset in range(0, length * rate, rate)
    ]
    for size, length, rate, stride in zip(
      x.shape[1:3],
      (height, width),
      module.kernel_dilation,
      module.stride,
      strict=True,
    )
  )
  views = [x[:, row, column] for row in rows for column in columns]
  found = jnp.stack(views, axis=3)
  num_groups = module.feature_group_count
  found = found.reshape(*found.shape[:4], num_groups, num_in).swapaxes(3, 4)
  found = found.reshape(*found.shape[:4], height * width * num_in)
  return found[0] if inputs.ndim == 3 else found


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
