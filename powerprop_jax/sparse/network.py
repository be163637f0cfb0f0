"""Any function of weights, without the zeros of the weights.

    run = without_zeros(fn, masks, theta, x)
    values = condense(theta, masks)
    run(values, x)                        # fn(theta⊙M, x), and faster

The products of fn with a masked leaf become products of its connections
(jaxprs/rewrite.py finds them, weight.py computes them); where a weight is
only moved or cast on its way, that is followed. A leaf that is used otherwise,
or is faster so, is given to fn as a dense copy.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from powerprop_jax.core import layouts, names, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.layouts import Axes
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Params
from powerprop_jax.files import tables
from powerprop_jax.jaxprs import moves, rewrite, walk
from powerprop_jax.jaxprs.rewrite import Found, Held
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import kernel_choice, linear, plain_convolution
from powerprop_jax.sparse.convolution import Window
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.kernel_choice import Task
from powerprop_jax.sparse.weight import Condensed

# Whether every leaf that can be is condensed, those that should be faster so,
# or those of these names.
Execution: TypeAlias = Literal['condensed', 'auto'] | Collection[str]


class Connections(NamedTuple):
  """What a leaf is held as; with a leading axis for each axis of its repeats.

  Attributes:
    values: [nnz], sorted by output.
    where: of the leaf as a matrix [window · inputs, outputs].
  """

  values: jax.Array
  where: Index


class Products:
  """The rule by which rewrite.run multiplies by Connections."""

  def __init__(
    self, axes: layouts.LeafAxes, shapes: Mapping[str, tuple[int, ...]]
  ):
    self._axes, self._shapes = axes, shapes

  def dense(self, held: Held, used_by: str) -> jax.Array:
    """The leaf as an array, or one layer of it."""
    del used_by
    leaf = held.view.leaf
    make = linear.dense
    for _ in held.value.values.shape[1:]:
      make = jax.vmap(make)
    entries = make(*held.value)
    return moves.from_matrix(entries, self._axes[leaf], self._shapes[leaf])

  def layers(self, held: Held) -> Connections | None:
    """The connections by the first axis, if products repeat along it."""
    axes, gone = self._axes[held.view.leaf], len(held.view.repeats)
    return held.value if axes.repeats[gone : gone + 1] == (gone,) else None

  def product(
    self, eqn: jax_core.JaxprEqn, held: Held, other: jax.Array, side: int
  ) -> Found:
    """The result of a product, none where it cannot be computed so."""
    leaf = held.view.leaf
    axes = self._axes[leaf]
    found = moves.leaf_axes(held.view, moves.roles(eqn, side))
    if found is None or [set(part) for part in found[:4]] != [
      set(part) for part in axes[:4]
    ]:
      return Found(None)
    if eqn.primitive.name == 'dot_general':
      return Found(_dot(eqn, held, other, side, axes))
    return Found(_conv(eqn, held, other, axes.layer(self._shapes[leaf])))


def _dot(
  eqn: jax_core.JaxprEqn, held: Held, x: jax.Array, side: int, axes: Axes
) -> jax.Array | None:
  values, where = held.cast(held.value.values), held.value.where
  contracted, batch = eqn.params['dimension_numbers']
  here, there = ([*contracted[s], *batch[s]] for s in (side, 1 - side))
  first = [axis for axis in range(x.ndim) if axis not in there]
  free = [a for a in range(len(held.view.axes)) if a not in here]
  pieces = lambda axes: [p for axis in axes for p in held.view.axes[axis]]
  sizes = lambda axes: [math.prod(p.size for p in pieces([a])) for a in axes]
  # [*first, repeats, in] in the order of the weight.
  x = x.transpose(*first, *batch[1 - side], *contracted[1 - side])
  shape = x.shape[: len(first)]
  repeats, inputs = pieces(batch[side]), pieces(contracted[side])
  stacked = moves.pieces_in_order(repeats, axes.repeats)
  x = moves.arranged(
    x,
    shape,
    [*repeats, *inputs],
    [*stacked, *moves.pieces_in_order(inputs, (*axes.window, *axes.inputs))],
  )
  num_in, num_out = math.prod(sizes(contracted[side])), math.prod(sizes(free))
  # Sums are made in the dtype of the result, where that is wider.
  x = x.astype(jnp.promote_types(x.dtype, rewrite.dtype_of(eqn.outvars[0])))
  room = values.shape[-1]
  task = Task(num_in, num_out, room, math.prod(shape), str(x.dtype))
  kernel = kernel_choice.choose(task, name=held.view.leaf)
  if kernel == 'dense':
    return None
  multiply = functools.partial(linear.product, kernel=kernel)
  if repeats:
    count = math.prod(sizes(batch[side]))
    flat = lambda a: a.reshape(count, a.shape[-1])
    y = jax.vmap(multiply, (-2, 0, 0), -2)(
      x.reshape(*shape, count, num_in),
      flat(values),
      jax.tree.map(flat, where),
    )
  else:
    y = multiply(x.reshape(*shape, num_in), values, where)
  outputs = pieces(free)
  y = moves.arranged(
    y,
    shape,
    [*stacked, *moves.pieces_in_order(outputs, axes.outputs)],
    [*repeats, *outputs],
  )
  y = y.reshape(*shape, *sizes(batch[side]), *sizes(free))
  # As the product has them: repeats, and what is left of both sides.
  count, last = len(shape), len(shape) + len(batch[0])
  own, others = range(last, y.ndim), range(count)
  both = (*others, *own) if side == 1 else (*own, *others)
  return y.transpose(*range(count, last), *both)


def _conv(
  eqn: jax_core.JaxprEqn, held: Held, x: jax.Array, shape: tuple[int, ...]
) -> jax.Array | None:
  params = eqn.params
  spec, strides = params['dimension_numbers'], params['window_strides']
  plain = (
    len(strides) <= 2
    and len(set(strides)) == 1
    and params['feature_group_count'] == params['batch_group_count'] == 1
    and {*params['lhs_dilation'], *params['rhs_dilation']} == {1}
    and all(len(held.view.axes[axis]) <= 1 for axis in spec.rhs_spec)
    and x.dtype == held.dtype
  )
  window_axes = [
    piece.axis for axis in spec.rhs_spec[2:] for piece in held.view.axes[axis]
  ]
  if not plain or window_axes != sorted(window_axes):
    return None
  # What has one axis is an image of height 1.
  missing = 2 - len(strides)
  shape = (*[1] * missing, *shape)
  pads = [(0, 0)] * missing
  pads += [(int(low), int(high)) for low, high in params['padding']]
  window = Window(shape[0], shape[1], strides[0], (pads[0], pads[1]))
  lhs, out = spec.lhs_spec, spec.out_spec
  x = x.transpose(lhs[0], *lhs[2:], lhs[1])
  x = x.astype(jnp.promote_types(x.dtype, rewrite.dtype_of(eqn.outvars[0])))
  x = x.reshape(x.shape[0], *[1] * missing, *x.shape[1:])
  weight = Condensed(held.cast(held.value.values), held.value.where, shape)
  y = weight.convolve(x, window, name=held.view.leaf)
  if y is None and jax.default_backend() == 'cpu':
    kernel = weight.dense().astype(x.dtype)
    y = plain_convolution.convolve(x, kernel, window)
  if y is None:
    return None
  y = y.reshape(y.shape[0], *y.shape[1 + missing :])
  by_out = [out[0], *out[2:], out[1]]
  return y.transpose([by_out.index(axis) for axis in range(y.ndim)])


class Leaf(NamedTuple):
  """How without_zeros holds a leaf that its mask has holes in.

  Attributes:
    connections: how many there are.
    entries: of the dense leaf.
    held: 'condensed' or 'dense'.
    why: of 'dense', what else it is used for, or that it is faster.
  """

  connections: int
  entries: int
  held: str
  why: str


class WithoutZeros:
  """What without_zeros returns: run(values, *args).

  Attributes:
    leaves: {'module/name': Leaf} of all that have zeros.
  """

  def __init__(
    self,
    fn: Callable[..., Any],
    theta: Params,
    places: Mapping[str, '_Places'],
    leaves: Mapping[str, Leaf],
  ):
    self._fn, self._theta, self._places = fn, theta, places
    self.leaves = dict(leaves)
    condensed = [n for n, leaf in leaves.items() if leaf.held == 'condensed']
    self._where = {name: places[name].index for name in condensed}
    self._orders = {name: places[name].order for name in condensed}

  def __call__(self, values: Params, *args: Any) -> Any:
    """fn of the weights that the values are of; jit it."""
    held, rest = {}, {}
    for leaf, value in zip(
      trees.named_leaves(self._theta), jax.tree.leaves(values), strict=True
    ):
      name, places = leaf.path, self._places.get(leaf.path)
      if value.shape == leaf.value.shape:
        rest[name] = value
      elif places is None or value.shape != (1, places.size):
        size = places.size if places else leaf.value.shape
        raise ValueError(
          f'values of {name!r} have shape {value.shape}: they are [1, {size}], '
          'as condense(theta, masks) gives them for the same masks.'
        )
      elif name in self._where:
        order, flat = self._orders[name], value[0]
        if order is not None:
          flat = flat.at[order].get(mode='fill', fill_value=0)
        held[name] = Connections(flat, self._where[name])
      else:
        rest[name] = places.dense(value)
    axes = {name: self._places[name].axes for name in held}
    theta = trees.map_leaves(
      lambda leaf: rest.get(leaf.path, leaf.value), self._theta
    )
    return apply(self._fn, held, axes, theta, *args)

  def __str__(self) -> str:
    rows = [
      {
        'leaf': name,
        'connections': leaf.connections,
        'of': leaf.entries,
        'held': leaf.held,
        'why': leaf.why,
      }
      for name, leaf in self.leaves.items()
    ]
    return tables.text_table(rows)


@dataclasses.dataclass(frozen=True)
class _Places:
  """Where the connections of a leaf are.

  Attributes:
    mask: of the leaf.
    named: its axes by its name, in whose order its values are stored: sorted by
      output.
    axes: as the products of the function have them.
  """

  mask: npt.NDArray[np.bool_]
  named: Axes
  axes: Axes

  @property
  def size(self) -> int:
    """How many connections there are."""
    return int(np.count_nonzero(self.mask))

  @functools.cached_property
  def index(self) -> Index:
    """Of each layer, as a matrix [window · inputs, outputs]."""
    layers = moves.matrix(self.mask, self.axes)
    repeats, matrix = layers.shape[:-2], layers.shape[-2:]
    layers = layers.reshape(-1, *matrix)
    room = self.room(self.axes)
    indices = [_index(layer, room) for layer in layers]
    if not repeats:
      return indices[0]
    stacked: Index = jax.tree.map(
      lambda *parts: jnp.stack(parts).reshape(*repeats, -1), *indices
    )
    return stacked

  @functools.cached_property
  def order(self) -> npt.NDArray[np.int64] | None:
    """Which of the stored values each layer has, [*repeats, room].

    None if they are stored as the layer has them. Where a layer has fewer than
    there is room for, one past the last.
    """
    if self.axes.order == self.named.order and not self.axes.repeats:
      return None
    stored = self.stored()
    rank_of = np.full(self.mask.size, stored.size)
    rank_of[stored] = np.arange(stored.size)
    layers = moves.matrix(self.mask, self.axes)
    repeats, matrix = layers.shape[:-2], layers.shape[-2:]
    layers = layers.reshape(-1, *matrix)
    ranks = moves.matrix(rank_of.reshape(self.mask.shape), self.axes)
    found = np.full((len(layers), self.room(self.axes)), stored.size)
    for row, layer, rank in zip(
      found, layers, ranks.reshape(-1, *matrix), strict=True
    ):
      by_output = rank.T[layer.T]
      row[: by_output.size] = by_output
    return found.reshape(*repeats, -1)

  def room(self, axes: Axes) -> int:
    """Connections of its fullest layer."""
    layers = moves.matrix(self.mask, axes)
    return int(layers.sum(axis=(-2, -1)).max())

  def stored(self) -> npt.NDArray[np.int64]:
    """Flat position in the leaf of each stored value."""
    flat = np.arange(self.mask.size).reshape(self.mask.shape)
    by_output = (moves.matrix(x, self.named).T for x in (flat, self.mask))
    positions, kept = by_output
    return positions[kept]

  def dense(self, values: jax.Array) -> jax.Array:
    """The leaf of these values [1, nnz]."""
    flat = jnp.zeros(self.mask.size, values.dtype)
    flat = flat.at[self.stored()].set(values[0], unique_indices=True)
    return flat.reshape(self.mask.shape)


def _index(layer: npt.NDArray[np.bool_], room: int) -> Index:
  """The index of a mask [in, out], with room for so many connections."""
  positions = np.flatnonzero(layer.T)
  index = sparse_index.from_positions(positions, layer.shape)
  missing = room - positions.size
  if not missing:
    return index
  fill = lambda part, value: jnp.pad(part, (0, missing), constant_values=value)
  return index._replace(
    positions=fill(index.positions, layer.size - 1),
    in_positions=fill(index.in_positions, layer.size - 1),
    order=fill(index.order, room - 1),
  )


def without_zeros(
  fn: Callable[..., Any],
  masks: Masks,
  theta: Params,
  *args: Any,
  execution: Execution = 'auto',
) -> WithoutZeros:
  """fn of the connections that exist alone: run(values, *args).

  run(condense(theta, masks), *args) is fn(theta⊙M, *args) but for rounding,
  for arguments of any shapes; those given here decide what is faster. It can be
  compiled, differentiated in reverse mode with respect to the values, and used
  under vmap, scan and checkpoint. Leaves may also be given dense.

  Args:
    fn: of (theta, *args); in any library. It is traced, not run.
    masks: concrete, like theta.
    theta: weights, or their shapes.
    execution: 'condensed' takes every leaf with zeros that is multiplied by:
      in matrix products, alone or in stacks (of layers, of experts), and in
      convolutions over one or two axes with equal strides, without groups or
      dilation. 'auto' takes those of them that have so few connections that
      they should be faster; sparse.tune finds out by running the function. Or
      the names of leaves, 'module/name', as tune gives them.

  Returns:
    run. print(run) says which leaves are condensed, and why the others are not.

  Raises:
    TypeError: if masks are traced.
    ValueError: if fn does not use a leaf with zeros, as when it closes over its
      weights instead of taking them, or if shapes differ, or a leaf that is
      named has no zeros.

  Example:
    >>> fn = lambda theta, x: x @ theta['w']
    >>> theta = {'w': jnp.arange(4.).reshape(2, 2)}
    >>> masks = {'w': jnp.array([[False, True], [False, True]])}
    >>> run = without_zeros(
    ...   fn, masks, theta, jnp.ones((1, 2)), execution='condensed')
    >>> run(condense(theta, masks), jnp.ones((1, 2)))
    Array([[0., 4.]], dtype=float32)
    >>> print(run)
    leaf  connections  of  held       why
    w               2   4  condensed
  """
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  theta = jax.eval_shape(lambda theta: theta, theta)
  places = _with_holes(masks)
  found = plan(
    fn,
    {name: place.room for name, place in places.items()},
    theta,
    *args,
    execution=execution,
  )
  leaves = {}
  for name, place in places.items():
    if name in found.axes:
      places[name] = dataclasses.replace(place, axes=found.axes[name])
    why = found.why[name]
    held = 'condensed' if name in found.axes else 'dense'
    leaves[name] = Leaf(place.size, place.mask.size, held, why)
  return WithoutZeros(fn, theta, places, leaves)


class Plan(NamedTuple):
  """Which leaves a function can do without the zeros of.

  Attributes:
    axes: of the leaves to be condensed, by name, as their products have them.
    why: of every leaf, why it is not, or what it is dense for besides.
  """

  axes: dict[str, Axes]
  why: dict[str, str]


def plan(
  fn: Callable[..., Any],
  rooms: Mapping[str, Callable[[Axes], int]],
  theta: Params,
  *args: Any,
  execution: Execution = 'auto',
) -> Plan:
  """What without_zeros does, of leaves whose connections may still move.

  Args:
    rooms: for each leaf with zeros, how many connections there is to be room
      for in each of its layers, given its axes.

  Raises:
    ValueError: if fn does not use such a leaf, or another is named.
  """
  _check_execution(execution, rooms)
  uses = walk.products(fn, theta, *args)
  axes = {}
  for name in rooms:
    if not uses[name].products and not uses[name].others:
      raise ValueError(
        f'the function does not use {name!r}: the weights must be its first '
        'argument, fn(theta, *args), not something that it closes over.'
      )
    usable = _usable_axes(uses[name])
    if usable is not None:
      axes[name] = usable
  tasks = _tasks(fn, rooms, axes, theta, *args)
  why = {}
  for name in rooms:
    others = ', '.join(_others(uses[name]))
    why[name] = f'and dense for {others}' if others else ''
    if name not in tasks:
      why[name] = f'used by {others or "a product that has no sparse form"}'
      axes.pop(name, None)
    elif not _is_chosen(execution, name, tasks[name]):
      why[name] = 'faster so' if execution == 'auto' else 'not chosen'
      del axes[name]
  return Plan(axes, why)


def _check_execution(execution: Execution, leaves: Collection[str]) -> None:
  if isinstance(execution, str):
    names.check_choice('execution', execution, ('condensed', 'auto'))
  else:
    for name in set(execution) - set(leaves):
      raise ValueError(
        f'execution names {name!r}, which has no zeros; there are: '
        f'{", ".join(leaves) or "none"}.'
      )


def _is_chosen(execution: Execution, name: str, task: Task) -> bool:
  if execution == 'auto':
    return kernel_choice.pays(task)
  return execution == 'condensed' or name in execution


def apply(
  fn: Callable[..., Any],
  held: Mapping[str, Connections],
  axes: layouts.LeafAxes,
  theta: Params,
  *args: Any,
) -> Any:
  """fn(theta, *args), with these leaves of theta held as their connections.

  Of such a leaf theta has the shape alone; its axes are those of plan.
  """
  shapes = {leaf.path: leaf.value.shape for leaf in trees.named_leaves(theta)}
  rule = Products(axes, shapes)
  return rewrite.run(fn, rule, rewrite.hold(dict(held), theta), *args)[0]


def _with_holes(masks: Masks) -> dict[str, _Places]:
  """Of each mask with a False in it, by name."""
  found = {}
  for leaf in trees.named_leaves(masks):
    if isinstance(leaf.value, jax.core.Tracer):
      raise TypeError(
        f'the mask of {leaf.path!r} is traced, and must be concrete: the '
        'number of connections is part of the program. Call it outside of jit.'
      )
    mask = np.asarray(leaf.value)
    if not mask.all():
      axes = layouts.by_name(leaf.module_name, leaf.name, mask.shape)
      found[leaf.path] = _Places(mask, axes, axes)
  return found


def _others(uses: walk.Uses) -> list[str]:
  """What a leaf is used for besides products with its usable axes."""
  found, usable = [*uses.others], _usable_axes(uses)
  rest = {product.axes for product in uses.products} - {usable}
  groups = {axes for axes in rest if axes is not None and axes.groups > 1}
  if groups:
    found.append('a convolution in groups')
  if usable is not None and rest - groups:
    found.append('a product over other axes')
  return found


def _usable_axes(uses: walk.Uses) -> Axes | None:
  """The axes of its first product that has some."""
  found = (product.axes for product in uses.products)
  return next((a for a in found if a is not None and a.groups == 1), None)


def _tasks(
  fn: Callable[..., Any],
  rooms: Mapping[str, Callable[[Axes], int]],
  axes: layouts.LeafAxes,
  theta: Params,
  *args: Any,
) -> dict[str, Task]:
  """What the condensed products compute."""

  def connections(leaf: trees.NamedLeaf) -> Connections:
    shape, of_leaf = leaf.value.shape, axes[leaf.path]
    repeats = [shape[axis] for axis in of_leaf.repeats]
    *window, num_in, num_out = of_leaf.layer(shape)
    num_in *= math.prod(window)
    room = rooms[leaf.path](of_leaf)
    part: Callable[..., Any] = lambda size, dtype=jnp.int32: (
      jax.ShapeDtypeStruct((*repeats, size), dtype)
    )
    where = Index(*map(part, (num_out + 1, room, num_in + 1, room, room)))
    return Connections(part(room, leaf.value.dtype), where)

  held = {
    leaf.path: connections(leaf)
    for leaf in trees.named_leaves(theta)
    if leaf.path in axes
  }
  with kernel_choice.recorded() as tasks:
    jax.eval_shape(
      lambda held, theta, *args: apply(fn, held, axes, theta, *args),
      *(held, theta, *args),
    )
  return tasks


def condense(theta: Params, masks: Masks) -> Params:
  """The connections of every leaf that its mask has holes in, as [1, nnz].

  A leaf keeps its name, and has two axes, so that what chooses leaves still
  takes it for a weight. Values are sorted by output; see layouts.by_name.

  Example:
    >>> masks = {'w': jnp.eye(2, dtype=bool)}
    >>> condense({'w': jnp.array([[1., 2.], [3., 4.]])}, masks)
    {'w': Array([[1., 4.]], dtype=float32)}
  """
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  places = _with_holes(masks)
  return trees.map_leaves(
    lambda leaf: (
      jnp.reshape(leaf.value, (1, -1))[:, places[leaf.path].stored()]
      if leaf.path in places
      else leaf.value
    ),
    theta,
  )


def expand(values: Params, masks: Masks) -> Params:
  """Undoes condense: dense leaves, zero where there is no connection.

  Example:
    >>> masks = {'w': jnp.eye(2, dtype=bool)}
    >>> expand({'w': jnp.array([[1., 4.]])}, masks)['w']
    Array([[1., 0.],
           [0., 4.]], dtype=float32)
  """
  places = _with_holes(masks)

  def visit(leaf: trees.NamedLeaf, mask: jax.Array) -> jax.Array:
    place = places.get(leaf.path)
    shape = jnp.shape(mask) if place is None else (1, place.size)
    if leaf.value.shape != shape:
      raise ValueError(
        f'values of {leaf.path!r} have shape {leaf.value.shape} and must have '
        f'{shape}, as condense(theta, masks) gives them for the same masks.'
      )
    return leaf.value if place is None else place.dense(leaf.value)

  return trees.map_leaves(visit, values, masks)
