"""JSON as the programs write it: strict, readable, and never half written."""

from collections.abc import Mapping
import dataclasses
import enum
import json
import math
import os
import pathlib
import types
import typing
from typing import Any, TypeVar

import jax
import numpy as np

from powerprop_jax.files import whole

T = TypeVar('T')

# Kinds of fields whose values are compared with them.
_NONE = type(None)
_PLAIN = {bool, int, float, str, _NONE}


def to_json(value: Any, name: str = '') -> Any:
  """The nearest thing to a value that JSON can hold.

  Dataclasses become objects, tuples become lists, scalars of NumPy and JAX
  become numbers, arrays become nested lists, paths become strings, members of
  an enumeration their names. JSON has no NaN and no infinity: both become null.

  Args:
    name: what to call it in the message.

  Raises:
    TypeError: if it holds something else, such as a function; names its key.

  Example:
    >>> to_json({'alpha': np.float32(2), 'loss': float('nan'), 'shape': (2, 3)})
    {'alpha': 2.0, 'loss': None, 'shape': [2, 3]}
  """
  if isinstance(value, enum.Enum):
    return value.name
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    value = {field.name: getattr(value, field.name) for field in fields}
  if isinstance(value, Mapping):
    inside = f'{name}.' if name else ''
    return {str(k): to_json(item, f'{inside}{k}') for k, item in value.items()}
  if isinstance(value, (np.generic, np.ndarray, jax.Array)):
    # bfloat16 and its like have no item() of their own that is a float.
    array = np.asarray(value)
    is_number = array.dtype.kind in 'biuf'
    return to_json((array if is_number else array.astype(float)).tolist())
  if isinstance(value, (list, tuple, set, frozenset)):
    return [to_json(item, name) for item in value]
  raise TypeError(
    f'{f"{name}: " if name else ""}{value!r} of type {type(value).__name__} is '
    'not JSON.'
  )


def from_json(kind: type[T], value: Any, name: str = '') -> T:
  """The settings that to_json turned into JSON: its inverse for dataclasses.

  Their fields are dataclasses, tuples and what JSON holds.

  Args:
    value: what to_json gave. A field that it lacks takes its default.
    name: what to call it in the message.

  Raises:
    ValueError: if the value is not an object, has a field that the dataclass
      lacks, lacks one without a default, or one is of another kind.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...   alphas: tuple[float, ...] = (1.0,)
    ...   key: int = 0
    >>> from_json(Config, {'alphas': [1.0, 2.0]})
    Config(alphas=(1.0, 2.0), key=0)
  """
  if dataclasses.is_dataclass(kind):
    kinds = typing.get_type_hints(kind)
    unknown: Any = value
    if isinstance(value, Mapping):
      unknown = ', '.join(str(key) for key in value if key not in kinds)
    if not isinstance(value, Mapping) or unknown:
      raise ValueError(
        f'cannot read {unknown} as settings of {kind.__name__}, which has the '
        f'fields {", ".join(kinds)}. Was it written by another version?'
      )
    missing = [
      field.name
      for field in dataclasses.fields(kind)
      if field.default is field.default_factory is dataclasses.MISSING
      and field.name not in value
    ]
    if missing:
      names = ' and '.join(map(repr, missing))
      raise ValueError(f'incomplete settings: {names} missing.')
    fields = {key: from_json(kinds[key], v, key) for key, v in value.items()}
    return typing.cast(T, kind(**fields))
  if typing.get_origin(kind) is tuple:
    item, _ = typing.get_args(kind)
    _check_kind((list, tuple), value, name)
    return typing.cast(T, tuple(from_json(item, v, name) for v in value))
  plain: tuple[Any, ...] = (kind,)
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    plain = typing.get_args(kind)
    if dataclasses.is_dataclass(plain[0]):
      inner: Any = plain[0]
      return typing.cast(
        T, None if value is None else from_json(inner, value, name)
      )
  choices = [
    choice
    for part in plain
    if typing.get_origin(part) is typing.Literal
    for choice in typing.get_args(part)
  ]
  if choices and value not in (*choices, *(None,) * (_NONE in plain)):
    words = ', '.join(map(str, choices))
    raise ValueError(f'{name} must be one of {words}, got {value!r}.')
  if set(plain) <= _PLAIN:
    _check_kind((*plain, int) if float in plain else plain, value, name)
  return typing.cast(T, value)


def _check_kind(kinds: Any, value: Any, name: str) -> None:
  if not isinstance(value, kinds):
    words = ' or '.join(kind.__name__ for kind in kinds)
    raise ValueError(f'{name} must be {words}, got {value!r}.')


def write_json(path: str | os.PathLike[str], value: Any) -> pathlib.Path:
  """Writes what to_json takes; the old file stays until the new is complete."""
  text = json.dumps(
    to_json(value), allow_nan=False, ensure_ascii=False, indent=2
  )
  return whole.write_bytes(path, (text + '\n').encode())


def read_json(path: str | os.PathLike[str]) -> Any:
  """What a JSON file holds.

  Raises:
    ValueError: if the file is missing, cannot be read or is not JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(
      f'cannot read {os.fspath(path)} as JSON: {error}'
    ) from error
