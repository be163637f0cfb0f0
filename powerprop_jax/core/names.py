"""What someone may have meant who wrote a name that there is not."""

from collections.abc import Iterable
import difflib


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
