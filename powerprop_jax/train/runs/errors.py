"""The user's mistakes, as opposed to ours, and checks of settings for them.

A UserError says what is wrong and what to do about it in a single line. The
programs print that line and stop with status 2, without a traceback; see
folder.run_main.
"""

from typing import Any


class UserError(ValueError):
  r"""A mistake of the person who typed the command, with its remedy.

  Args:
    message: what is wrong, the value, and what to do; line breaks and runs of
      spaces become single spaces.

  Example:
    >>> str(UserError('no such dataset:\n  mnits'))
    'no such dataset: mnits'
  """

  def __init__(self, message: str):
    super().__init__(' '.join(message.split()))


def check(settings: Any, name: str, is_right: bool, needed: str) -> None:
  """Refuses a number among settings, unless it is right.

  The end of the name is that of the setting; what stands in front of it, as in
  'schedule.warmup', is for the message.

  Example:
    >>> import types
    >>> check(types.SimpleNamespace(warmup=1), 'schedule.warmup', True, 'any')
  """
  if not is_right:
    value = getattr(settings, name.rpartition('.')[2])
    raise UserError(f'{name} must be {needed}, got {value:g}.')


def check_several(settings: Any, *names: str, differ: bool = True) -> None:
  """Refuses lists among settings that are empty or, if differ, repeat a value.

  Example:
    >>> import types
    >>> check_several(types.SimpleNamespace(keys=(0, 1)), 'keys')
    >>> check_several(types.SimpleNamespace(kept=(1, 1)), 'kept', differ=False)
  """
  for name in names:
    values, option = getattr(settings, name), _option(name)
    if not values:
      raise UserError(f'{option} needs at least one value.')
    if differ and len(set(values)) < len(values):
      raise UserError(f'{option} must differ from each other, got {values}.')


def check_positive(settings: Any, *names: str, prefix: str = '--') -> None:
  """Refuses numbers below 1, alone or in tuples; None may pass.

  Args:
    prefix: what stands in front of a name in messages; '' for a part of the
      settings, which does not know what the options of a program are called.

  Example:
    >>> import types
    >>> check_positive(types.SimpleNamespace(num_steps=1), 'num_steps')
  """
  for name in names:
    found = getattr(settings, name)
    for value in found if isinstance(found, tuple) else (found,):
      if value is not None and value < 1:
        option = _option(name, prefix) if prefix else name
        raise UserError(f'{option} must be at least 1, got {value}.')


def check_least(least: int, **values: int) -> None:
  """Refuses arguments that are smaller than allowed, by their names.

  Example:
    >>> check_least(1, batch_size=60, num_examples=100)
  """
  for name, value in values.items():
    if value < least:
      raise UserError(f'{name} must be at least {least}, got {value}.')


def check_shares(batch_size: int, count: int, sharers: str) -> None:
  """Refuses a batch that hosts or devices cannot share out equally.

  Example:
    >>> check_shares(8, 4, 'devices')
  """
  if batch_size % count or batch_size < 1:
    lower = batch_size // count * count
    near = f'{lower} or {lower + count}' if lower > 0 else f'{count}'
    raise UserError(
      f'a batch of {batch_size} examples cannot be shared out equally among '
      f'{count} {sharers}. Choose a multiple of {count}, such as {near}.'
    )


def check_key(key: int) -> None:
  """Refuses a seed that jax.random.key and the order of data cannot take."""
  if not 0 <= key < 2**32:
    raise UserError(f'a key must be at least 0 and below 2^32, got {key}.')


def _option(name: str, prefix: str = '--') -> str:
  return prefix + name.replace('_', '-')
