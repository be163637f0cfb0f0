"""Runs a function with its weights held in another way than as arrays.

The jaxpr of the function is followed equation by equation, with values as JAX
itself would. A weight that is held otherwise is followed as long as it is only
moved (moves.py); where it comes to a product, a rule says what is computed
instead, and anything else is given a dense copy. Whatever has to do with no
such weight is left as it is.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
from jax.extend import core as jax_core

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.jaxprs import moves, walk
from powerprop_jax.jaxprs.moves import View

PRODUCTS = ('dot_general', 'conv_general_dilated')

# Calls whose jaxpr is about parts of their inputs: what they get is an array.
_IN_PARTS = ('shard_map', 'pmap', 'pallas_call')


@jax.tree_util.register_pytree_node_class
class Held:
  """A weight that is no array, on its way.

  Attributes:
    value: what it is held as: a tree of arrays.
    view: how it was moved so far.
    dtypes: of the leaf, and those that it was cast to, one after the other.
  """

  def __init__(self, value: Tree, view: View, dtypes: tuple[Any, ...]):
    self.value, self.view, self.dtypes = value, view, dtypes

  @property
  def dtype(self) -> Any:
    """Of what comes to the product."""
    return self.dtypes[-1]

  def cast(self, entries: jax.Array) -> jax.Array:
    """Entries of the leaf, rounded as they were on the way."""
    for dtype in self.dtypes:
      entries = entries.astype(dtype)
    return entries

  def tree_flatten(self) -> tuple[tuple[Tree], tuple[View, Any]]:
    """For JAX: the value, and what is known when a program is traced."""
    return (self.value,), (self.view, self.dtypes)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Sequence[Tree]) -> 'Held':
    """Undoes tree_flatten."""
    return cls(children[0], *static)


Value: TypeAlias = Any  # An array, or Held.


class Found(NamedTuple):
  """What a rule makes of a product.

  Attributes:
    result: of the product; None to multiply a dense copy.
    seen: what observers are to be shown, a tree of arrays, or None.
  """

  result: jax.Array | None
  seen: Tree = None


class Rule(Protocol):
  """What a held weight is to the products it comes to."""

  def product(
    self, eqn: jax_core.JaxprEqn, held: Held, other: jax.Array, side: int
  ) -> Found:
    """What comes of the product with held as the operand on this side."""

  def dense(self, held: Held, used_by: str) -> jax.Array:
    """The leaf as an array, without the axes that scans went through."""

  def layers(self, held: Held) -> Tree | None:
    """What it holds by its first axis, for scans and slices, if it can."""


# What was seen, by leaf, in the order of the products.
Seen: TypeAlias = dict[str, list[Tree]]


def run(
  fn: Callable[..., Any], rule: Rule, theta: Params, *args: Any
) -> tuple[Any, Seen]:
  """fn(theta, *args), where leaves of theta that are Held are held.

  It can be transformed as fn can, with respect to what the leaves hold, as far
  as the rule can. What a product inside a scan saw comes stacked by its turns.
  """
  is_held = lambda leaf: isinstance(leaf, Held)
  shown = jax.tree.map(
    lambda leaf: (
      jax.ShapeDtypeStruct(leaf.view.shape, leaf.dtype)
      if is_held(leaf)
      else leaf
    ),
    theta,
    is_leaf=is_held,
  )
  closed, shape = jax.make_jaxpr(fn, return_shape=True)(shown, *args)
  values = jax.tree.leaves((theta, args), is_leaf=is_held)
  found, seen = _Run(rule).closed(closed, values)
  return jax.tree.unflatten(jax.tree.structure(shape), found), seen


def hold(values: dict[str, Tree], theta: Params) -> Params:
  """theta, with the leaves of these names held as the values."""
  return trees.map_leaves(
    lambda leaf: (
      Held(
        values[leaf.path],
        moves.view(leaf.path, leaf.value.shape),
        (jax.typeof(leaf.value).dtype,),
      )
      if leaf.path in values
      else leaf.value
    ),
    theta,
  )


def place(layer: jax.Array, held: Held) -> jax.Array:
  """The view of a leaf that is an array, without the axes of its repeats."""
  view = held.view
  pieces = [piece for axis in view.axes for piece in axis]
  # As the pieces lie in the leaf, and from there as they lie in the view.
  stored = sorted(pieces, key=lambda piece: (piece.axis, -piece.stride))
  shape = [math.prod(p.size for p in axis) for axis in view.axes]
  parts = layer.reshape([piece.size for piece in stored])
  order = [stored.index(piece) for piece in pieces]
  return held.cast(parts.transpose(order).reshape(shape))


class _Run:
  """Goes through jaxprs with values."""

  def __init__(self, rule: Rule):
    self._rule = rule
    self._seen: Seen = {}

  def closed(
    self, closed: jax_core.ClosedJaxpr, inputs: Sequence[Value]
  ) -> tuple[list[jax.Array], Seen]:
    """What it returns, all as arrays, and what was seen on the way.

    What is seen inside a loop or a branch must leave it as a result.
    """
    around, self._seen = self._seen, {}
    found = self._jaxpr(closed.jaxpr, closed.consts, inputs)
    found = [self._dense(value, 'the result') for value in found]
    seen, self._seen = self._seen, around
    return found, seen

  def _see(self, seen: Seen) -> None:
    for leaf, values in seen.items():
      self._seen.setdefault(leaf, []).extend(values)

  def _jaxpr(
    self,
    jaxpr: jax_core.Jaxpr,
    consts: Sequence[Value],
    inputs: Sequence[Value],
  ) -> list[Value]:
    known: dict[jax_core.Var, Value] = {}
    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
      return atom.val if isinstance(atom, jax_core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
      values = list(map(read, eqn.invars))
      if any(isinstance(value, Held) for value in values):
        outputs = self._equation(eqn, values)
      else:
        outputs = bind(eqn, values)
      known.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))

  def _equation(
    self, eqn: jax_core.JaxprEqn, values: list[Value]
  ) -> list[Value]:
    """An equation with a held weight among its inputs."""
    name = eqn.primitive.name
    if name in PRODUCTS:
      return [self._product(eqn, values)]
    if name == 'scan':
      return self._scan(eqn.params, values)
    if name == 'while':
      return self._while(eqn.params, values)
    if name == 'cond':
      return self._cond(eqn.params, values)
    called = walk.called_jaxpr(eqn)
    if called is not None and name not in _IN_PARTS:
      return self._call(eqn, called, values)
    first = values[0]
    if isinstance(first, Held):
      view = moves.moved(eqn, first.view)
      found = None if view is None else self._moved(eqn, first, values[1:])
      if view is not None and found is not None:
        dtype = dtype_of(eqn.outvars[0])
        is_cast = dtype != first.dtype
        dtypes = (*first.dtypes, dtype) if is_cast else first.dtypes
        return [Held(value, view, dtypes) for value in found]
    return bind(eqn, [self._dense(value, name) for value in values])

  def _dense(self, value: Value, used_by: str) -> jax.Array:
    if not isinstance(value, Held):
      return value
    return place(self._rule.dense(value, used_by), value)

  def _product(self, eqn: jax_core.JaxprEqn, values: list[Value]) -> Value:
    held = [isinstance(value, Held) for value in values]
    found = None
    if sum(held) == 1:
      side = held.index(True)
      leaf, other = values[side], values[1 - side]
      found, seen = self._rule.product(eqn, leaf, other, side)
      if seen is not None:
        self._see({leaf.view.leaf: [seen]})
    if found is None:
      name = 'a product with another weight' if all(held) else ''
      name = name or eqn.primitive.name
      return bind(eqn, [self._dense(value, name) for value in values])[0]
    return found.astype(dtype_of(eqn.outvars[0]))

  def _call(
    self,
    eqn: jax_core.JaxprEqn,
    called: jax_core.ClosedJaxpr,
    values: list[Value],
  ) -> list[Value]:
    name = eqn.primitive.name
    if name in ('remat2', 'checkpoint', 'remat'):
      body = jax.checkpoint(
        lambda *values: self.closed(called, values),
        prevent_cse=eqn.params['prevent_cse'],
        policy=eqn.params['policy'],
      )
      found, seen = body(*values)
      self._see(seen)
      return list(found)
    if name.startswith('custom_'):
      # Its own derivative is that of what it computes, if that is a product.
      held = [isinstance(value, Held) for value in values]
      if _moved_outputs(called.jaxpr, held) is None:
        name = f'{eqn.params.get("name", name)}, which has its own derivative'
        return bind(eqn, [self._dense(value, name) for value in values])
    return self._jaxpr(called.jaxpr, called.consts, values)

  def _scan(self, params: dict[str, Any], values: list[Value]) -> list[Value]:
    closed = params['jaxpr']
    num_consts, num_carry = moves.scan_counts(params)
    start = num_consts + num_carry
    consts, stacks = values[:num_consts], values[start:]
    carry = [
      self._dense(v, 'a carry of scan') for v in values[num_consts:start]
    ]
    layers = [self._layers(value) for value in stacks]
    kept = [layer is not None for layer in layers]
    layers = [
      layer if is_kept else self._dense(value, 'scan')
      for value, layer, is_kept in zip(stacks, layers, kept, strict=True)
    ]

    def body(carry: Tree, layers: Tree) -> tuple[Tree, Tree]:
      shown = [
        Held(layer, value.view.layer(), value.dtypes) if is_kept else layer
        for value, layer, is_kept in zip(stacks, layers, kept, strict=True)
      ]
      found, seen = self.closed(closed, [*consts, *carry, *shown])
      return found[: len(carry)], (found[len(carry) :], seen)

    carry, (found, seen) = jax.lax.scan(
      body,
      carry,
      layers,
      params['length'],
      reverse=params['reverse'],
      unroll=params['unroll'],
    )
    self._see(seen)
    return [*carry, *found]

  def _layers(self, value: Value) -> Tree | None:
    """What a held weight gives to the turns of a scan, if it can."""
    if isinstance(value, Held) and value.view.is_whole:
      return self._rule.layers(value)
    return None

  def _moved(
    self, eqn: jax_core.JaxprEqn, held: Held, starts: Sequence[Value]
  ) -> list[Tree] | None:
    """What each result of a move holds, if it can."""
    if eqn.primitive.name not in moves.SLICES:
      return [held.value]
    layers = self._layers(held)
    if layers is None:
      return None
    entry = lambda start: jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, start, keepdims=False), layers
    )
    if eqn.primitive.name == 'unstack':
      return [entry(start) for start in range(len(eqn.outvars))]
    return [entry((starts or eqn.params['start_indices'])[0])]

  def _while(self, params: dict[str, Any], values: list[Value]) -> list[Value]:
    cond, body = params['cond_jaxpr'], params['body_jaxpr']
    first = params['cond_nconsts']
    second = first + params['body_nconsts']
    of_cond, of_body = values[:first], values[first:second]
    start = [
      self._dense(value, 'a carry of while') for value in values[second:]
    ]

    def turn(closed: Any, consts: Sequence[Value], carry: Tree) -> list[Value]:
      found, seen = self.closed(closed, [*consts, *carry])
      if seen:
        raise ValueError(
          f'the product with {next(iter(seen))!r} is inside a while loop, '
          'whose turns cannot be observed. Use jax.lax.scan.'
        )
      return found

    return jax.lax.while_loop(
      lambda carry: turn(cond, of_cond, carry)[0],
      lambda carry: turn(body, of_body, carry),
      start,
    )

  def _cond(self, params: dict[str, Any], values: list[Value]) -> list[Value]:
    index, *operands = values

    def branch(closed: jax_core.ClosedJaxpr) -> Callable[..., Any]:
      return lambda *values: self.closed(closed, values)

    branches = [branch(closed) for closed in params['branches']]
    found, seen = jax.lax.switch(index, branches, *operands)
    self._see(seen)
    return list(found)


def dtype_of(atom: Any) -> Any:
  """Of a variable of a jaxpr."""
  return atom.aval.dtype


def bind(eqn: jax_core.JaxprEqn, values: Sequence[jax.Array]) -> list[Any]:
  """The results of an equation as it is."""
  bound = eqn.primitive.get_bind_params(eqn.params)
  # Before JAX 0.10: with the functions that it calls.
  functions, params = ((), bound) if isinstance(bound, dict) else bound
  with eqn.ctx.manager:
    found = eqn.primitive.bind(*functions, *values, **params)
  return list(found) if eqn.primitive.multiple_results else [found]


def _moved_outputs(
  jaxpr: jax_core.Jaxpr, held: Sequence[bool]
) -> list[bool] | None:
  """Which outputs are held inputs, only moved.

  None if an input that is held is used in it for more than moves and products.
  """
  followed = {v for v, is_so in zip(jaxpr.invars, held, strict=True) if is_so}
  is_followed = lambda v: isinstance(v, jax_core.Var) and v in followed
  for eqn in jaxpr.eqns:
    touched = list(map(is_followed, eqn.invars))
    if not any(touched) or eqn.primitive.name in PRODUCTS:
      continue
    called = walk.called_jaxpr(eqn)
    if called is not None:
      inside = _moved_outputs(called.jaxpr, touched)
      if inside is None:
        return None
      followed.update(v for v, m in zip(eqn.outvars, inside, strict=True) if m)
      continue
    view = moves.view('', moves.shape_of(eqn.invars[0]))
    if moves.moved(eqn, view) is None:
      return None
    followed.update(eqn.outvars)
  return list(map(is_followed, jaxpr.outvars))
