"""Layers that hold only the connections that exist.

A sparse layer in the masked form stores and trains a dense weight, of which a
mask keeps a few entries. The layers here store those entries alone
(sparse_weight.py says how). A support says where the connections of a layer
are: `support` reads it from a mask, and `condense` and `expand` turn the
parameters of one form into those of the other.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, TypeAlias

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Select, Tree
from powerprop_jax.nets import layer_parts
from powerprop_jax.sparse import (
  convolution,
  kernel_choice,
  linear,
)
from powerprop_jax.sparse import (
  weight as sparse_weight,
)
from powerprop_jax.sparse.convolution import Window
from powerprop_jax.sparse.kernel_choice import Convolution, Product
from powerprop_jax.sparse.weight import Condensed, Support

# A network whose weights at these places are held without their zeros.
MakeNet: TypeAlias = Callable[[Mapping[str, Support]], hk.TransformedWithState]


def support(mask: Tree) -> Support:
  """Where a mask is True.

  Args:
    mask: concrete booleans in the shape of the weight.

  Returns:
    The support; a mask that is False everywhere has an empty one.

  Raises:
    TypeError: if the mask is traced or not boolean.
    ValueError: if it has more entries than int32 can number.

  Example:
    >>> support(jnp.array([[True, False], [False, True]]))
    Support(positions=array([0, 3], dtype=int32), shape=(2, 2))
  """
  if isinstance(mask, jax.core.Tracer):
    raise TypeError(
      'support needs a concrete mask, got a traced one: the number of '
      'connections is part of the program. Call it outside of jit.'
    )
  entries = np.asarray(mask)
  if entries.dtype != bool:
    raise TypeError(f'mask must be boolean, got {entries.dtype}.')
  if entries.size > np.iinfo(np.int32).max:
    raise ValueError(
      f'a mask of shape {entries.shape} has more entries than int32 can '
      'number; split the layer.'
    )
  by_output = np.moveaxis(entries, -1, 0) if entries.ndim else entries
  positions = np.flatnonzero(by_output).astype(np.int32)
  return Support(positions, entries.shape)


def supports(
  masks: masks_lib.Masks, *, select: Select = select_lib.is_weight
) -> dict[str, Support]:
  """Supports of the selected leaves, by 'module/name'.

  Args:
    masks: concrete masks.
    select: which leaves, by (module name, name, value).

  Returns:
    A support for each selected leaf, in the order of the leaves.

  Raises:
    TypeError: if a selected mask is traced or not boolean.
    ValueError: if select selects nothing.

  Example:
    >>> supports({'linear': {'w': jnp.eye(2, dtype=bool)}})
    {'linear/w': Support(positions=array([0, 3], dtype=int32), shape=(2, 2))}
  """
  # Predicates look at floating-point parameters.
  parameters = jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(jnp.shape(m), jnp.float32), masks
  )
  names = select_lib.selected_names(select, parameters)
  leaves = trees.by_path(masks)
  return {path: support(leaves[path]) for path in names}


def faster_supports(
  supports: Mapping[str, Support],
  make_net: MakeNet,
  *inputs: Any,
  backward: bool = True,
  **options: Any,
) -> dict[str, Support]:
  """The supports whose layers are faster here without their zeros.

  A layer with many connections is faster dense: hold what this leaves out
  dense, and condense the rest. Each shape is timed once on a machine
  (kernel_choice.py), and as right as such a measurement is.

  Args:
    supports: of the layers in question, by 'module/name'.
    make_net: makes the network whose layers hold these supports.
    *inputs: of the network, or their shapes: what is faster depends on the
      batch.
    backward: whether gradients are taken too; False for inference.
    **options: other arguments of the network, e.g. is_training.

  Returns:
    Those of the supports that are worth it, none on other processors than CPUs.

  Example:
    >>> def make_net(supports):
    ...   where = supports['linear/w']
    ...   return hk.transform_with_state(
    ...     lambda x: CondensedLinear(2, support=where, name='linear')(x))
    >>> found = {'linear/w': support(jnp.eye(2, dtype=bool))}
    >>> faster_supports(found, make_net, jnp.ones((1, 2)))  # far too small
    {}
  """
  tasks = products(supports, make_net, *inputs, **options)
  return {
    path: where
    for path, where in supports.items()
    if path in tasks and kernel_choice.pays(tasks[path], backward=backward)
  }


def products(
  supports: Mapping[str, Support],
  make_net: MakeNet,
  *inputs: Any,
  **options: Any,
) -> dict[str, Product | Convolution]:
  """What the condensed layers of a network compute, without computing it.

  Args:
    supports: of the layers, by 'module/name'.
    make_net: makes the network whose layers hold these supports.
    *inputs: of the network, or their shapes.
    **options: other arguments of the network, e.g. is_training.

  Returns:
    A product or a convolution for each layer that holds its connections with an
    index, by 'module/w'.
  """
  net = make_net(supports)
  with kernel_choice.recorded() as tasks:
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(lambda k, *x: net.init(k, *x, **options), key, *inputs)
  return tasks


def condense(
  theta: hk.Params,
  masks: masks_lib.Masks,
  *,
  select: Select = select_lib.is_weight,
) -> dict[str, dict[str, jax.Array]]:
  """Parameters of the condensed layers that compute what the masked ones do.

  Each selected leaf becomes the leaf 'values' of the same module; the others
  stay. The positions are state, not parameters: init of the network with
  supports(masks) gives a state that holds them.

  Args:
    theta: effective parameters, as Haiku has them; what a mask removes is left
      out, whatever its value.
    masks: concrete masks of the same structure and shapes.
    select: which leaves, by (module name, name, value).

  Returns:
    The condensed parameters.

  Raises:
    TypeError: if a selected mask is traced or not boolean.
    ValueError: if shapes differ, if select selects nothing, or if it selects
      two leaves of one module.

  Example:
    >>> condense({'linear': {'w': jnp.array([[1., 2.], [3., 4.]])}},
    ...          {'linear': {'w': jnp.eye(2, dtype=bool)}})
    {'linear': {'values': Array([1., 4.], dtype=float32)}}
  """
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  found = {module: dict(leaves) for module, leaves in theta.items()}
  for path, where in supports(masks, select=select).items():
    module, _, name = path.rpartition('/')
    if 'values' in found[module]:
      raise ValueError(
        f'{module} has two selected leaves, or one called values already; a '
        'condensed layer holds one weight. Select one with select.'
      )
    weight = found[module].pop(name)
    found[module]['values'] = sparse_weight.gather(weight, where.positions)
  return found


def expand(
  theta: hk.Params, supports: Mapping[str, Support]
) -> dict[str, dict[str, jax.Array]]:
  """Undoes condense: dense parameters, zero where there is no connection.

  Args:
    theta: condensed parameters.
    supports: those of the masks that they were condensed with.

  Returns:
    Parameters of the dense network.

  Raises:
    ValueError: if a support has no values, or another number of them.

  Example:
    >>> expand({'linear': {'values': jnp.array([1., 4.])}},
    ...        {'linear/w': support(jnp.eye(2, dtype=bool))})['linear']['w']
    Array([[1., 0.],
           [0., 4.]], dtype=float32)
  """
  found = {module: dict(leaves) for module, leaves in theta.items()}
  for path, where in supports.items():
    module, _, name = path.rpartition('/')
    values = found.get(module, {}).pop('values', None)
    if values is None or values.shape != where.positions.shape:
      have = 'has none' if values is None else f'has {values.size}'
      raise ValueError(
        f'the support {path!r} needs {where.positions.size} values and '
        f'{module!r} {have}. Pass the supports that the parameters were '
        'condensed with.'
      )
    positions = jnp.asarray(where.positions)
    found[module][name] = sparse_weight.dense(
      Condensed(values, positions, where.shape)
    )
  return found


class CondensedLinear(hk.Linear):
  """A sparse hk.Linear that holds only its connections.

  It computes what hk.Linear with a masked weight computes, and starts with the
  same weights, as the parameter 'values' [nnz]. Where its connections are is
  state, an index sorted by output and by input: 'positions', 'in_positions' and
  'order' [nnz], 'offsets' and 'in_offsets' (sparse_index.Index). The product
  takes the kernel that kernel_choice.choose names when the program is traced.
  It cannot be differentiated in forward mode.

  The network must be transformed with hk.transform_with_state; the init of
  hk.transform refuses modules with a state.

  Args:
    *args: as hk.Linear.
    support: where the connections are, of shape [in, out].
    **kwargs: as hk.Linear.

  Example:
    >>> where = support(jnp.array([[True, False], [False, True]]))
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
    self, inputs: jax.Array, *, precision: lax.Precision | None = None
  ) -> jax.Array:
    """Outputs [..., output_size] of inputs [..., features]."""
    shape = (inputs.shape[-1], self.output_size)
    weight = _weight(self, shape, inputs.dtype, self._support)
    return layer_parts.add_bias(self, _multiply(inputs, weight, precision))


class CondensedConv2D(hk.Conv2D):
  """A sparse hk.Conv2D that holds only its connections.

  As CondensedLinear; a 1 × 1 kernel is a product at every place. Kernels of
  other sizes skip their zeros where there is a compiled kernel for it
  (sparse_convolution.py): on a CPU, without groups or dilation, channels last.
  Elsewhere the layer makes a transient dense copy of its kernel. On a CPU it
  cannot be differentiated in forward mode.

  Args:
    *args: as hk.Conv2D.
    support: where the connections are, of the shape of the kernel, [height,
      width, in / groups, out].
    **kwargs: as hk.Conv2D, but no mask.

  Example:
    >>> where = support(jnp.ones((3, 3, 1, 2), bool).at[0].set(False))
    >>> net = hk.transform_with_state(
    ...   lambda x: CondensedConv2D(2, 3, support=where)(x))
    >>> theta, _ = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    >>> theta['condensed_conv2_d']['values'].shape
    (12,)
  """

  def __init__(self, *args: Any, support: Support, **kwargs: Any):
    super().__init__(*args, **kwargs)
    layer_parts.check_no_mask(self)
    self._support = support

  def __call__(
    self, inputs: jax.Array, *, precision: lax.Precision | None = None
  ) -> jax.Array:
    """Activations of an image or a batch of images, in the data format."""
    shape = layer_parts.kernel_shape(self, inputs)
    weight = _weight(self, shape, inputs.dtype, self._support)
    y = self._convolve(inputs, weight, precision)
    return layer_parts.add_bias(self, y)

  def _convolve(
    self,
    inputs: jax.Array,
    weight: Condensed,
    precision: lax.Precision | None,
  ) -> jax.Array:
    """The layer without bias."""
    if layer_parts.is_plain(self):
      x = inputs[jnp.newaxis] if inputs.ndim == 3 else inputs
      window = layer_parts.window(self, x.shape[1:3])
      y = _convolve(x, weight, window)
      if y is not None:
        return y[0] if inputs.ndim == 3 else y
    kernel = sparse_weight.dense(weight)
    return layer_parts.convolve(self, inputs, kernel, precision)


def _weight(
  module: hk.Linear | hk.Conv2D,
  shape: tuple[int, ...],
  dtype: Any,
  support: Support,
) -> Condensed:
  init = module.w_init or _usual_init(shape)
  weight = sparse_weight.get_weight(shape, dtype, init, support, has_index=True)
  assert isinstance(weight, Condensed)
  return weight


def _multiply(
  x: jax.Array, weight: Condensed, precision: lax.Precision | None
) -> jax.Array:
  """x [..., in] times the weight, by the kernel that is fastest here."""
  assert weight.connections is not None
  num_in, num_out = weight.connections.shape
  kernel = kernel_choice.choose(
    Product(
      num_in,
      num_out,
      weight.values.size,
      math.prod(x.shape[:-1]),
      str(x.dtype),
    )
  )
  if kernel == 'dense':
    dense = sparse_weight.dense(weight).reshape(num_in, num_out)
    return jnp.dot(x, dense, precision=precision)
  return linear.product(x, weight.values, weight.connections, kernel)


def _convolve(
  x: jax.Array, weight: Condensed, window: Window
) -> jax.Array | None:
  """Images [N, H, W, C] convolved without making the kernel dense, if it pays.

  Returns:
    The images, or None if a dense kernel is to be used.
  """
  assert weight.connections is not None
  is_pointwise = window.height == window.width == 1
  if is_pointwise and not any(map(any, window.pads)):
    x = x[:, :: window.stride, :: window.stride]
    return _multiply(x, weight, None)
  kernel = kernel_choice.choose(
    Convolution(x.shape, weight.shape[-1], weight.values.size, window)
  )
  if kernel != 'native' or x.dtype == jnp.float64:
    return None
  y = convolution.convolve(
    x.astype(jnp.float32),
    weight.values.astype(jnp.float32),
    weight.connections,
    window,
  )
  return y.astype(x.dtype)


def _usual_init(shape: tuple[int, ...]) -> hk.initializers.Initializer:
  """What Haiku draws weights from where it is told nothing."""
  return hk.initializers.TruncatedNormal(1 / math.sqrt(math.prod(shape[:-1])))
