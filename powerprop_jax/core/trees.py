"""Trees of named arrays: names, maps over chosen leaves, states inside states.

Haiku keeps parameters as {module_name: {name: array}}. Everything in this
library that speaks of a leaf speaks of that pair; for other containers the
module name is the path above the last key, joined by '/'.
"""

from collections.abc import Callable, Hashable, Iterator
import functools
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar('T')

# Trees of arrays in any containers; what they hold is in their names.
Tree: TypeAlias = Any
# φ or θ, g or Δφ, and the state of a transformation.
Params: TypeAlias = Any
Updates: TypeAlias = Any
OptState: TypeAlias = Any
# α: a number or an array of one, or a tree of these with one for each leaf.
Alpha: TypeAlias = Any

# Which leaves: called with (module_name, name, value).
Select = Callable[[str, str, jax.Array], bool]


class NamedLeaf(NamedTuple):
  """A leaf and what it is called.

  Attributes:
    module_name: path of the module, e.g. 'mlp/~/linear_0'.
    name: name within the module, e.g. 'w'.
    value: the leaf.
  """

  module_name: str
  name: str
  value: Any

  @property
  def path(self) -> str:
    """'module_name/name', the form that patterns are matched against."""
    return join_name(self.module_name, self.name)


class Static(tuple[()]):
  """A value that belongs to a program, not to its data: a tree without leaves.

  As part of a state it is compiled in, and another value is another structure.
  It is a named tuple without fields, as optax.EmptyState is, so that whatever
  stores states knows how to go through it. As structures are told apart by
  their types, each value has a type of its own.

  Attributes:
    value: any hashable value.

  Example:
    >>> Static(2.0), Static(2.0) == Static(2.0), Static(2.0) == Static(3.0)
    (Static(2.0), True, False)
    >>> jax.tree.leaves(Static(2.0))
    []
  """

  _fields = ()
  value: Any

  def __new__(cls, *value: Hashable) -> 'Static':
    """Static(value); without a value, of a type that has one already."""
    return super().__new__(_static_type(*value) if value else cls)

  def __reduce__(self) -> Any:
    return Static, (self.value,)

  def __eq__(self, other: object) -> bool:
    return type(self) is type(other)

  def __hash__(self) -> int:
    return hash(type(self))

  def __repr__(self) -> str:
    return f'Static({self.value!r})'


# typed: 1, 1.0 and True are equal, but not the same.
@functools.lru_cache(maxsize=None, typed=True)
def _static_type(value: Hashable) -> type[Static]:
  # A property: a function as the attribute of a class would become a method.
  attributes = {'value': property(lambda self: value)}
  return type(f'Static({value!r})', (Static,), attributes)


def join_name(module_name: str, name: str) -> str:
  """'module_name/name', or just the name at the top level."""
  return f'{module_name}/{name}' if module_name else name


def leaf_name(path: tuple[Any, ...]) -> tuple[str, str]:
  """The (module name, name) of a leaf at a key path of jax.tree_util.

  A Variable of Flax NNX is called as it is, without the name of its value.
  """
  last = path[-1] if len(path) > 1 else None
  if isinstance(last, jax.tree_util.GetAttrKey) and last.name == 'value':
    path = path[:-1]
  keys = [_key_str(key) for key in path]
  return '/'.join(keys[:-1]), keys[-1] if keys else ''


def _key_str(key: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def named_leaves(tree: Tree) -> Iterator[NamedLeaf]:
  """Leaves of a tree with their names, in the order of jax.tree.leaves."""
  for path, value in jax.tree_util.tree_leaves_with_path(tree):
    yield NamedLeaf(*leaf_name(path), value)


def by_path(tree: Tree) -> dict[str, Any]:
  """Leaves of a tree by their 'module_name/name', in order."""
  return {leaf.path: leaf.value for leaf in named_leaves(tree)}


def map_leaves(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """Maps fn(NamedLeaf, *rest_values) over the leaves of tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, value, *values: fn(
      NamedLeaf(*leaf_name(path), value), *values
    ),
    tree,
    *rest,
  )


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """Maps fn(module_name, name, value, *rest_values) over the leaves of tree."""
  return map_leaves(lambda leaf, *values: fn(*leaf, *values), tree, *rest)


def map_selected(
  fn: Callable[..., Any], select: Select, tree: Tree, *rest: Tree
) -> Tree:
  """Maps fn(value, *rest_values) over selected leaves; keeps the others."""
  return map_leaves(
    lambda leaf, *values: (
      fn(leaf.value, *values) if select(*leaf) else leaf.value
    ),
    tree,
    *rest,
  )


def require_params(params: Params, name: str, *, latent: bool = False) -> None:
  """Refuses an update of which Optax allows that it leaves out params."""
  if params is None and latent:
    raise ValueError(
      f'{name} needs the latent parameters: call update(grads, state, phi) '
      'with grads taken at effective_params(phi, state).'
    )
  if params is None:
    raise ValueError(
      f'{name} needs the parameters: call update(grads, state, params).'
    )


def check_arrays(tree: Tree, name: str) -> None:
  """Refuses a tree with leaves that are no arrays of numbers, by its name.

  Example:
    >>> check_arrays({'act': jnp.tanh}, 'theta')
    Traceback (most recent call last):
      ...
    ValueError: theta must be a tree of named arrays; 'act' is PjitFunction.
    Leave it out, as nnx.split(model, nnx.Param, ...) and eqx.filter(model,
    eqx.is_array) do.
  """
  for leaf in named_leaves(tree):
    value = leaf.value
    kind = getattr(value, 'dtype', type(value).__name__)
    is_number = isinstance(value, (bool, int, float, complex)) or (
      hasattr(value, 'dtype')
      and any(jnp.issubdtype(kind, known) for known in (jnp.number, jnp.bool_))
    )
    if not is_number or not leaf.path:
      raise ValueError(
        f'{name} must be a tree of named arrays; {leaf.path!r} is {kind}. '
        'Leave it out, as nnx.split(model, nnx.Param, ...) and '
        'eqx.filter(model, eqx.is_array) do.'
      )


def is_traced(tree: Tree) -> bool:
  """Whether values of a tree are not known, as inside jit."""
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def all_finite(tree: Tree) -> jax.Array:
  """Whether every number of a tree is finite, a boolean scalar."""
  finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.asarray(True))


def find_states(opt_state: OptState, *kinds: type[T]) -> list[T]:
  """All states of the given types anywhere inside an optimiser state."""
  is_kind = lambda node: isinstance(node, kinds)
  nodes = jax.tree.leaves(opt_state, is_leaf=is_kind)
  return [node for node in nodes if is_kind(node)]


def replace_states(
  opt_state: OptState, kind: type[T], replace: Callable[[T], Any]
) -> Tree:
  """The optimiser state with replace applied to every state of one type."""
  is_kind = lambda node: isinstance(node, kind)
  return jax.tree.map(
    lambda node: replace(node) if is_kind(node) else node,
    opt_state,
    is_leaf=is_kind,
  )
