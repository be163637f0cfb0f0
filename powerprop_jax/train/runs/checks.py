"""Checks that the settings of many programs have in common."""

from typing import Any

from powerprop_jax.train.runs.errors import UserError


def several(settings: Any, *names: str, differ: bool = True) -> None:
  """Refuses lists among settings that are empty or, if differ, repeat a value.

  Example:
    >>> import types
    >>> several(types.SimpleNamespace(keys=(0, 1)), 'keys')
    >>> several(types.SimpleNamespace(kept=(1, 1)), 'kept', differ=False)
  """
  for name in names:
    values, option = getattr(settings, name), _option(name)
    if not values:
      raise UserError(f'{option} needs at least one value.')
    if differ and len(set(values)) < len(values):
      raise UserError(f'{option} must differ from each other, got {values}.')


def positive(settings: Any, *names: str, prefix: str = '--') -> None:
  """Refuses numbers below 1, alone or in tuples; None may pass.

  Args:
    prefix: what stands in front of a name in messages; '' for a part of the
      settings, which does not know what the options of a program are called.

  Example:
    >>> import types
    >>> positive(types.SimpleNamespace(num_steps=1), 'num_steps')
  """
  for name in names:
    found = getattr(settings, name)
    for value in found if isinstance(found, tuple) else (found,):
      if value is not None and value < 1:
        option = _option(name, prefix) if prefix else name
        raise UserError(f'{option} must be at least 1, got {value}.')


def _option(name: str, prefix: str = '--') -> str:
  return prefix + name.replace('_', '-')
