"""JSON as the programs write it: strict, readable, and never half written."""

from collections.abc import Mapping
import dataclasses
import enum
import json
import math
import os
import pathlib
import typing
from typing import Any, TypeVar

import jax
import numpy as np

from powerprop_jax.report import files
from powerprop_jax.train.errors import UserError

T = TypeVar('T')


def to_json(value: Any) -> Any:
  """The nearest thing to a value that JSON can hold.

  Dataclasses become objects, tuples become lists, scalars of NumPy and JAX
  become numbers, arrays become nested lists, paths become strings, members of
  an enumeration their names. JSON has no NaN and no infinity: both become null.

  Args:
    value: anything made of the above, and of dicts, lists, strings, numbers,
      booleans and None.

  Returns:
    A value that json.dumps(…, allow_nan=False) accepts.

  Raises:
    TypeError: if it holds something else, such as a function.

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
    return {field.name: to_json(getattr(value, field.name)) for field in fields}
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, (np.generic, np.ndarray, jax.Array)):
    # bfloat16 and its like have no item() of their own that is a float.
    array = np.asarray(value)
    is_number = array.dtype.kind in 'biuf'
    return to_json((array if is_number else array.astype(float)).tolist())
  if isinstance(value, (list, tuple, set, frozenset)):
    return [to_json(item) for item in value]
  raise TypeError(f'{value!r} of type {type(value).__name__} is not JSON.')


def from_json(kind: type[T], value: Any) -> T:
  """The settings that to_json turned into JSON: its inverse for dataclasses.

  Args:
    kind: a dataclass whose fields are dataclasses, tuples and what JSON holds.
    value: what to_json gave. A field that it lacks takes its default.

  Returns:
    The settings.

  Raises:
    UserError: if the value is not an object, has a field that the dataclass
      lacks, or lacks one without a default.

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
    if not isinstance(value, Mapping) or not set(value) <= set(kinds):
      raise UserError(
        f'cannot read {value!r} as settings of {kind.__name__}, which has the '
        f'fields {", ".join(kinds)}. Was it written by another version?'
      )
    fields = {name: from_json(kinds[name], v) for name, v in value.items()}
    try:
      return typing.cast(T, kind(**fields))
    except TypeError as error:
      raise UserError(f'incomplete settings: {error}') from error
  if typing.get_origin(kind) is tuple:
    item, _ = typing.get_args(kind)
    return typing.cast(T, tuple(from_json(item, v) for v in value))
  return typing.cast(T, value)


def write_json(path: str | os.PathLike[str], value: Any) -> pathlib.Path:
  """Writes a value as JSON; the old file stays until the new one is complete.

  Args:
    path: the file; its folder must exist.
    value: anything that to_json takes.

  Returns:
    The path.
  """
  text = json.dumps(
    to_json(value), allow_nan=False, ensure_ascii=False, indent=2
  )
  return files.write_bytes(path, (text + '\n').encode())


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads a JSON file.

  Args:
    path: the file.

  Returns:
    What it holds.

  Raises:
    UserError: if the file is missing, cannot be read or is not JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(
      f'cannot read {os.fspath(path)} as JSON: {error}'
    ) from error
