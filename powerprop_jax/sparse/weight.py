"""A weight of a layer, dense or as its connections, and products with it.

The condensed form holds the values of the connections that exist, which are
trained, and their positions, which are fixed. The values are the parameter
'values' of a module and the positions its Haiku state 'positions', so that a
checkpoint holds both and the memory of values, gradients and optimiser slots
grows with the connections, not with the dense weight.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple, TypeAlias

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core.trees import Tree
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import linear
from powerprop_jax.sparse.index import Index


class Support(NamedTuple):
  """Where the connections of one weight are.

  Attributes:
    positions: flat indices into the dense weight with its last axis first, so
      that the connections to an output are side by side; ascending, int32
      [nnz].
    shape: shape of the dense weight: [in, out] of a linear layer, [height,
      width, in, out] of a convolution.
  """

  positions: np.ndarray[Any, Any]
  shape: tuple[int, ...]


class Condensed(NamedTuple):
  """A weight as its connections, inside a layer.

  Attributes:
    values: the weights of the connections, [nnz].
    positions: as in Support, but possibly traced.
    shape: shape of the dense weight.
    connections: as the kernels of products want them; None if the layer has no
      index.
  """

  values: jax.Array
  positions: jax.Array
  shape: tuple[int, ...]
  connections: Index | None = None


# What a layer multiplies with: dense, or as its connections.
Weight: TypeAlias = jax.Array | Condensed


def get_weight(
  shape: Sequence[int],
  dtype: Any,
  init: hk.initializers.Initializer,
  support: Support | None,
  *,
  has_index: bool = False,
) -> Weight:
  """The weight of the Haiku module that calls: dense, or its connections.

  Args:
    shape: shape of the dense weight.
    dtype: dtype of the weight.
    init: initialiser of the dense weight. For the condensed form it makes a
      dense weight in init, and the values are gathered from it, so that both
      forms of a network start the same from the same key.
    support: where the connections are; None for the dense form.
    has_index: whether to keep an index of the connections as state too, under
      the names of the fields of sparse_index.Index.

  Returns:
    The parameter 'w', or the parameter 'values' with the state 'positions'.

  Raises:
    ValueError: if the support does not fit the shape, or in apply if the state
      of the network does not have the positions.
  """
  if support is None:
    return hk.get_parameter('w', shape, dtype, init=init)
  module = hk.current_name()
  shape = tuple(shape)
  _check_support(support, shape, module)

  def init_values(_: Any, dtype: Any) -> jax.Array:
    return gather(init(shape, dtype), support.positions)

  def get_state(name: str, size: int) -> jax.Array:
    def init_state(*_: Any) -> jax.Array:
      if not hk.running_init():
        raise ValueError(
          f'{module} keeps the positions of its connections as {name!r} in '
          'the state of the network, which has none. Transform the network '
          'with hk.transform_with_state and pass apply the state that init '
          'gave.'
        )
      if name == 'positions':
        return jnp.asarray(support.positions)
      return jnp.asarray(getattr(_index(support), name))

    return hk.get_state(name, (size,), jnp.int32, init=init_state)

  size = support.positions.size
  values = hk.get_parameter('values', (size,), dtype, init=init_values)
  positions = get_state('positions', size)
  if not has_index:
    return Condensed(values, positions, shape)
  num_in, num_out = math.prod(shape[:-1]), shape[-1]
  index = Index(
    offsets=get_state('offsets', num_out + 1),
    positions=positions,
    in_offsets=get_state('in_offsets', num_in + 1),
    in_positions=get_state('in_positions', size),
    order=get_state('order', size),
  )
  return Condensed(values, positions, shape, index)


def gather(weight: jax.Array, positions: Tree) -> jax.Array:
  """The entries of a dense weight at the positions of a Support."""
  return jnp.ravel(jnp.moveaxis(weight, -1, 0))[positions]


def _index(support: Support) -> Index:
  shape = support.shape
  return sparse_index.from_positions(
    support.positions, (math.prod(shape[:-1]), shape[-1])
  )


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
      f'[0, {size}). Make supports with condensed.support.'
    )


def dense(weight: Weight) -> jax.Array:
  """The weight as a dense array, zero where there is no connection."""
  if not isinstance(weight, Condensed):
    return weight
  if weight.connections is not None:
    return linear.dense(weight.values, weight.connections).reshape(weight.shape)
  flat = jnp.zeros(math.prod(weight.shape), weight.values.dtype)
  flat = flat.at[weight.positions].set(
    weight.values, indices_are_sorted=True, unique_indices=True, mode='drop'
  )
  flat = flat.reshape(weight.shape[-1], *weight.shape[:-1])
  return jnp.moveaxis(flat, 0, -1)


def use_gathers(weight: Weight, num_vectors: int) -> bool:
  """Whether gathered_product is faster than a product with a dense copy.

  On two CPU cores a gathered product, forward and backward, took about 10 ns
  for each connection and vector; one with a dense copy 0.035 ns for each entry
  of the weight and vector and, for making the copy and gathering its gradient,
  1.2 ns for each entry. So a batch of 128 is gathered below a density of about
  0.005 and a single vector below 0.12. Other backends have not been measured.

  Args:
    weight: the weight.
    num_vectors: how many vectors are multiplied.

  Returns:
    True if the gathers take less time, by this count; never for a dense weight.
  """
  if not isinstance(weight, Condensed):
    return False
  size = math.prod(weight.shape)
  gathered = 10 * weight.values.size * num_vectors
  return gathered < size * (0.035 * num_vectors + 1.2)


def product(
  x: jax.Array,
  weight: Weight,
  *,
  by_gathers: bool,
  precision: lax.Precision | None = None,
) -> jax.Array:
  """x times the weight of a linear layer.

  Args:
    x: vectors [..., in].
    weight: of shape [in, out].
    by_gathers: whether to do it connection by connection, if weight is
      condensed, instead of with a dense copy.
    precision: of a product with a dense array, as in jax.numpy.dot.

  Returns:
    Vectors [..., out].
  """
  if by_gathers and isinstance(weight, Condensed):
    return gathered_product(x, weight)
  return jnp.dot(x, dense(weight), precision=precision)


def gathered_product(
  x: jax.Array, weight: Condensed, *, num_groups: int = 1
) -> jax.Array:
  """x times a condensed weight, connection by connection.

  No array in the size of the dense weight is made; temporary ones have an entry
  for each connection and vector.

  Args:
    x: vectors [..., num_groups * n_in], the groups one after the other.
    weight: of shape [..., n_out], where n_in is the product of the other
      lengths. The columns are shared out among the groups, the first ones to
      the first group, and multiply its part of x.
    num_groups: a divisor of n_out.

  Returns:
    Vectors [..., n_out].
  """
  num_out = weight.shape[-1]
  num_in = math.prod(weight.shape[:-1])
  columns, rows = jnp.divmod(weight.positions, num_in)
  if num_groups > 1:
    rows += num_in * (columns // (num_out // num_groups))
  # Sums of half precision numbers lose more than those of a matrix product,
  # which adds up in float32.
  wide = jnp.promote_types(x.dtype, jnp.float32)
  # A vector per connection, so that what is gathered lies side by side.
  by_feature = x.reshape(-1, x.shape[-1]).T.astype(wide)
  terms = by_feature[rows] * weight.values.astype(wide)[:, jnp.newaxis]
  y = jax.ops.segment_sum(
    terms, columns, num_out, indices_are_sorted=True
  ).astype(x.dtype)
  return y.T.reshape(*x.shape[:-1], num_out)
