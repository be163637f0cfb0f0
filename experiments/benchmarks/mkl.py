"""Products with a sparse matrix by Intel's MKL, to compare with.

MKL comes with `pip install mkl`. Its inspector looks at a matrix once and
chooses how to multiply by it, as a runtime for inference would.
"""

import ctypes
import ctypes.util
import functools
import pathlib
import sys
from typing import Any
import weakref

import numpy as np
import scipy.sparse

_ZERO_BASED, _NOT_TRANSPOSED, _ROW_MAJOR = 0, 10, 101
_GENERAL, _CALLS = 20, 100_000
# Of mkl_set_interface_layer and mkl_set_threading_layer: indices of 32 bits,
# and GNU's threads, which need no other package.
_LP64, _GNU = 0, 3


class _Description(ctypes.Structure):
  """matrix_descr of MKL."""

  _fields_ = (
    ('type', ctypes.c_int),
    ('mode', ctypes.c_int),
    ('diag', ctypes.c_int),
  )


class Matrix:
  """A sparse matrix that MKL has looked at."""

  def __init__(self, matrix: scipy.sparse.csr_matrix, num_vectors: int):
    """Lets MKL inspect a float32 matrix [out, in].

    It will be multiplied with num_vectors at once. A RuntimeError says that
    there is no MKL, or that it refuses.
    """
    if not is_available():
      raise RuntimeError('there is no MKL here. Install it: pip install mkl.')
    # MKL does not copy them.
    self._held = (
      matrix.indptr.astype(np.int32),
      matrix.indices.astype(np.int32),
      matrix.data.astype(np.float32),
    )
    self._num_vectors = num_vectors
    self._handle = ctypes.c_void_p()
    offsets, positions, values = map(_pointer, self._held)
    ends = _pointer(self._held[0][1:])
    rows, columns = map(ctypes.c_int, matrix.shape)
    handle = ctypes.byref(self._handle)
    _call(
      's_create_csr',
      *(handle, _ZERO_BASED, rows, columns, offsets, ends, positions, values),
    )
    weakref.finalize(self, _library().mkl_sparse_destroy, self._handle)
    self._description = _Description(_GENERAL, 0, 0)
    hint = self._handle, _NOT_TRANSPOSED, self._description
    if num_vectors == 1:
      _call('set_mv_hint', *hint, _CALLS)
    else:
      _call('set_mm_hint', *hint, _ROW_MAJOR, num_vectors, _CALLS)
    _call('optimize', self._handle)
    self._out = np.empty((matrix.shape[0], num_vectors), np.float32)

  def __call__(self, columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The matrix times columns [in, num_vectors], in an array it keeps."""
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    x, y = _pointer(columns), _pointer(self._out)
    start = _NOT_TRANSPOSED, one, self._handle, self._description
    if self._num_vectors == 1:
      _call('s_mv', *start, x, zero, y)
    else:
      width = ctypes.c_int(self._num_vectors)
      _call('s_mm', *start, _ROW_MAJOR, x, width, width, zero, y, width)
    return self._out


def is_available() -> bool:
  """Whether MKL is installed where this Python finds it."""
  return _library() is not None


@functools.cache
def _library() -> Any:
  places = sorted(pathlib.Path(sys.prefix, 'lib').glob('libmkl_rt.so*'))
  found = ctypes.util.find_library('mkl_rt')
  for name in [*map(str, places), *([found] if found else [])]:
    try:
      library = ctypes.CDLL(name)
    except OSError:
      continue
    library.MKL_Set_Interface_Layer(_LP64)
    library.MKL_Set_Threading_Layer(_GNU)
    return library
  return None


def _pointer(array: np.ndarray[Any, Any]) -> Any:
  return ctypes.c_void_p(array.ctypes.data)


def _call(name: str, *args: Any) -> None:
  status = getattr(_library(), f'mkl_sparse_{name}')(*args)
  if status:
    raise RuntimeError(f'MKL refused a sparse matrix, with status {status}.')
