"""What someone may have meant who wrote a name that there is not."""

from collections.abc import Iterable
import difflib
from typing import Any


def closest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
  """The known names most like a name, the nearest first; none if none is near.

  Example:
    >>> closest('rgil', ['set', 'rigl', 'snfs']), closest('sgd', ['rigl'])
    (['rigl'], [])
  """
  return difflib.get_close_matches(name, list(known), count)


def hint(name: str, known: Iterable[str]) -> str:
  """The closest name as the end of an error message, or an empty string.

  Example:
    >>> f'unknown method.{hint("rgil", ["set", "rigl"])}'
    "unknown method. Did you mean 'rigl'?"
  """
  near = closest(name, known)
  return f' Did you mean {near[0]!r}?' if near else ''


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
  """Refuses a setting that is none of the known ones.

  Example:
    >>> check_choice('search', 'scam', ('scan', 'bisect'))
    Traceback (most recent call last):
      ...
    ValueError: search must be 'scan' or 'bisect', got 'scam'. Did you mean
    'scan'?
  """
  known = tuple(known)
  if value not in known:
    *others, last = map(repr, known)
    near = hint(value, map(str, known)) if isinstance(value, str) else ''
    raise ValueError(
      f'{name} must be {", ".join(others)} or {last}, got {value!r}.{near}'
    )
