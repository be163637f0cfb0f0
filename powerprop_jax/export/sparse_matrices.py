"""Weights as sparse matrices of SciPy and JAX, and back.

The matrix of a weight [in, out] is its transpose, [out, in], so that

    csr(w, mask) @ x            is            (x.T @ (w * mask)).T

for activations x with the features first, [in] or [in, batch]: each output is
one row, whose inputs lie side by side. That is the layout in which SciPy's CSR
at batch 1 and JAX's BCSR from batch 32 on are fast. The kernel of a convolution
[height, width, in, out] is the matrix [out, height * width * in], for patches.

Every connection that exists is an entry, one whose weight is zero as well, so
that masks come back exactly.
"""

import math
from typing import Any, NamedTuple

from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.export.exported import Array


class Rows(NamedTuple):
  """A matrix [out, in] row by row, as CSR."""

  data: Array  # [nnz]
  indices: Array  # Column of each, ascending within a row, int32 [nnz].
  indptr: Array  # Where rows start and the last one ends, int32 [out + 1].


def rows(weight: npt.ArrayLike, mask: npt.ArrayLike) -> Rows:
  """The connections of a weight [..., out] of two axes or more, by output.

  Example:
    >>> rows(np.array([[1., 2.], [3., 4.]]), np.array([[1, 0], [1, 1]]) > 0)
    Rows(data=array([1., 3., 4.]), indices=array([0, 1, 1], dtype=int32),
         indptr=array([0, 2, 3], dtype=int32))
  """
  weight, mask = np.asarray(weight), np.asarray(mask)
  masks_lib.check_same_shapes(weight, mask, 'weight', 'mask')
  num_out, num_in = _matrix_shape(weight.shape)
  kept = mask.reshape(num_in, num_out).T
  outputs, inputs = np.nonzero(kept)
  data = weight.reshape(num_in, num_out)[inputs, outputs]
  counts = np.concatenate([[0], kept.sum(axis=1)])
  return Rows(data, inputs.astype(np.int32), np.cumsum(counts).astype(np.int32))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """(out, in) of a weight [..., out]."""
  if len(shape) < 2:
    raise ValueError(
      f'a matrix is made of a weight of two axes or more, got shape {shape}. '
      'Select weights, not biases.'
    )
  return shape[-1], math.prod(shape[:-1])


def from_rows(found: Rows, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """Undoes rows: the dense weight of that shape, and its mask.

  Example:
    >>> from_rows(Rows(np.ones(1), np.array([1]), np.array([0, 1])), (2, 1))[0]
    array([[0.],
           [1.]])
  """
  num_out, num_in = _matrix_shape(shape)
  data, indices, indptr = (np.asarray(x) for x in found)
  counts = np.diff(indptr)
  fits = (
    data.shape == indices.shape == (data.size,)
    and indptr.shape == (num_out + 1,)
    and indptr[0] == 0
    and indptr[-1] == data.size
    and (counts >= 0).all()
    and ((indices >= 0) & (indices < num_in)).all()
  )
  if fits:
    outputs = np.repeat(np.arange(num_out), counts)
    weight = np.zeros((num_in, num_out), data.dtype)
    mask = np.zeros((num_in, num_out), bool)
    weight[indices, outputs], mask[indices, outputs] = data, True
    fits = mask.sum() == data.size
  if not fits:
    raise _misfit(shape)
  return weight.reshape(shape), mask.reshape(shape)


def _misfit(shape: tuple[int, ...]) -> ValueError:
  return ValueError(
    f'the entries of the matrix are not those of a weight of shape {shape}.'
  )


def csr(weight: npt.ArrayLike, mask: npt.ArrayLike) -> Any:
  """A weight [..., out] for SciPy, a scipy.sparse.csr_array [out, in].

  SciPy has no half precision, so that becomes float32.

  Example:
    >>> w = np.array([[1., 2.], [3., 4.]])
    >>> csr(w, w != 2) @ np.array([1., 10.])      # [1 + 30, 40]
    array([31., 40.])
  """
  import scipy.sparse

  found = rows(weight, mask)
  if found.data.dtype.itemsize < 4:
    found = found._replace(data=found.data.astype(np.float32))
  return scipy.sparse.csr_array(tuple(found), _matrix_shape(np.shape(weight)))


def bcsr(weight: npt.ArrayLike, mask: npt.ArrayLike) -> sparse.BCSR:
  """A weight [..., out] for JAX, fast as `bcsr(w, mask) @ x` in float32.

  One of 64 bits that JAX would round is refused.

  Example:
    >>> w = jnp.array([[1., 2.], [3., 4.]])
    >>> bcsr(w, w != 2) @ jnp.array([1., 10.])
    Array([31., 40.], dtype=float32)
  """
  found = rows(weight, mask)
  data = jnp.array(found.data)
  if data.dtype != found.data.dtype:
    raise ValueError(
      f'JAX would round {found.data.dtype} to {data.dtype}. Convert the weight '
      'to float32, or enable jax_enable_x64.'
    )
  return sparse.BCSR(
    (data, jnp.array(found.indices), jnp.array(found.indptr)),
    shape=_matrix_shape(np.shape(weight)),
    indices_sorted=True,
    unique_indices=True,
  )


def dense(matrix: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """Undoes csr and bcsr: the weight of that shape, and its mask.

  Example:
    >>> w = jnp.array([[1., 2.], [3., 4.]])
    >>> dense(bcsr(w, w != 2), w.shape)[0]
    array([[1., 0.],
           [3., 4.]], dtype=float32)
  """
  if tuple(matrix.shape) != _matrix_shape(shape):
    raise _misfit(shape)
  parts = matrix.data, matrix.indices, matrix.indptr
  return from_rows(Rows(*map(np.asarray, parts)), shape)
