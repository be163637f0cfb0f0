"""A trained network in a single file, written and read back to the last bit.

    export.write('net.safetensors', Exported(theta, masks, net_state, about))
    theta, masks, net_state, about = export.read('net.safetensors')

===========  =======================================================
format       what the file holds
===========  =======================================================
safetensors  surviving values, masks as bits; see safetensors.py
npz          theta and masks as they are, for NumPy; see npz.py
scipy        CSR matrices, for SciPy; see npz.py, sparse_matrices.py
===========  =======================================================

At 95 % sparsity LeNet-300-100 takes 6.2, 8.5 and 6.8 % of its dense float32
parameters. program.py writes a fourth kind of file: a compiled function,
which JAX runs without this library.

There is no ONNX, since it does not pay: the sparse product of ONNX Runtime was
slower than its own dense one in 11 of 12 cases tried (2.6 to 285 times; equal
once, 784×300 at batch 128 and 98 %), and it does not load sparse weights for
it. LiteRT ran sparse weights at 0.95 to 1.03 times the speed of dense ones.
"""

from collections.abc import Callable
import functools
import os
import pathlib
from typing import NamedTuple

from powerprop_jax.core import names
from powerprop_jax.core import select as select_lib
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import npz, safetensors
from powerprop_jax.export.exported import Exported
from powerprop_jax.files import whole


class _Format(NamedTuple):
  to_bytes: Callable[[Exported], bytes]
  suffix: str


_FORMATS = {
  'safetensors': _Format(safetensors.to_bytes, '.safetensors'),
  'npz': _Format(npz.to_bytes, '.npz'),
  'scipy': _Format(
    functools.partial(npz.to_bytes, csr=select_lib.is_weight), '_scipy.npz'
  ),
}
FORMATS = tuple(_FORMATS)


def check_format(name: str, known: tuple[str, ...] = FORMATS) -> None:
  """Refuses a format that is not one of those known.

  Example:
    >>> check_format('scypi')
    Traceback (most recent call last):
      ...
    ValueError: unknown format 'scypi'. Did you mean 'scipy'? There are:
    safetensors, npz, scipy.
  """
  if name in known:
    return
  raise ValueError(
    f'unknown format {name!r}.{names.hint(name, known)} There are: '
    f'{", ".join(known)}.'
  )


def suffix(name: str) -> str:
  """How the names of files of a format end, e.g. '.npz'."""
  check_format(name)
  return _FORMATS[name].suffix


def write(
  path: str | os.PathLike[str],
  exported: Exported,
  *,
  format: str = 'safetensors',
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a file in one of FORMATS, over another one only with overwrite.

  The network is in the memory of this host. What its masks remove is written as
  zero, whatever its value.

  Raises:
    ImportError: for 'safetensors', without the package of that name.
    ValueError: if the file exists or cannot be written.

  Example:
    >>> import tempfile
    >>> theta = {'linear': {'w': jnp.array([[2., 0.]])}}
    >>> masks = {'linear': {'w': jnp.array([[True, False]])}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'net.npz'
    >>> _ = write(path, Exported(theta, masks, {}, {'step': 3}), format='npz')
    >>> read(path).theta['linear']['w'], read(path).about
    (array([[2., 0.]], dtype=float32), {'step': 3})
  """
  check_format(format)
  data = _FORMATS[format].to_bytes(exported_lib.on_host(exported))
  return write_bytes(path, data, overwrite=overwrite)


def write_bytes(
  path: str | os.PathLike[str], data: bytes, *, overwrite: bool
) -> pathlib.Path:
  """Writes a file in one step, over another one only with overwrite."""
  check_free(path, overwrite=overwrite)
  try:
    return whole.write_bytes(path, data)
  except OSError as error:
    raise ValueError(
      f'cannot write {os.fspath(path)}: {error}. Choose another file, in a '
      'folder that exists.'
    ) from error


def check_free(path: str | os.PathLike[str], *, overwrite: bool) -> None:
  """Refuses a file that cannot be written, before work is done for it.

  With overwrite one that exists may be replaced; a folder never is.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder. Choose another file.')
  if not path.parent.is_dir():
    raise ValueError(
      f'cannot write {path}: there is no folder {path.parent}. Choose another '
      'file.'
    )
  if path.exists() and not overwrite:
    raise ValueError(
      f'{path} exists. Choose another file, or --overwrite (overwrite=True).'
    )


def read(path: str | os.PathLike[str]) -> Exported:
  """Reads a file of any format; its content says which.

  The network has NumPy arrays.

  Raises:
    ValueError: if there is no such file, it is damaged, or none that write
      wrote.
  """
  data = read_bytes(path)
  try:
    # Every zip archive, and so every .npz file, starts with these letters.
    is_npz = data[:2] == b'PK'
    return (npz if is_npz else safetensors).from_bytes(data)
  except ValueError as error:
    raise ValueError(
      f'cannot read {os.fspath(path)} as an exported network: '
      f'{str(error).rstrip(".")}. Give a file that powerprop export or '
      'export.write wrote.'
    ) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
  """The content of a file; a ValueError if it cannot be read."""
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f'cannot read {os.fspath(path)}: {error}') from error
