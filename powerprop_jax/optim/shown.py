"""States of optimisers in a few words, as a notebook prints them."""

from typing import Any

import jax
import numpy as np

from powerprop_jax.core.trees import Static


def state(value: Any) -> str:
  """A named tuple of ours, with its arrays counted, not printed.

  What is inside it comes last, on a line of its own.

  Example:
    >>> import optax
    >>> from powerprop_jax.optim.powerprop import powerprop
    >>> tx = powerprop(optax.adam(0.1), 2.0)
    >>> tx.init({'linear': {'w': np.ones((20, 10), np.float32)}})
    PowerState(alpha=2.0, select=is_weight, form='recommended',
      inner_state=(ScaleByAdamState(3 arrays, 401 numbers), EmptyState()))
  """
  fields = value._asdict()
  inner = fields.pop('inner_state')
  words = ', '.join(
    f'{name}={_words(of)}'
    for name, of in fields.items()
    if not (type(of) is tuple and not of)
  )
  return f'{type(value).__name__}({words},\n  inner_state={_words(inner)})'


def _words(value: Any) -> str:
  if isinstance(value, Static):
    return getattr(value.value, '__name__', repr(value.value))
  if type(value) is tuple:
    parts = [_words(part) for part in value]
    return f'({", ".join(parts)}{"," * (len(parts) == 1)})'
  if hasattr(value, '_fields'):
    if 'inner_state' in value._fields:
      return repr(value)
    return f'{type(value).__name__}({_counted(value)})'
  if np.ndim(value) == 0 and _is_known(value):
    return f'{np.asarray(value).item()!r}'
  return _counted(value) or repr(value)


def _counted(tree: Any) -> str:
  """How many arrays, and numbers in them; '' where there is none."""
  leaves = jax.tree.leaves(tree)
  if not leaves or not all(hasattr(leaf, 'dtype') for leaf in leaves):
    return ', '.join(map(repr, leaves)) if len(leaves) < 4 else '…'
  size = sum(leaf.size for leaf in leaves)
  if all(leaf.dtype == bool and _is_known(leaf) for leaf in leaves):
    true = sum(int(np.count_nonzero(leaf)) for leaf in leaves)
    return f'{true:,} of {size:,} True'
  arrays = f'{len(leaves)} array{"s" * (len(leaves) > 1)}'
  return f'{arrays}, {size:,} number{"s" * (size > 1)}'


def _is_known(leaf: Any) -> bool:
  """Whether an array has values, and this host has all of them."""
  if isinstance(leaf, jax.core.Tracer):
    return False
  if isinstance(leaf, jax.Array):
    return leaf.is_fully_addressable and not leaf.is_deleted()
  return isinstance(leaf, (np.ndarray, np.generic))
