"""The nearest thing to a value that JSON can hold."""

from collections.abc import Mapping
import dataclasses
import enum
import math
import os
from typing import Any

import jax
import numpy as np


def to_json(value: Any, name: str = '') -> Any:
  """The nearest thing to a value that JSON can hold.

  Dataclasses become objects, tuples become lists, scalars of NumPy and JAX
  become numbers, arrays become nested lists, paths become strings, members of
  an enumeration their names. JSON has no NaN and no infinity: both become null.

  Args:
    value: anything made of the above, and of dicts, lists, strings, numbers,
      booleans and None.
    name: what to call it in the message.

  Returns:
    A value that json.dumps(…, allow_nan=False) accepts.

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
