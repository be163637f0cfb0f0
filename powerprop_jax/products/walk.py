"""The convolutions and matrix products of a traced function, and their weights.

JAX traces a function to a jaxpr, a list of equations, without running it. Here
that list is followed from the arguments on. Every intermediate value carries
its origin: the names of the parameters that it was computed from, or None once
it depends on the data. A convolution or matrix product that depends on the data
and has an operand with a named origin is a layer, and the name is its weight.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from jax.extend import core as jax_core

# Names of the parameters a value was computed from; None: (also) from the data.
Origin = frozenset[str] | None

_CONSTANT: Origin = frozenset()
_Atom = jax_core.Var | jax_core.Literal


class Product(NamedTuple):
  """A convolution or a matrix product, as often as it is carried out.

  It computes so many outputs, each with fan_in of the multiply-adds macs.

  Attributes:
    leaf: name of the parameter that is one of its operands; None if none is, as
      for the products of activations in attention.
    kind: 'conv', 'depthwise', 'linear', or 'activations' without a leaf.
  """

  leaf: str | None
  kind: str
  macs: int
  outputs: int
  fan_in: int


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
    >>> find_products(closed, [None, frozenset({'fc/w'})], {'fc/w': 6})
    [Product(leaf='fc/w', kind='linear', macs=30, outputs=10, fan_in=3)]
  """
  return _Walk(sizes).jaxpr(closed.jaxpr, origins)[1]


# The origins of what is computed, and the products on the way.
_Found = tuple[list[Origin], list[Product]]


class _Walk:
  """Follows a jaxpr."""

  def __init__(self, sizes: Mapping[str, int]):
    self._sizes = sizes

  def jaxpr(self, jaxpr: jax_core.Jaxpr, inputs: Sequence[Origin]) -> _Found:
    known: dict[jax_core.Var, Origin] = dict.fromkeys(
      jaxpr.constvars, _CONSTANT
    )
    known.update(zip(jaxpr.invars, inputs, strict=True))
    products: list[Product] = []

    def read(atom: _Atom) -> Origin:
      return _CONSTANT if isinstance(atom, jax_core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
      outputs, inside = self._equation(eqn, list(map(read, eqn.invars)))
      known.update(zip(eqn.outvars, outputs, strict=True))
      products += inside
    return list(map(read, jaxpr.outvars)), products

  def _equation(self, eqn: jax_core.JaxprEqn, inputs: list[Origin]) -> _Found:
    name = eqn.primitive.name
    if name == 'scan':
      return self._scan(eqn.params, inputs)
    if name == 'while':
      return self._while(eqn.params, inputs)
    if name == 'cond':
      return self._cond(eqn.params, inputs)
    called = _called_jaxpr(eqn)
    if called is not None:
      return self.jaxpr(called, inputs)
    origin = _join(inputs)
    is_product = name in _SIZES and origin is None
    products = [self._product(eqn, inputs)] if is_product else []
    return [origin] * len(eqn.outvars), products

  def _product(self, eqn: jax_core.JaxprEqn, inputs: list[Origin]) -> Product:
    kind, macs, fan_in = _SIZES[eqn.primitive.name](eqn)
    names = frozenset[str]().union(*filter(None, inputs))
    # Sorted, so that equal sizes give the same leaf every time.
    leaf = max(sorted(names), key=self._sizes.__getitem__, default=None)
    outputs = math.prod(_shape(eqn.outvars[0]))
    return Product(leaf, kind if leaf else 'activations', macs, outputs, fan_in)

  def _scan(self, params: dict[str, Any], inputs: list[Origin]) -> _Found:
    body, first = params['jaxpr'].jaxpr, params['num_consts']
    inputs = self._settle(body, inputs, first, first + params['num_carry'])
    outputs, products = self.jaxpr(body, inputs)
    times = params['length']
    return outputs, [
      p._replace(macs=p.macs * times, outputs=p.outputs * times)
      for p in products
    ]

  def _while(self, params: dict[str, Any], inputs: list[Origin]) -> _Found:
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
    self, body: jax_core.Jaxpr, inputs: list[Origin], first: int, stop: int
  ) -> list[Origin]:
    """Inputs of a loop's body once what it carries no longer changes origin."""
    while True:
      carried = self.jaxpr(body, inputs)[0][: stop - first]
      joined = [
        _join(pair) for pair in zip(inputs[first:stop], carried, strict=True)
      ]
      if joined == inputs[first:stop]:
        return inputs
      inputs = [*inputs[:first], *joined, *inputs[stop:]]

  def _cond(self, params: dict[str, Any], inputs: list[Origin]) -> _Found:
    branches = [self.jaxpr(b.jaxpr, inputs[1:]) for b in params['branches']]
    costliest = max(
      (products for _, products in branches),
      key=lambda products: sum(p.macs for p in products),
    )
    # The index chooses between the results, so they depend on it as well.
    results = zip(*(outputs for outputs, _ in branches), strict=True)
    return [_join([inputs[0], *found]) for found in results], costliest


def _join(origins: Iterable[Origin]) -> Origin:
  names: frozenset[str] = frozenset()
  for origin in origins:
    if origin is None:
      return None
    names |= origin
  return names


def _called_jaxpr(eqn: jax_core.JaxprEqn) -> jax_core.Jaxpr | None:
  """The jaxpr that an equation calls with its own inputs and outputs."""
  for value in eqn.params.values():
    jaxpr = value.jaxpr if isinstance(value, jax_core.ClosedJaxpr) else value
    if (
      isinstance(jaxpr, jax_core.Jaxpr)
      and len(jaxpr.invars) == len(eqn.invars)
      and len(jaxpr.outvars) == len(eqn.outvars)
    ):
      return jaxpr
  return None


# Kind, multiply-adds and fan-in of one product.
_Size = tuple[str, int, int]


def _dot_size(eqn: jax_core.JaxprEqn) -> _Size:
  (contracted, _), _ = eqn.params['dimension_numbers']
  shape = _shape(eqn.invars[0])
  fan_in = math.prod(shape[axis] for axis in contracted)
  return 'linear', math.prod(_shape(eqn.outvars[0])) * fan_in, fan_in


def _conv_size(eqn: jax_core.JaxprEqn) -> _Size:
  images, kernel = map(_shape, eqn.invars)
  dimensions = eqn.params['dimension_numbers']
  groups = eqn.params['feature_group_count']
  # rhs_spec lists the axes of output and input channels, then the window.
  num_out, num_in = (kernel[axis] for axis in dimensions.rhs_spec[:2])
  fan_in = math.prod(kernel) // num_out
  kind = 'depthwise' if groups > 1 and num_in == 1 else 'conv'
  if math.prod(eqn.params['lhs_dilation']) == 1:
    return kind, math.prod(_shape(eqn.outvars[0])) * fan_in, fan_in
  # Transposed: every position of the images meets the whole kernel.
  positions = math.prod(images) // images[dimensions.lhs_spec[1]]
  return kind, positions * math.prod(kernel), fan_in


def _shape(atom: Any) -> tuple[int, ...]:
  return tuple(atom.aval.shape)


_SIZES = {'dot_general': _dot_size, 'conv_general_dilated': _conv_size}
