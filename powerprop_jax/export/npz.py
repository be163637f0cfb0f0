"""Files that NumPy alone reads: dense arrays, or CSR matrices for SciPy.

An .npz file with, for each leaf, the arrays

    theta/MODULE/NAME      what the network computes with, zero where no
                           connection is
    masks/MODULE/NAME      which connections exist; booleans
    net_state/MODULE/NAME  running statistics of the norms
    csr/MODULE/NAME/...    for SciPy, in place of theta and masks of the
                           selected leaves: data, indices and indptr of the
                           matrix [out, in] (see sparse_matrices.py), and the
                           shape of the weight, [..., out]

and `about`, a string of JSON. NumPy has no bfloat16 and the like, and SciPy no
half precision: such leaves are held as float32, which is exact, and `dtypes`, a
string of JSON, says what they are. Arrays are compressed if anything is sparse.
"""

from collections.abc import Mapping
import io
import json
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Select
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import sparse_matrices
from powerprop_jax.export.exported import Array, Exported
from powerprop_jax.files.tables import Row

_CSR = ('data', 'indices', 'indptr', 'shape')


def to_bytes(exported: Exported, *, csr: Select | None = None) -> bytes:
  """The file of a network from exported.on_host.

  Leaves that csr selects, of two axes or more, are held as CSR matrices.
  """
  is_sparse = not all(x.value.all() for x in trees.named_leaves(exported.masks))
  found, dtypes = arrays(exported, csr=csr)
  return pack(found, exported.about, dtypes, is_sparse=is_sparse)


def arrays(
  exported: Exported, *, csr: Select | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
  """What to_bytes writes: arrays, and dtypes of those held in another one."""
  found: dict[str, Array] = {}
  dtypes: dict[str, str] = {}
  as_csr: set[str] = set()
  for leaf in trees.named_leaves(exported.theta):
    if csr is None or not csr(*leaf):
      continue
    as_csr.add(leaf.path)
    mask = exported.masks[leaf.module_name][leaf.name]
    matrix = sparse_matrices.csr(leaf.value, mask)
    pieces = (matrix.data, matrix.indices, matrix.indptr, leaf.value.shape)
    for name, value in zip(_CSR, pieces, strict=True):
      found[f'csr/{leaf.path}/{name}'] = np.asarray(value)
    if matrix.dtype != leaf.value.dtype:
      dtypes[f'csr/{leaf.path}'] = leaf.value.dtype.name
  for part, tree in exported_lib.parts(exported).items():
    for leaf in trees.named_leaves(tree):
      if part != 'net_state' and leaf.path in as_csr:
        continue
      name, value = f'{part}/{leaf.path}', leaf.value
      if value.dtype.kind == 'V':  # a dtype that NumPy does not know
        dtypes[name], value = value.dtype.name, value.astype(np.float32)
      found[name] = value
  return found, dtypes


def pack(
  arrays: Mapping[str, Array],
  about: Row,
  dtypes: Mapping[str, str] | None = None,
  *,
  is_sparse: bool = True,
) -> bytes:
  """An .npz file of arrays and what they are about, compressed if is_sparse.

  dtypes are those of arrays that are held in another one.
  """
  texts = {'about': np.array(json.dumps(about))}
  if dtypes:
    texts['dtypes'] = np.array(json.dumps(dtypes))
  buffer = io.BytesIO()
  save = np.savez_compressed if is_sparse else np.savez
  save(buffer, **arrays, **texts)  # type: ignore[arg-type]
  return buffer.getvalue()


def unpack(data: bytes) -> tuple[dict[str, Array], Row, dict[str, str]]:
  """Undoes pack: (arrays, about, dtypes)."""
  try:
    with np.load(io.BytesIO(data)) as opened:
      arrays = {name: opened[name] for name in opened.files}
    about = json.loads(str(arrays.pop('about')))
    dtypes = json.loads(str(arrays.pop('dtypes', '{}')))
  except KeyError as error:
    raise ValueError(f'it has no array {error}') from error
  except (
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
  ) as error:
    raise ValueError(f'it is damaged or cut off ({error})') from error
  return arrays, about, dtypes


def from_bytes(data: bytes) -> Exported:
  """Undoes to_bytes, to the last bit; reads the weights of a program too."""
  return network(*unpack(data))


def network(
  arrays: Mapping[str, Array], about: Row, dtypes: Mapping[str, str]
) -> Exported:
  """The network that the arrays of a file are of."""
  found: dict[str, dict[str, dict[str, Array]]] = {
    part: {} for part in ('theta', 'masks', 'net_state')
  }
  matrices: dict[str, dict[str, Array]] = {}
  for name, value in arrays.items():
    part, _, path = name.partition('/')
    if part == 'csr':
      path, _, piece = path.rpartition('/')
      matrices.setdefault(path, {})[piece] = value
    elif part in found:
      dtype = jnp.dtype(dtypes.get(name, value.dtype))
      exported_lib.put(found[part], path, value.astype(dtype))
    elif part != 'program':  # of program.py
      raise ValueError(f'it holds {name!r}, which no exported network has')
  for path, pieces in matrices.items():
    if set(pieces) != set(_CSR):
      raise ValueError(f'the matrix of {path} is not complete')
    weight, mask = sparse_matrices.from_rows(
      sparse_matrices.Rows(*(pieces[k] for k in _CSR[:3])),
      tuple(int(length) for length in pieces['shape']),
    )
    dtype = jnp.dtype(dtypes.get(f'csr/{path}', weight.dtype))
    exported_lib.put(found['theta'], path, weight.astype(dtype))
    exported_lib.put(found['masks'], path, mask)
  if 'program' in arrays:
    if not found['theta']:
      raise ValueError('it is a program of an earlier version, without weights')
    for leaf in list(trees.named_leaves(found['theta'])):
      if f'masks/{leaf.path}' not in arrays:
        exported_lib.put(found['masks'], leaf.path, leaf.value != 0)
  masks_lib.check_same_shapes(found['theta'], found['masks'], 'theta', 'masks')
  return Exported(**found, about=about)
