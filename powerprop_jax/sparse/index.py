"""Where the connections of a weight are, from the sides of both its ends.

A product goes through the connections of one output after the other, the
gradient of its input through those of one input after the other. An Index is
what both need: the connections sorted by output and sorted by input.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from powerprop_jax.sparse import native


class Index(NamedTuple):
  """Connections of a matrix [in, out], sorted by output and by input.

  All are int32. There may be room for more connections than there are; what
  offsets leaves over at the end is not looked at.

  Attributes:
    offsets: [out + 1]; connections offsets[o] to offsets[o + 1] lead to o.
    positions: o * in + i of each connection, ascending, [nnz].
    in_offsets: [in + 1]; the same for the connections that leave input i.
    in_positions: i * out + o of each connection, ascending, [nnz].
    order: connection j of in_positions is connection order[j] of positions,
      [nnz].
  """

  offsets: jax.Array
  positions: jax.Array
  in_offsets: jax.Array
  in_positions: jax.Array
  order: jax.Array

  @property
  def shape(self) -> tuple[int, int]:
    """[in, out] of the matrix."""
    return self.in_offsets.size - 1, self.offsets.size - 1


def from_positions(positions: npt.ArrayLike, shape: tuple[int, int]) -> Index:
  """The index of connections that are known when the program is written.

  Positions are o * in + i of each connection, ascending; shape is [in, out].

  Example:
    >>> index = from_positions(np.array([1, 2]), (2, 2))
    >>> index.offsets, index.in_positions
    (Array([0, 1, 2], dtype=int32), Array([1, 2], dtype=int32))
    >>> index.order
    Array([1, 0], dtype=int32)
  """
  num_in, num_out = shape
  positions = np.asarray(positions, np.int64)
  outputs, inputs = np.divmod(positions, num_in)
  by_input = inputs * num_out + outputs
  order = np.argsort(by_input, kind='stable')
  starts = [
    np.cumsum(np.bincount(rows + 1, minlength=num_rows + 1))
    for rows, num_rows in ((outputs, num_out), (inputs, num_in))
  ]
  found = starts[0], positions, starts[1], by_input[order], order
  # Not by jnp.asarray, which compiles a program for each shape.
  return Index(*jax.device_put([part.astype(np.int32) for part in found]))


def from_mask(mask: jax.Array, size: int) -> Index:
  """The index of a mask [in, out] that a compiled program chooses.

  Its arrays have room for this many connections. Where the mask has fewer, the
  offsets end before the arrays do; it must not have more, which compiled
  kernels notice when the program runs and end it with an error.

  Example:
    >>> index = from_mask(jnp.eye(2, dtype=bool), 3)
    >>> index.offsets
    Array([0, 1, 2], dtype=int32)
    >>> index.positions.shape
    (3,)
  """
  if size and jax.default_backend() == 'cpu' and native.is_available():
    return _native(mask, size)
  offsets, positions, _ = _sorted(mask.T, size)
  in_offsets, in_positions, outputs = _sorted(mask, size)
  # The rank of a connection among those sorted by output: those of all outputs
  # before its own, and those of its own from inputs before.
  ranks = jnp.cumsum(mask, axis=0, dtype=jnp.int32) - 1
  rank = ranks.reshape(-1).at[in_positions].get(mode='clip')
  order = jnp.minimum(offsets[outputs] + rank, max(size - 1, 0))
  return Index(offsets, positions, in_offsets, in_positions, order)


def _native(mask: jax.Array, size: int) -> Index:
  num_in, num_out = mask.shape
  lengths = num_out + 1, size, num_in + 1, size, size
  shapes = [jax.ShapeDtypeStruct((length,), jnp.int32) for length in lengths]
  return Index(*native.call('powerprop_index', shapes)(mask))


def _sorted(
  mask: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Offsets, positions and columns of the entries of [rows, columns]."""
  counts = jnp.sum(mask, axis=1, dtype=jnp.int32)
  offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
  last = max(mask.size - 1, 0)
  (positions,) = jnp.nonzero(mask.reshape(-1), size=size, fill_value=last)
  positions = positions.astype(jnp.int32)
  return offsets.astype(jnp.int32), positions, positions % mask.shape[1]
