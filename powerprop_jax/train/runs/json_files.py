"""JSON as the programs write it: strict, readable, and never half written."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import types
import typing
from typing import Any, TypeVar

from powerprop_jax.files import whole
from powerprop_jax.files.json_values import to_json
from powerprop_jax.train.runs.errors import UserError

T = TypeVar('T')

# Kinds of fields whose values are compared with them.
_PLAIN = {bool, int, float, str, type(None)}


def from_json(kind: type[T], value: Any, name: str = '') -> T:
  """The settings that to_json turned into JSON: its inverse for dataclasses.

  Args:
    kind: a dataclass whose fields are dataclasses, tuples and what JSON holds.
    value: what to_json gave. A field that it lacks takes its default.
    name: what to call it in the message.

  Returns:
    The settings.

  Raises:
    UserError: if the value is not an object, has a field that the dataclass
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
    if not isinstance(value, Mapping) or not set(value) <= set(kinds):
      raise UserError(
        f'cannot read {value!r} as settings of {kind.__name__}, which has the '
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
      raise UserError(f'incomplete settings: {names} missing.')
    fields = {key: from_json(kinds[key], v, key) for key, v in value.items()}
    return typing.cast(T, kind(**fields))
  if typing.get_origin(kind) is tuple:
    item, _ = typing.get_args(kind)
    _check_kind((list, tuple), value, name)
    return typing.cast(T, tuple(from_json(item, v, name) for v in value))
  union = isinstance(kind, types.UnionType)
  plain: tuple[Any, ...] = typing.get_args(kind) if union else (kind,)
  if set(plain) <= _PLAIN:
    _check_kind((*plain, int) if float in plain else plain, value, name)
  return typing.cast(T, value)


def part_from_json(kind: type[T], value: Mapping[str, Any]) -> T:
  """Some of the settings that to_json turned into JSON: the fields of kind.

  Args:
    kind: a dataclass whose fields are some of those of the settings.
    value: what to_json gave for all of them.

  Returns:
    The settings that kind has.

  Raises:
    UserError: as from_json.
  """
  names = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
  return from_json(kind, {name: value[name] for name in names if name in value})


def _check_kind(kinds: Any, value: Any, name: str) -> None:
  if not isinstance(value, kinds):
    words = ' or '.join(kind.__name__ for kind in kinds)
    raise UserError(f'{name} must be {words}, got {value!r}.')


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
  return whole.write_bytes(path, (text + '\n').encode())


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
