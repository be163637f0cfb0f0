"""Text as windows of characters, for networks that say which one follows.

The last tenth is both validation and test, in windows that do not overlap; a
window to train on begins anywhere in the rest.
"""

import pathlib

import numpy as np

from powerprop_jax.train.data.sources import Arrays, Source
from powerprop_jax.train.runs.errors import UserError

# The name of the text that comes with Python.
BUNDLED = 'pydoc'


def characters(name: str, context: int) -> Source:
  """Windows of a text file, or of Python's own documentation.

  Characters are numbered in their order, and there are as many classes as
  different ones. Tokens and labels, the characters that follow, are int16
  [N, context].

  Args:
    name: 'pydoc', the topics that help() knows, about half a megabyte; or the
      path of a file in UTF-8.
    context: characters in a window, at least 1.

  Example:
    >>> train, validation, _, num_classes = characters('pydoc', 64)
    >>> train.images.shape[1], num_classes < 256
    (64, True)
    >>> bool((train.images[5, 1:] == train.labels[5, :-1]).all())
    True
  """
  if context < 1:
    raise UserError(f'context must be at least 1, got {context}.')
  text = _bundled() if name == BUNDLED else _read(name)
  alphabet, codes = np.unique(
    np.frombuffer(text.encode('utf-32-le'), np.uint32), return_inverse=True
  )
  num_train = int(0.9 * len(codes))
  shortest = 10 * (context + 1)
  if len(codes) < shortest:
    raise UserError(
      f'{name} has {len(codes):,} characters, and needs {shortest:,} for '
      f'windows of {context}. Give a longer text or a smaller context.'
    )
  codes = codes.astype(np.int16)
  train = _windows(codes[:num_train], context)
  held_out = _windows(codes[num_train:], context)
  held_out = Arrays(*(part[::context] for part in held_out))
  return Source(train, held_out, held_out, len(alphabet))


def _windows(codes: np.ndarray, context: int) -> Arrays:
  """All that there are; they share their memory."""
  view = np.lib.stride_tricks.sliding_window_view
  return Arrays(view(codes[:-1], context), view(codes[1:], context))


def _bundled() -> str:
  from pydoc_data import topics

  return '\n'.join(text for _, text in sorted(topics.topics.items()))


def _read(name: str) -> str:
  path = pathlib.Path(name).expanduser()
  try:
    return path.read_bytes().decode()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is no text in UTF-8: {error}.') from error
