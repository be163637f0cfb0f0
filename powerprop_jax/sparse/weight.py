"""A weight as its connections: values, which are trained, and where they are.

A sparse layer in the masked form stores and trains a dense weight, of which a
mask keeps a few entries. Here those entries alone are stored. A Support says
where they are: `support` reads it from a mask, and `condense` and `expand` turn
the parameters of one form into those of the other. Products with such a weight
take the kernel that kernel_choice.py names.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Select
from powerprop_jax.sparse import convolution, kernel_choice, linear
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.kernel_choice import Convolution, Product, Task
from powerprop_jax.sparse.linear import Kernel
from powerprop_jax.sparse.plain_convolution import Window


class Support(NamedTuple):
  """Where the connections of one weight are.

  Attributes:
    positions: flat indices into the dense weight with its last axis first, so
      that the connections to an output are side by side; ascending, int32
      [nnz].
    shape: shape of the dense weight: [in, out] of a linear layer, [height,
      width, in, out] of a convolution.
  """

  positions: npt.NDArray[np.int32]
  shape: tuple[int, ...]

  def make_index(self) -> Index:
    """The connections sorted by output and by input."""
    shape = math.prod(self.shape[:-1]), self.shape[-1]
    return sparse_index.from_positions(self.positions, shape)


# Makes a network, of hk.transform_with_state, whose weights at these places are
# held without their zeros.
MakeNet: TypeAlias = Callable[[Mapping[str, Support]], Any]


class Condensed(NamedTuple):
  """A weight of this shape as its connections, inside a layer.

  Values [nnz] are sorted by output; where they are is said for the weight as a
  matrix [..., out].
  """

  values: jax.Array
  where: Index
  shape: tuple[int, ...]

  def dense(self) -> jax.Array:
    """The weight as a dense array, zero where there is no connection."""
    return linear.dense(self.values, self.where).reshape(self.shape)

  def kernel(
    self,
    x: jax.Array,
    *,
    name: str = '',
    among: Sequence[Kernel] = kernel_choice.KERNELS,
  ) -> Kernel:
    """The kernel for multiply; name and among as in kernel_choice.choose."""
    size, num_vectors = self.values.size, math.prod(x.shape[:-1])
    task = Product(*self.where.shape, size, num_vectors, str(x.dtype))
    return kernel_choice.choose(task, name=name, among=among)

  def multiply(
    self,
    x: jax.Array,
    kernel: Kernel,
    *,
    precision: lax.PrecisionLike = None,
  ) -> jax.Array:
    """Vectors [..., in] times the weight as a matrix, [..., out]."""
    if kernel == 'dense':
      matrix = linear.dense(self.values, self.where)
      return jnp.dot(x, matrix, precision=precision)
    return linear.product(x, self.values, self.where, kernel)

  def convolve(
    self, x: jax.Array, window: Window, *, name: str
  ) -> jax.Array | None:
    """Images [N, H, W, C] convolved by connections; None if dense is faster."""
    is_pointwise = window.height == window.width == 1
    if is_pointwise and not any(map(any, window.pads)):
      x = x[:, :: window.stride, :: window.stride]
      return self.multiply(x, self.kernel(x, name=name))
    dtype = str(jnp.promote_types(x.dtype, jnp.float32))
    size = self.values.size
    task = Convolution(x.shape, self.shape[-1], size, window, dtype)
    if kernel_choice.choose(task, name=name) != 'native':
      return None
    wide, values = (a.astype(jnp.float32) for a in (x, self.values))
    y = convolution.convolve(wide, values, self.where, window)
    return y.astype(x.dtype)


def gather(weight: jax.Array, where: Support) -> jax.Array:
  """The entries of a dense weight at the positions of a support, [nnz]."""
  return jnp.ravel(jnp.moveaxis(weight, -1, 0))[where.positions]


def support(mask: npt.ArrayLike) -> Support:
  """Where a mask, concrete and in the shape of the weight, is True.

  Raises:
    TypeError: if the mask is traced or not boolean.
    ValueError: if it has more entries than int32 can number.

  Example:
    >>> support(jnp.array([[True, False], [False, True]]))
    Support(positions=array([0, 3], dtype=int32), shape=(2, 2))
  """
  if trees.is_traced(mask):
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
  """Supports of the selected leaves, by 'module/name', in their order.

  Example:
    >>> supports({'linear': {'w': jnp.eye(2, dtype=bool)}})
    {'linear/w': Support(positions=array([0, 3], dtype=int32), shape=(2, 2))}
  """
  chosen = masks_lib.selected(masks, select)
  return {path: support(mask) for path, mask in chosen.items()}


def faster_supports(
  supports: Mapping[str, Support],
  make_net: MakeNet,
  *inputs: Any,
  backward: bool = True,
  **options: Any,
) -> dict[str, Support]:
  """The supports whose layers are faster here without their zeros.

  A layer with many connections is faster dense: hold what this leaves out
  dense, and condense the rest. Each shape is timed once on a machine, gradients
  included unless backward is False (kernel_choice.py), and as right as such a
  measurement is. On other processors than CPUs nothing is faster.

  Args:
    *inputs: of the network, or their shapes: what is faster depends on the
      batch.
    **options: other arguments of the network, e.g. is_training.

  Example:
    >>> from powerprop_jax import nets
    >>> make_net = lambda supports: nets.make('mlp', 2, supports=supports)
    >>> found = {'mlp/logits/w': support(jnp.eye(100, 2, dtype=bool))}
    >>> images = jnp.ones((1, 2, 2, 1))  # far too few
    >>> faster_supports(found, make_net, images, is_training=True)
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
) -> dict[str, Task]:
  """What the condensed layers of a network compute, without computing it.

  The arguments are those of faster_supports. There is a task for each layer
  that may as well be held dense, by 'module/w'.
  """
  net = make_net(supports)
  with kernel_choice.recorded() as tasks:
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(lambda k, *x: net.init(k, *x, **options), key, *inputs)
  return tasks


def condense(
  theta: Params,
  masks: masks_lib.Masks,
  *,
  select: Select = select_lib.is_weight,
) -> dict[str, dict[str, jax.Array]]:
  """Parameters of the condensed layers that compute what the masked ones do.

  Each selected leaf becomes the leaf 'values' of the same module; the others
  stay. The positions are state, not parameters: init of the network with
  supports(masks) gives a state that holds them. What a mask removes is left
  out, whatever its value.

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
    found[module]['values'] = gather(found[module].pop(name), where)
  return found


def expand(
  theta: Params, supports: Mapping[str, Support]
) -> dict[str, dict[str, jax.Array]]:
  """Undoes condense: dense parameters, zero where there is no connection.

  The supports are those of the masks that theta was condensed with.

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
    flat = jnp.zeros(math.prod(where.shape), values.dtype)
    flat = flat.at[jnp.asarray(where.positions)].set(
      values, indices_are_sorted=True, unique_indices=True, mode='drop'
    )
    by_output = flat.reshape(where.shape[-1], *where.shape[:-1])
    found[module][name] = jnp.moveaxis(by_output, 0, -1)
  return found
