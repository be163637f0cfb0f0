"""The compact file: surviving values, and masks as compressed bits.

A safetensors file, which any of its readers opens, with the tensors

    theta/MODULE/NAME      a leaf whose mask is True everywhere, whole
    values/MODULE/NAME     of another one the values that exist, in flat order
    masks/MODULE/NAME      ... and its mask: zlib of one bit an entry, uint8
    net_state/MODULE/NAME  state of the network, whole

and the metadata `format`; `about`, JSON; `shapes`, JSON: those of the leaves
with a mask; and `crc32`, a checksum of everything.
Without this library, a mask is

    bits = np.frombuffer(zlib.decompress(masks), np.uint8)
    mask = np.unpackbits(bits, count=math.prod(shape)).reshape(shape) > 0

Random masks take 0.48, 0.30, 0.19 and 0.12 bits an entry at 90, 95, 98 and
99 % sparsity, where no code can do with less than 0.47, 0.29, 0.14 and 0.08.
Values stay as they are, so that other readers see them.
"""

from collections.abc import Mapping
import json
from typing import Any
import zlib

import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export.exported import Array, Exported

_FORMAT = 'powerprop_jax network, version 1'

_DTYPES = {
  **{'F64': np.float64, 'F32': np.float32, 'F16': np.float16},
  **{'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8},
  **{'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8},
  **{'BOOL': np.bool_, 'BF16': jnp.bfloat16, 'C64': np.complex64},
}
_KNOWN = {jnp.dtype(dtype) for dtype in _DTYPES.values()}


def to_bytes(exported: Exported) -> bytes:
  """The file of a network from exported.on_host."""
  tensors: dict[str, Array] = {}
  shapes = {}
  for leaf in trees.named_leaves(exported.theta):
    mask = exported.masks[leaf.module_name][leaf.name]
    if mask.all():
      tensors[f'theta/{leaf.path}'] = leaf.value
    else:
      shapes[leaf.path] = leaf.value.shape
      tensors[f'values/{leaf.path}'] = leaf.value[mask]
      tensors[f'masks/{leaf.path}'] = _compressed(mask)
  for leaf in trees.named_leaves(exported.net_state):
    tensors[f'net_state/{leaf.path}'] = leaf.value
  for name, tensor in tensors.items():
    if tensor.dtype not in _KNOWN:
      raise ValueError(
        f'safetensors cannot hold {name}, which is {tensor.dtype}. Convert it, '
        "or write with format='npz'."
      )
  # It writes the memory of an array in whatever order that is; ravel gives a
  # contiguous copy where the order is another, and keeps scalars.
  contiguous = {
    name: np.ravel(tensor, order='C').reshape(tensor.shape)
    for name, tensor in tensors.items()
  }
  metadata = {
    'format': _FORMAT,
    'about': _json(exported.about),
    'shapes': _json(shapes),
  }
  metadata['crc32'] = _checksum(contiguous, metadata)
  return _safetensors().numpy.save(contiguous, metadata)


def _json(value: object) -> str:
  return json.dumps(value, separators=(',', ':'))


def _compressed(mask: Array) -> Array:
  """Its bits, by whichever way of zlib makes them shortest."""
  bits = masks_lib.pack_masks(mask).bits.tobytes()
  # Looking for repetitions, as zlib does by default, costs more than it saves
  # where connections lie at random, but not where whole rows are empty.
  found = []
  for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
    code = zlib.compressobj(memLevel=9, strategy=strategy)
    found.append(code.compress(bits) + code.flush())
  return np.frombuffer(min(found, key=len), np.uint8)


def _checksum(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
  texts = {k: v for k, v in metadata.items() if k != 'crc32'}
  total = zlib.crc32(json.dumps(texts, sort_keys=True).encode())
  for name, tensor in sorted(tensors.items()):
    total = zlib.crc32(f'{name} {tensor.dtype} {tensor.shape}'.encode(), total)
    total = zlib.crc32(tensor.tobytes(), total)
  return str(total)


def from_bytes(data: bytes) -> Exported:
  """Undoes to_bytes, to the last bit."""
  tensors, metadata = _parse(data)
  if metadata.get('format') != _FORMAT:
    raise ValueError(
      f'it is in format {metadata.get("format")!r}, and this version of '
      f'powerprop_jax reads {_FORMAT!r}'
    )
  found: dict[str, dict[str, dict[str, Array]]] = {
    part: {} for part in ('theta', 'masks', 'net_state')
  }
  try:
    shapes = json.loads(metadata['shapes'])
    for tensor_name, value in tensors.items():
      part, _, path = tensor_name.partition('/')
      if part == 'net_state':
        exported_lib.put(found[part], path, value)
      elif part in ('theta', 'values'):
        mask = np.ones(value.shape, bool)
        if part == 'values':
          mask = _mask(path, tensors[f'masks/{path}'], tuple(shapes[path]))
          value = _scattered(path, value, mask)
        exported_lib.put(found['theta'], path, value)
        exported_lib.put(found['masks'], path, mask)
    about = json.loads(metadata['about'])
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f'a part of it is missing or not ours: {error}') from error
  if metadata.get('crc32') != _checksum(tensors, metadata):
    raise ValueError('it changed after it was written')
  return Exported(**found, about=about)


def _parse(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
  """(tensors, metadata) of a safetensors file."""
  package = _safetensors()
  try:
    tensors = {
      name: np.frombuffer(found['data'], _DTYPES[found['dtype']])
      .reshape(found['shape'])
      .copy()
      for name, found in package.deserialize(data)
    }
    end = 8 + int.from_bytes(data[:8], 'little')
    return tensors, json.loads(data[8:end]).get('__metadata__', {})
  except (package.SafetensorError, KeyError, ValueError) as error:
    raise ValueError(f'it is damaged or cut off ({error})') from error


def _mask(path: str, packed: Array, shape: tuple[int, ...]) -> Array:
  try:
    bits = np.frombuffer(zlib.decompress(packed.tobytes()), np.uint8)
    leaf = masks_lib.PackedMask(bits, np.array(shape, np.int64))
    mask: Array = masks_lib.unpack_masks(leaf)
  except (zlib.error, ValueError) as error:
    raise ValueError(f'the mask of {path} is damaged ({error})') from error
  return mask


def _scattered(path: str, values: Array, mask: Array) -> Array:
  """The dense array with these values where the mask is True."""
  kept = int(mask.sum())
  if values.shape != (kept,):
    raise ValueError(
      f'{path} has {values.size} values, and {kept} connections in its mask: '
      'they are not of the same network'
    )
  dense = np.zeros(mask.shape, values.dtype)
  dense[mask] = values
  return dense


def _safetensors() -> Any:
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "this format needs safetensors: pip install 'powerprop_jax[train]', or "
      "write with format='npz'."
    ) from error
  return safetensors
