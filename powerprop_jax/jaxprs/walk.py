"""The convolutions and matrix products of a traced function, and their weights.

JAX traces a function to a jaxpr, a list of equations, without running it. Here
that list is followed from the arguments on. Every intermediate value carries
its origin: the names of the parameters that it was computed from, or None once
it depends on the data. A convolution or matrix product that depends on the data
and has an operand with a named origin is a layer, and the name is its weight.
What is only moved on its way there is known axis by axis as well (moves.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core

from powerprop_jax.core import trees
from powerprop_jax.core.layouts import Axes
from powerprop_jax.core.trees import Params
from powerprop_jax.jaxprs import moves
from powerprop_jax.jaxprs.moves import View

# Names of the parameters a value was computed from; None: (also) from the data.
Origin = frozenset[str] | None

_Atom = jax_core.Var | jax_core.Literal


class Product(NamedTuple):
  """A convolution or a matrix product, as often as it is carried out.

  It computes so many outputs, each with fan_in of the multiply-adds macs.

  Attributes:
    leaf: name of the parameter that is one of its operands; None if none is, as
      for the products of activations in attention.
    kind: 'conv', 'depthwise', 'linear', or 'activations' without a leaf.
    axes: what the axes of the leaf are to it; None if the leaf is not an
      operand as it is, or an axis is two things at once.
    shapes: of both operands.
    times: how often it is carried out, as the turns of a scan.
  """

  leaf: str | None
  kind: str
  macs: int
  outputs: int
  fan_in: int
  axes: Axes | None = None
  shapes: tuple[tuple[int, ...], ...] = ()
  times: int = 1


class Uses(NamedTuple):
  """What a function does with a leaf.

  Attributes:
    products: those that it is an operand of, by first execution.
    others: primitives that it goes into besides, in alphabetical order; of a
      leaf that is only multiplied by there are none.
  """

  products: tuple[Product, ...]
  others: tuple[str, ...]


def products(
  fn: Callable[..., Any], theta: Params, *args: Any
) -> dict[str, Uses]:
  """What fn(theta, *args) multiplies its weights by, without running it.

  Follows the function through jit, checkpoint, custom derivatives, scan and
  cond, in whatever library it is written. Arrays may be jax.ShapeDtypeStruct.

  Returns:
    {'module/name': uses} of every leaf of theta.

  Example:
    >>> theta = {'w': jnp.ones((3, 2)), 'b': jnp.ones((1, 2))}
    >>> fn = lambda theta, x: x @ theta['w'] + theta['b']
    >>> found = products(fn, theta, jnp.ones((5, 3)))
    >>> found['w'].products[0].axes
    Axes(inputs=(0,), outputs=(1,), window=(), repeats=(), groups=1)
    >>> found['b']
    Uses(products=(), others=('add',))
  """
  closed = jax.make_jaxpr(fn)(theta, *args)
  leaves = {name: tuple(x.shape) for name, x in trees.by_path(theta).items()}
  num_data = len(closed.jaxpr.invars) - len(leaves)
  walk = _Walk({name: math.prod(shape) for name, shape in leaves.items()})
  known = [_leaf(name, shape) for name, shape in leaves.items()]
  found = walk.jaxpr(closed.jaxpr, [*known, *[_DATA] * num_data])[1]
  return {
    name: Uses(
      tuple(product for product in found if product.leaf == name),
      tuple(sorted(walk.others[name])),
    )
    for name in leaves
  }


def leaf_axes(
  fn: Callable[..., Any], theta: Params, *args: Any
) -> dict[str, Axes]:
  """The axes of each leaf that fn(theta, *args) multiplies by.

  Accepted wherever a layout matters: budgets such as erk, constant fan-in.

  Raises:
    ValueError: if the products of a leaf disagree, as those of an embedding
      that is also the output layer, transposed.

  Example:
    >>> fn = lambda theta, x: x @ theta['weight'].T
    >>> leaf_axes(fn, {'weight': jnp.ones((2, 3))}, jnp.ones((5, 3)))
    {'weight': Axes(inputs=(1,), outputs=(0,), window=(), repeats=(), groups=1)}
  """
  found: dict[str, Axes] = {}
  for name, uses in products(fn, theta, *args).items():
    axes = {product.axes for product in uses.products}
    known = {a for a in axes if a is not None}
    if len(known) < len(axes) or len(known) > 1:
      raise ValueError(
        f'the products of {name!r} disagree about its axes, or meet it only '
        f'after {", ".join(uses.others) or "it was taken apart"}. Give its '
        'axes yourself: {**axes, name: layouts.Axes(inputs=..., outputs=...)}.'
      )
    if known:
      found[name] = known.pop()
  return found


def find_products(
  closed: jax_core.ClosedJaxpr,
  origins: Sequence[Origin],
  sizes: Mapping[str, int],
) -> list[Product]:
  """All products of a jaxpr that depend on the data, by first execution.

  Follows calls (jit, checkpoint, functions with their own derivative) and the
  turns of scans; of the branches of a conditional the one with the most
  multiply-adds counts. A product that does not depend on the data is computed
  once for any number of examples, and is left out.

  Args:
    origins: of each flat argument; None for data.
    sizes: number of entries of each parameter. Of a weight made of several
      parameters, such as a kernel and its scale, the largest is the leaf.

  Raises:
    ValueError: if a product is inside a while loop, whose number of turns is
      known only when it runs.

  Note:
    A position of a kernel that lies on the padding counts as a multiply-add, as
    everywhere in the literature. For a transposed convolution the zeros between
    the inputs do not. Kernels written outside XLA are opaque.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(jnp.dot)(jnp.ones((5, 3)), jnp.ones((3, 2)))
    >>> found, = find_products(closed, [None, frozenset({'fc/w'})], {'fc/w': 6})
    >>> found.leaf, found.kind, found.macs, found.outputs, found.fan_in
    ('fc/w', 'linear', 30, 10, 3)
  """
  known = [
    _Known(origin, _only_view(origin, moves.shape_of(variable)))
    for origin, variable in zip(origins, closed.jaxpr.invars, strict=True)
  ]
  return _Walk(sizes).jaxpr(closed.jaxpr, known)[1]


class _Known(NamedTuple):
  """What is known of a value: where it comes from, and how it was moved."""

  origin: Origin
  view: View | None = None


_CONSTANT, _DATA = _Known(frozenset()), _Known(None)
# Of what is computed, and the products on the way.
_Found = tuple[list[_Known], list[Product]]


def _leaf(name: str, shape: tuple[int, ...]) -> _Known:
  return _Known(frozenset({name}), moves.view(name, shape))


def _only_view(origin: Origin, shape: tuple[int, ...]) -> View | None:
  if not origin or len(origin) > 1:
    return None
  return moves.view(next(iter(origin)), shape)


class _Walk:
  """Follows a jaxpr."""

  def __init__(self, sizes: Mapping[str, int]):
    self._sizes = sizes
    self.others = defaultdict[str, set[str]](set)

  def jaxpr(self, jaxpr: jax_core.Jaxpr, inputs: Sequence[_Known]) -> _Found:
    known: dict[jax_core.Var, _Known] = dict.fromkeys(
      jaxpr.constvars, _CONSTANT
    )
    known.update(zip(jaxpr.invars, inputs, strict=True))
    products: list[Product] = []

    def read(atom: _Atom) -> _Known:
      return _CONSTANT if isinstance(atom, jax_core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
      outputs, inside = self._equation(eqn, list(map(read, eqn.invars)))
      known.update(zip(eqn.outvars, outputs, strict=True))
      products += inside
    return list(map(read, jaxpr.outvars)), products

  def _equation(self, eqn: jax_core.JaxprEqn, inputs: list[_Known]) -> _Found:
    name = eqn.primitive.name
    if name == 'scan':
      return self._scan(eqn.params, inputs)
    if name == 'while':
      return self._while(eqn.params, inputs)
    if name == 'cond':
      return self._cond(eqn.params, inputs)
    called = called_jaxpr(eqn)
    if called is not None:
      return self.jaxpr(called.jaxpr, inputs)
    origin = _join(value.origin for value in inputs)
    if name in _SIZES and origin is None:
      return [_DATA], [self._product(eqn, inputs)]
    views = [value.view for value in inputs if value.view is not None]
    # What the data choose is no longer a view.
    view = moves.moved(eqn, views[0]) if views and origin is not None else None
    if view is None:
      for source in views:
        self.others[source.leaf].add(name)
    return [_Known(origin, view)] * len(eqn.outvars), []

  def _product(self, eqn: jax_core.JaxprEqn, inputs: list[_Known]) -> Product:
    kind, macs, fan_in = _SIZES[eqn.primitive.name](eqn)
    origins = [value.origin for value in inputs]
    names = frozenset[str]().union(*filter(None, origins))
    # Sorted, so that equal sizes give the same leaf every time.
    leaf = max(sorted(names), key=self._sizes.__getitem__, default=None)
    axes = None
    for side, value in enumerate(inputs):
      if value.view is not None and value.view.leaf == leaf:
        axes = moves.leaf_axes(value.view, moves.roles(eqn, side))
    return Product(
      leaf=leaf,
      kind=kind if leaf else 'activations',
      macs=macs,
      outputs=math.prod(moves.shape_of(eqn.outvars[0])),
      fan_in=fan_in,
      axes=axes,
      shapes=(moves.shape_of(eqn.invars[0]), moves.shape_of(eqn.invars[1])),
    )

  def _scan(self, params: dict[str, Any], inputs: list[_Known]) -> _Found:
    body = params['jaxpr'].jaxpr
    first, num_carry = moves.scan_counts(params)
    last = first + num_carry
    layers = [
      value if value.view is None else value._replace(view=value.view.layer())
      for value in inputs[last:]
    ]
    inputs = self._settle(body, [*inputs[:last], *layers], first, last)
    outputs, products = self.jaxpr(body, inputs)
    # What the turns write side by side is no longer a view.
    carried = outputs[: last - first]
    stacked = [_Known(value.origin) for value in outputs[last - first :]]
    times = params['length']
    return [*carried, *stacked], [
      p._replace(
        macs=p.macs * times, outputs=p.outputs * times, times=p.times * times
      )
      for p in products
    ]

  def _while(self, params: dict[str, Any], inputs: list[_Known]) -> _Found:
    body, first = params['body_jaxpr'].jaxpr, params['body_nconsts']
    inputs = inputs[params['cond_nconsts'] :]
    inputs = self._settle(body, inputs, first, len(inputs))
    outputs, products = self.jaxpr(body, inputs)
    if products:
      raise ValueError(
        f'the network has a product with {products[0].leaf} inside a while '
        'loop, whose number of turns is not known before it runs. Use '
        'jax.lax.scan, or jax.lax.fori_loop with fixed bounds.'
      )
    return outputs, []

  def _settle(
    self, body: jax_core.Jaxpr, inputs: list[_Known], first: int, stop: int
  ) -> list[_Known]:
    """Inputs of a loop's body once what it carries no longer changes origin."""
    while True:
      carried = self.jaxpr(body, inputs)[0][: stop - first]
      joined = [
        old if old == new else _Known(_join((old.origin, new.origin)))
        for old, new in zip(inputs[first:stop], carried, strict=True)
      ]
      if joined == inputs[first:stop]:
        return inputs
      inputs = [*inputs[:first], *joined, *inputs[stop:]]

  def _cond(self, params: dict[str, Any], inputs: list[_Known]) -> _Found:
    branches = [self.jaxpr(b.jaxpr, inputs[1:]) for b in params['branches']]
    costliest = max(
      (products for _, products in branches),
      key=lambda products: sum(p.macs for p in products),
    )
    # The index chooses between the results, so they depend on it as well.
    results = zip(*(outputs for outputs, _ in branches), strict=True)
    return [
      _Known(_join([inputs[0].origin, *(value.origin for value in found)]))
      for found in results
    ], costliest


def _join(origins: Iterable[Origin]) -> Origin:
  names: frozenset[str] = frozenset()
  for origin in origins:
    if origin is None:
      return None
    names |= origin
  return names


def called_jaxpr(eqn: jax_core.JaxprEqn) -> jax_core.ClosedJaxpr | None:
  """The jaxpr that an equation calls with its own inputs and outputs."""
  for value in eqn.params.values():
    if isinstance(value, jax_core.Jaxpr):
      value = jax_core.ClosedJaxpr(value, ())
    if (
      isinstance(value, jax_core.ClosedJaxpr)
      and len(value.jaxpr.invars) == len(eqn.invars)
      and len(value.jaxpr.outvars) == len(eqn.outvars)
    ):
      return value
  return None


# Kind, multiply-adds and fan-in of one product.
_Size = tuple[str, int, int]


def _dot_size(eqn: jax_core.JaxprEqn) -> _Size:
  (contracted, _), _ = eqn.params['dimension_numbers']
  shape = moves.shape_of(eqn.invars[0])
  fan_in = math.prod(shape[axis] for axis in contracted)
  return 'linear', math.prod(moves.shape_of(eqn.outvars[0])) * fan_in, fan_in


def _conv_size(eqn: jax_core.JaxprEqn) -> _Size:
  images, kernel = map(moves.shape_of, eqn.invars)
  dimensions = eqn.params['dimension_numbers']
  groups = eqn.params['feature_group_count']
  # rhs_spec lists the axes of output and input channels, then the window.
  num_out, num_in = (kernel[axis] for axis in dimensions.rhs_spec[:2])
  fan_in = math.prod(kernel) // num_out
  kind = 'depthwise' if groups > 1 and num_in == 1 else 'conv'
  if math.prod(eqn.params['lhs_dilation']) == 1:
    return kind, math.prod(moves.shape_of(eqn.outvars[0])) * fan_in, fan_in
  # Transposed: every position of the images meets the whole kernel.
  positions = math.prod(images) // images[dimensions.lhs_spec[1]]
  return kind, positions * math.prod(kernel), fan_in


_SIZES = {'dot_general': _dot_size, 'conv_general_dilated': _conv_size}
