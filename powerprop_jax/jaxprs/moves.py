"""A weight on its way to a product: what its axes are after being moved.

A network may transpose, reshape, cast or slice a weight before it multiplies
by it. A View says, for each axis of what came of it, which parts of which axes
of the leaf lie there, so that what the product does with an axis is known of
the leaf's own.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core as jax_core

from powerprop_jax.core.layouts import Axes

# What may take one entry of the first axis, or (since JAX 0.11) each by itself.
SLICES = ('slice', 'dynamic_slice', 'unstack')

Role: TypeAlias = str  # 'inputs', 'outputs', 'window' or 'repeats'


class Piece(NamedTuple):
  """Part of an axis of a leaf: so many steps of this stride along it."""

  axis: int
  size: int
  stride: int


class View(NamedTuple):
  """What came of a leaf that was only moved.

  Attributes:
    leaf: 'module/name'.
    shape: of the leaf.
    axes: for each axis of the view its pieces, the slowest first.
    repeats: pieces of which a scan, or a slice, shows the product one entry at
      a time.
  """

  leaf: str
  shape: tuple[int, ...]
  axes: tuple[tuple[Piece, ...], ...]
  repeats: tuple[Piece, ...] = ()

  @property
  def is_whole(self) -> bool:
    """Whether nothing has happened to it but that layers were taken apart."""
    at = len(self.repeats)
    return self.axes == view(self.leaf, self.shape).axes[at:]

  def layer(self) -> 'View':
    """One entry of the first axis."""
    repeats = (*self.repeats, *self.axes[0])
    return self._replace(axes=self.axes[1:], repeats=repeats)


def view(leaf: str, shape: tuple[int, ...]) -> View:
  """The leaf as it is."""
  pieces = [(Piece(axis, size, 1),) for axis, size in enumerate(shape)]
  return View(leaf, tuple(shape), tuple(pieces))


def moved(eqn: jax_core.JaxprEqn, source: View) -> View | None:
  """What an equation makes of a view; None if it does more than moving it.

  Example:
    >>> transposed = jax.make_jaxpr(jnp.transpose)(jnp.ones((3, 2))).eqns[0]
    >>> [piece.axis for piece, in moved(transposed, view('w', (3, 2))).axes]
    [1, 0]
  """
  name, axes, params = eqn.primitive.name, source.axes, eqn.params
  if name in ('convert_element_type', 'copy', 'copy_p'):
    return source
  if name == 'transpose':
    return source._replace(axes=tuple(axes[a] for a in params['permutation']))
  if name in ('reshape', 'squeeze', 'expand_dims'):
    return _reshaped(source, shape_of(eqn.outvars[0]))
  if name == 'broadcast_in_dim':
    size = math.prod(shape_of(eqn.invars[0]))
    shape = shape_of(eqn.outvars[0])
    kept = list(params['broadcast_dimensions'])
    if math.prod(shape) == size and kept == sorted(kept):
      return _reshaped(source, shape)
  if name == 'unstack':
    return source.layer() if params['axis'] == 0 else None
  if name in SLICES:
    (_, *rest), shape = map(shape_of, (eqn.invars[0], eqn.outvars[0]))
    if shape == (1, *rest):
      one = source.layer()
      return one._replace(axes=((), *one.axes))
  return None


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
  """How many inputs of a scan are constant, and how many it carries."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  # JAX 0.12 has trees of consts, carry and slices instead.
  consts, carry, _ = params['ft_in'].unpack()
  return len(consts), len(carry)


def shape_of(atom: Any) -> tuple[int, ...]:
  """Of a variable of a jaxpr, or a literal in it."""
  return tuple(atom.aval.shape)


def _reshaped(source: View, shape: Sequence[int]) -> View | None:
  rest = [piece for pieces in source.axes for piece in pieces if piece.size > 1]
  found = []
  for size in shape:
    pieces = []
    while size > 1:
      if not rest:
        return None
      first = rest.pop(0)
      if first.size > size:
        if first.size % size:
          return None
        inner = first.size // size
        rest.insert(0, Piece(first.axis, inner, first.stride))
        first = Piece(first.axis, size, first.stride * inner)
      elif size % first.size:
        return None
      pieces.append(first)
      size //= first.size
    found.append(tuple(pieces))
  return source._replace(axes=tuple(found))


class Roles(NamedTuple):
  """What a product does with each axis of one of its operands, in its order."""

  by_axis: tuple[Role, ...]
  order: tuple[int, ...]  # Axes as the product goes through them.
  groups: int = 1


def roles(eqn: jax_core.JaxprEqn, side: int) -> Roles | None:
  """Of the operand on this side, 0 or 1, of a product.

  None for the images of a convolution, which are no weight of it.
  """
  shape = shape_of(eqn.invars[side])
  if eqn.primitive.name == 'dot_general':
    contracted, batch = (pair[side] for pair in eqn.params['dimension_numbers'])
    by_axis = ['outputs'] * len(shape)
    for axis in contracted:
      by_axis[axis] = 'inputs'
    for axis in batch:
      by_axis[axis] = 'repeats'
    free = [a for a in range(len(shape)) if by_axis[a] == 'outputs']
    return Roles(tuple(by_axis), (*batch, *contracted, *free))
  if side == 0:
    return None
  spec = eqn.params['dimension_numbers'].rhs_spec
  by_axis = ['window'] * len(shape)
  by_axis[spec[0]], by_axis[spec[1]] = 'outputs', 'inputs'
  groups = eqn.params['feature_group_count']
  return Roles(tuple(by_axis), (*spec[2:], spec[1], spec[0]), groups)


def leaf_axes(source: View, found: Roles | None) -> Axes | None:
  """The axes of the leaf, from what a product does with those of a view.

  Repeats come in the order of the leaf. None without roles, or if one axis of
  the leaf has parts with different ones.
  """
  if found is None:
    return None
  by_axis: dict[int, Role] = {p.axis: 'repeats' for p in source.repeats}
  ordered: dict[Role, list[int]] = {
    'inputs': [],
    'outputs': [],
    'window': [],
    'repeats': [],
  }
  for axis in found.order:
    for piece in source.axes[axis]:
      role = found.by_axis[axis]
      if by_axis.setdefault(piece.axis, role) != role:
        return None
      if piece.axis not in ordered[role]:
        ordered[role].append(piece.axis)
  for axis, size in enumerate(source.shape):
    if size == 1 and axis not in by_axis:  # Lies nowhere in particular.
      ordered['window' if ordered['window'] else 'inputs'].append(axis)
  ordered['repeats'] = sorted(a for a, r in by_axis.items() if r == 'repeats')
  return Axes(
    **{role: tuple(axes) for role, axes in ordered.items()},
    groups=found.groups,
  )


def matrix(weight: Any, axes: Axes) -> Any:
  """An array of the leaf as [*repeats, window · inputs, outputs].

  Example:
    >>> matrix(jnp.arange(6).reshape(2, 3), Axes(inputs=(1,), outputs=(0,)))
    Array([[0, 3],
           [1, 4],
           [2, 5]], dtype=int32)
  """
  shape = weight.shape
  repeats = [shape[axis] for axis in axes.repeats]
  num_out = math.prod(shape[axis] for axis in axes.outputs)
  return weight.transpose(axes.order).reshape(*repeats, -1, num_out)


def from_matrix(
  entries: jax.Array, axes: Axes, shape: tuple[int, ...]
) -> jax.Array:
  """Undoes matrix for a leaf of this shape, perhaps for one layer of it.

  Entries are [*repeats, window · inputs, outputs], with the last of the repeats
  alone where scans went through the others; so is what is returned.

  Example:
    >>> from_matrix(jnp.ones((3, 2)), Axes((1,), (0,)), (2, 3)).shape
    (2, 3)
  """
  gone = len(axes.repeats) - (entries.ndim - 2)
  order = axes._replace(repeats=axes.repeats[gone:]).order
  back = [order.index(axis) for axis in sorted(order)]
  return entries.reshape([shape[axis] for axis in order]).transpose(back)


def pieces_in_order(
  pieces: Sequence[Piece], axes: Sequence[int]
) -> list[Piece]:
  """The pieces as they lie in these axes of the leaf, one after the other."""
  return sorted(pieces, key=lambda p: (axes.index(p.axis), -p.stride))


def arranged(
  x: jax.Array, shape: tuple[int, ...], old: list[Piece], new: list[Piece]
) -> jax.Array:
  """[*shape, pieces in the old order] with the pieces in the new order."""
  if old == new:
    return x
  x = x.reshape(*shape, *(piece.size for piece in old))
  count = len(shape)
  order = [count + old.index(piece) for piece in new]
  return x.transpose(*range(count), *order)
