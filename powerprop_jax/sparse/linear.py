"""Products with a sparse matrix, by one of several kernels.

  native    compiled for this processor (sparse/native); float32 on a CPU
  loops     a loop over the connections of all outputs side by side, in plain
            JAX: wherever XLA runs
  dense     a transient dense copy of the weight, and an ordinary product

All compute the same product with the same gradients. Which is fastest depends
on the density above all: kernel_choice.py has a rule, tuning.py finds out.
"""

from collections.abc import Callable
import math
from typing import Literal, get_args

import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.core import names
from powerprop_jax.sparse import native
from powerprop_jax.sparse.index import Index

Kernel = Literal['native', 'loops', 'dense']
_Saved = tuple[jax.Array, jax.Array, Index]

# Vectors in a tile of the compiled kernels.
_TILE = 64
# Connections of each output that one turn of a loop adds.
_UNROLLED = 4


def product(
  x: jax.Array, values: jax.Array, index: Index, kernel: Kernel
) -> jax.Array:
  """Vectors x [..., in] times a sparse matrix, [..., out] in the dtype of x.

  The values [nnz] of the connections are sorted by output. It can be
  differentiated in reverse mode, once, with respect to x and values; the
  gradients take the same kernel. Sums of half precision numbers are made in
  float32. Under vmap 'native' goes through the batch one by one.

  Example:
    >>> from powerprop_jax.sparse import index
    >>> index = index.from_positions([1, 2], (2, 2))
    >>> product(jnp.array([[1., 2.]]), jnp.array([10., 20.]), index, 'loops')
    Array([[20., 20.]], dtype=float32)
  """
  names.check_choice('kernel', kernel, get_args(Kernel))
  num_in, num_out = index.shape
  if x.shape[-1] != num_in or values.shape != index.positions.shape:
    raise ValueError(
      f'x {x.shape} and values {values.shape} do not fit a matrix of shape '
      f'{index.shape} with {index.positions.size} connections.'
    )
  flat = jnp.asarray(x).reshape(-1, num_in)
  if not values.size or not flat.size:
    return jnp.zeros((*x.shape[:-1], num_out), x.dtype)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  flat, values = flat.astype(wide), values.astype(wide)
  if kernel == 'native' and wide == jnp.float32:
    y = _native(flat, values, index)
  elif kernel == 'dense':
    y = flat @ dense(values, index)
  else:
    y = _loops(flat, values, index)
  return y.reshape(*x.shape[:-1], num_out).astype(x.dtype)


def dense(values: jax.Array, index: Index) -> jax.Array:
  """The matrix [in, out] of connections sorted by output, [nnz]."""
  num_in, num_out = index.shape
  flat = jnp.zeros(math.prod(index.shape), values.dtype)
  # Added, for what is left over lies on other connections.
  used = jnp.where(is_used(index), values, 0)
  flat = flat.at[index.positions].add(
    used, indices_are_sorted=True, mode='promise_in_bounds'
  )
  return flat.reshape(num_out, num_in).T


def scatter(values: jax.Array, index: Index) -> jax.Array:
  """As dense, row by row: for a copy that is kept, and few connections.

  dense writes column by column and calls the result turned, which a product
  does not mind; any other use has to turn it.
  """
  flat = jnp.zeros(math.prod(index.shape), values.dtype)
  by_input = values.at[index.order].get(mode='clip')
  used = jnp.where(is_used(index), by_input, jnp.zeros_like(by_input))
  flat = flat.at[index.in_positions].add(
    used, indices_are_sorted=True, mode='promise_in_bounds'
  )
  return flat.reshape(index.shape)


def gather(weight: jax.Array, index: Index) -> jax.Array:
  """Undoes scatter; what there is only room for is zero."""
  by_input = weight.reshape(-1).at[index.in_positions].get(mode='clip')
  order = jnp.where(is_used(index), index.order, index.order.size)
  values = jnp.zeros(index.order.shape, weight.dtype)
  return values.at[order].set(by_input, mode='drop')


def is_used(index: Index) -> jax.Array:
  """Which of the connections that there is room for exist, booleans [nnz]."""
  return jnp.arange(index.positions.size) < index.offsets[-1]


@jax.custom_vjp
def _native(x: jax.Array, values: jax.Array, index: Index) -> jax.Array:
  return _native_forward(x, values, index)[0]


def _native_forward(
  x: jax.Array, values: jax.Array, index: Index
) -> tuple[jax.Array, _Saved]:
  packed, none = _packed(x), jnp.zeros(0, jnp.int32)
  multiply = _multiply(x.shape[0], index.shape[1])
  y = multiply(index.offsets, index.positions, values, none, packed)
  return y, (packed, values, index)


def _native_backward(
  saved: _Saved, dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  packed_x, values, index = saved
  packed_dy = _packed(dy)
  multiply = _multiply(dy.shape[0], index.shape[0])
  dot = native.call('powerprop_dot', jax.typeof(values))
  in_positions, order = index.in_positions, index.order
  return (
    multiply(index.in_offsets, in_positions, values, order, packed_dy),
    dot(index.offsets, index.positions, packed_dy, packed_x),
    None,
  )


def _multiply(batch: int, num_out: int) -> Callable[..., jax.Array]:
  out = jax.ShapeDtypeStruct((batch, num_out), jnp.float32)
  return native.call('powerprop_multiply', out)


def _packed(x: jax.Array) -> jax.Array:
  """Vectors [batch, in] as the kernels take them, [in, batch].

  The batch is rounded up to whole tiles, with zeros.
  """
  batch, num_in = x.shape
  if batch == 1:
    return x.reshape(num_in, 1)
  out = jax.ShapeDtypeStruct((num_in, rounded(batch, _TILE)), x.dtype)
  packed: jax.Array = native.call('powerprop_pack', out)(x)
  return packed


_native.defvjp(_native_forward, _native_backward)


def rounded(batch: int, tile: int) -> int:
  """The batch in whole tiles, of which the last is a power of two from 4."""
  rest = batch % tile
  last = max(4, 1 << (rest - 1).bit_length()) if rest else 0
  return batch - rest + last


@jax.custom_vjp
def _loops(x: jax.Array, values: jax.Array, index: Index) -> jax.Array:
  return _gather_and_add(index.offsets, index.positions, values, x)


def _loops_forward(
  x: jax.Array, values: jax.Array, index: Index
) -> tuple[jax.Array, _Saved]:
  return _loops(x, values, index), (x, values, index)


def _loops_backward(
  saved: _Saved, dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x, values, index = saved
  to_x = _gather_and_add(
    index.in_offsets, index.in_positions, values[index.order], dy
  )
  return to_x, _gather_and_dot(index, dy, x), None


_loops.defvjp(_loops_forward, _loops_backward)


def _gather_and_add(
  offsets: jax.Array, positions: jax.Array, values: jax.Array, x: jax.Array
) -> jax.Array:
  """y [batch, rows]: for each row, the sum over its entries of value * x."""
  by_feature = x.T

  def add(k: jax.Array, y: jax.Array) -> jax.Array:
    for j in range(_UNROLLED):
      entry, exists = _entries(offsets, positions.size, k * _UNROLLED + j)
      columns = _columns(positions[entry], x.shape[1])
      terms = values[entry][:, jnp.newaxis] * by_feature[columns]
      y += jnp.where(exists[:, jnp.newaxis], terms, 0)
    return y

  y = jnp.zeros((offsets.size - 1, x.shape[0]), x.dtype)
  return lax.fori_loop(0, _num_turns(offsets), add, y).T


def _gather_and_dot(index: Index, dy: jax.Array, x: jax.Array) -> jax.Array:
  """Gradients [nnz] of the values."""
  by_output, by_input = dy.T, x.T
  size = index.positions.size

  def dot(k: jax.Array, found: jax.Array) -> jax.Array:
    for j in range(_UNROLLED):
      entry, exists = _entries(index.offsets, size, k * _UNROLLED + j)
      columns = _columns(index.positions[entry], x.shape[1])
      products = jnp.sum(by_output * by_input[columns], axis=1)
      place = jnp.where(exists, entry, size)
      found = found.at[place].set(products, mode='drop')
    return found

  start = jnp.zeros(size, x.dtype)
  return lax.fori_loop(0, _num_turns(index.offsets), dot, start)


def _num_turns(offsets: jax.Array) -> jax.Array:
  return (jnp.max(jnp.diff(offsets)) + _UNROLLED - 1) // _UNROLLED


def _entries(
  offsets: jax.Array, size: int, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The k-th entry of each row, and whether the row has one."""
  entry = offsets[:-1] + k
  return jnp.minimum(entry, size - 1), entry < offsets[1:]


def _columns(positions: jax.Array, num_columns: int) -> jax.Array:
  # Where a row has no such entry the position is one of another row.
  return positions % num_columns
