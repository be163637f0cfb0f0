"""Which leaves of a parameter tree an operation is about.

A predicate over (module name, name, value), Haiku's own convention, decides;
the functions here are the predicates people need and the checks that tell them
what was chosen. By default that is the weights of linear and convolutional
layers: biases, norm parameters and embeddings take part only when named.

A predicate is part of the states of the transformations that it is given to.
Those from here, and functions of a module, can be pickled, and are equal where
they are built twice; a lambda cannot, and is equal to itself alone.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import layouts, trees
from powerprop_jax.core.trees import Select, Tree


def is_weight(module_name: str, name: str, value: jax.Array) -> bool:
  """True for the weights of linear and convolutional layers.

  These are leaves of rank 2 or more called 'w' (Haiku), 'kernel' (Flax) or
  'weight' (Equinox, PyTorch) that are not in a norm or an embedding; see
  layouts.py. Biases, norm parameters and embedding tables are not weights in
  this sense; use by_regex to name others. The value may be anything with a
  shape and a dtype.

  Example:
    >>> is_weight('mlp/~/linear_0', 'w', jnp.zeros((2, 3)))
    True
    >>> is_weight('mlp/~/linear_0', 'b', jnp.zeros(3))
    False
  """
  return not _why_not(trees.NamedLeaf(module_name, name, value))


def _why_not(leaf: trees.NamedLeaf) -> str:
  """Why is_weight leaves a leaf out; '' if it does not."""
  if leaf.name not in layouts.WEIGHT_NAMES:
    return 'not called a weight'
  if not layouts.is_weight_name(leaf.module_name, leaf.name):
    return 'in a norm or an embedding'
  if leaf.value.ndim < 2:
    return 'fewer than two axes'
  return '' if _is_floating(leaf.value) else 'not floating point'


def by_regex(*patterns: str) -> Select:
  r"""Selects floating-point leaves whose 'module/name' matches a pattern.

  Each pattern is a regular expression that may match anywhere in the name;
  anchor with ^ and $ to say more.

  Example:
    >>> select = by_regex('embeddings$', r'linear_\d/w$')
    >>> select('mlp/~/linear_0', 'w', jnp.zeros((2, 3)))
    True
    >>> select('mlp/~/linear_0', 'b', jnp.zeros(3))
    False
  """
  if not patterns:
    raise ValueError('by_regex needs at least one pattern, got none.')
  return _ByRegex(tuple(compile_pattern(pattern) for pattern in patterns))


def exclude(select: Select, *patterns: str) -> Select:
  """What select chooses, without the leaves whose name matches a pattern.

  Example:
    >>> inner_layers = exclude(is_weight, 'logits')
    >>> inner_layers('net/logits', 'w', jnp.zeros((2, 3)))
    False
  """
  if not callable(select) or not patterns:
    raise ValueError(
      'exclude takes what it leaves out of, and patterns: '
      f"exclude(is_weight, 'logits'); got {(select, *patterns)}."
    )
  return _Exclude(select, by_regex(*patterns))


# Predicates travel in states as part of their structure. As values, unlike
# closures, they are equal where they are built twice, and can be pickled.
@dataclasses.dataclass(frozen=True)
class _ByRegex:
  compiled: tuple[re.Pattern[str], ...]

  def __call__(self, module_name: str, name: str, value: jax.Array) -> bool:
    path = trees.join_name(module_name, name)
    return _is_floating(value) and any(p.search(path) for p in self.compiled)


@dataclasses.dataclass(frozen=True)
class _Exclude:
  select: Select
  excluded: Select

  def __call__(self, module_name: str, name: str, value: jax.Array) -> bool:
    chosen = self.select(module_name, name, value)
    return chosen and not self.excluded(module_name, name, value)


def compile_pattern(pattern: str) -> re.Pattern[str]:
  """Compiles a regular expression for leaf names, with a readable error."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'{pattern!r} is not a regular expression: {error}. Leaf patterns are '
      "regular expressions searched for in 'module/name'."
    ) from error


def selected_names(select: Select, tree: Tree) -> tuple[str, ...]:
  """Names, as 'module/name', of the leaves that select chooses, in order.

  Example:
    >>> selected_names(is_weight, {'linear': {'w': jnp.ones((2, 2)),
    ...                                       'b': jnp.ones(2)}})
    ('linear/w',)
  """
  return tuple(selected(select, tree))


def selected(select: Select, tree: Tree) -> dict[str, Any]:
  """The leaves that select chooses by their 'module/name', in order.

  Of a tree with leaves at least one must be selected, and floating-point leaves
  only.

  Example:
    >>> selected(is_weight, {'a': {'w': jnp.ones((1, 1)), 'b': jnp.ones(1)}})
    {'a/w': Array([[1.]], dtype=float32)}
  """
  if not callable(select):
    raise TypeError(
      'select must be a function of (module name, name, value), got '
      f'{select!r}. Write select=by_regex({str(select)!r}).'
    )
  leaves = list(trees.named_leaves(tree))
  chosen = [leaf for leaf in leaves if select(*leaf)]
  if leaves and not chosen:
    raise ValueError(
      'select chose none of the leaves. Available: '
      + ', '.join(
        f'{leaf.path or "a single array,"} {_described(leaf.value)}'
        for leaf in leaves
      )
      + ". By default these are leaves called 'w', 'kernel' or 'weight' with "
      'two axes or more and floating point, not in a norm or an embedding; for '
      "others pass select=by_regex('pattern')."
    )
  for leaf in chosen:
    if not _is_floating(leaf.value):
      raise ValueError(
        f'select chose {leaf.path!r}, which is {_described(leaf.value)}: only '
        'floating-point leaves can be pruned or reparameterised. Leave it out.'
      )
  return {leaf.path: leaf.value for leaf in chosen}


def _described(value: Any) -> str:
  return f'{value.dtype}[{",".join(map(str, value.shape))}]'


def selection(select: Select, tree: Tree) -> list[dict[str, Any]]:
  """A row for each leaf: whether it is selected, its shape and size, and why.

  Example:
    >>> selection(is_weight, {'linear': {'w': jnp.ones((2, 3))}})[0]['why']
    'a weight of Haiku'
  """
  return [
    {
      'selected': bool(select(*leaf)),
      'leaf': leaf.path,
      'shape': '×'.join(map(str, leaf.value.shape)) or 'scalar',
      'size': leaf.value.size,
      'why': _why(select, leaf),
    }
    for leaf in trees.named_leaves(tree)
  ]


def _why(select: Select, leaf: trees.NamedLeaf) -> str:
  """Why a predicate of this module says what it says of a leaf."""
  if isinstance(select, _Exclude):
    excluded = select.select(*leaf) and select.excluded(*leaf)
    return 'excluded' if excluded else _why(select.select, leaf)
  if isinstance(select, _ByRegex):
    patterns = [p.pattern for p in select.compiled if p.search(leaf.path)]
    return f'matches {patterns[0]!r}' if patterns else 'matches no pattern'
  if select is is_weight:
    maker = layouts.WEIGHT_NAMES.get(leaf.name)
    return _why_not(leaf) or f'a weight of {maker}'
  return ''


def _is_floating(value: Any) -> bool:
  return jnp.issubdtype(value.dtype, jnp.floating)
