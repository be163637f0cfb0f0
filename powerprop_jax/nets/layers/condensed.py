"""Layers that hold only the connections that exist: sparse/weight.py."""

from typing import Any

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.nets.layers import parts
from powerprop_jax.sparse.weight import Condensed, Support


class CondensedLinear(hk.Linear):
  """A sparse hk.Linear that holds only its connections.

  It computes what hk.Linear with a masked weight computes, and starts with the
  same weights, as the parameter 'values' [nnz]. Where its connections are is
  state, an index sorted by output and by input: 'positions', 'in_positions' and
  'order' [nnz], 'offsets' and 'in_offsets' (sparse.index.Index). The product
  takes the kernel that kernel_choice.choose names when the program is traced.
  It cannot be differentiated in forward mode.

  The network must be transformed with hk.transform_with_state; the init of
  hk.transform refuses modules with a state.

  The arguments are those of hk.Linear, and support, of shape [in, out].

  Example:
    >>> where = pp.nets.supports({'a': {'w': jnp.eye(2, dtype=bool)}})['a/w']
    >>> net = hk.transform_with_state(
    ...   lambda x: CondensedLinear(2, support=where)(x))
    >>> theta, net_state = net.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> theta['condensed_linear']['values'].shape
    (2,)
    >>> net_state['condensed_linear']['positions']
    Array([0, 3], dtype=int32)
  """

  def __init__(self, *args: Any, support: Support, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._support = support

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Outputs [..., output_size] of inputs [..., features]."""
    shape = (inputs.shape[-1], self.output_size)
    init = parts.usual_init(self, shape)
    weight = parts.condensed_weight(shape, inputs.dtype, init, self._support)
    kernel = weight.kernel(inputs, name=_name())
    y = weight.multiply(inputs, kernel, precision=precision)
    return parts.add_bias(self, y)


class CondensedConv2D(hk.Conv2D):
  """A sparse hk.Conv2D that holds only its connections.

  As CondensedLinear; a 1 × 1 kernel is a product at every place. Kernels of
  other sizes skip their zeros where there is a compiled kernel for it
  (sparse/convolution.py): on a CPU, without groups or dilation, channels last.
  Elsewhere the layer makes a transient dense copy of its kernel. On a CPU it
  cannot be differentiated in forward mode.

  The arguments are those of hk.Conv2D, but no mask, and support, of the shape
  of the kernel, [height, width, in / groups, out].

  Example:
    >>> mask = jnp.ones((3, 3, 1, 2), bool).at[0].set(False)
    >>> where = pp.nets.supports({'a': {'w': mask}})['a/w']
    >>> net = hk.transform_with_state(
    ...   lambda x: CondensedConv2D(2, 3, support=where)(x))
    >>> theta, _ = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    >>> theta['condensed_conv2_d']['values'].shape
    (12,)
  """

  def __init__(self, *args: Any, support: Support, **kwargs: Any):
    super().__init__(*args, **kwargs)
    parts.check_no_mask(self)
    self._support = support

  def __call__(
    self, inputs: jax.Array, *, precision: lax.PrecisionLike = None
  ) -> jax.Array:
    """Activations of an image or a batch of images, in the data format."""
    shape = parts.kernel_shape(self, inputs)
    init = parts.usual_init(self, shape)
    weight = parts.condensed_weight(shape, inputs.dtype, init, self._support)
    y = self._convolve_connections(inputs, weight)
    if y is None:
      y = parts.convolve(self, inputs, weight.dense(), precision)
    return parts.add_bias(self, y)

  def _convolve_connections(
    self, inputs: jax.Array, weight: Condensed
  ) -> jax.Array | None:
    if not parts.is_plain(self):
      return None
    x = inputs[jnp.newaxis] if inputs.ndim == 3 else inputs
    window = parts.window(self, x.shape[1:3])
    y = weight.convolve(x, window, name=_name())
    return y[0] if y is not None and inputs.ndim == 3 else y


def _name() -> str:
  """Of the weight of the module that calls, were it held dense."""
  return f'{hk.current_name()}/w'
