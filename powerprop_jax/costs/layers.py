"""The layers of a Haiku network, and what each costs, without running it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import inspect
import math
from typing import Any, NamedTuple, TypeAlias

import haiku as hk
import jax

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.jaxprs import walk
from powerprop_jax.jaxprs.walk import Product

Network: TypeAlias = hk.Transformed | hk.TransformedWithState


class LayerCost(NamedTuple):
  """What one layer costs, for one example, while it is dense.

  A layer is a weight, of this shape and as many entries. If the network applies
  it several times, its outputs and multiply-adds add up.

  Attributes:
    leaf: the weight, 'module/name'; None for the products of activations with
      each other or with constants, all in one entry.
    kind: 'conv', 'depthwise', 'linear', or 'activations' without a leaf.
    biases: number of output channels: what a bias has, whether the network has
      one, or a normalisation with an offset in its place, or neither.
    outputs: numbers the layer computes for one example.
    macs: multiply-adds for one example.
  """

  leaf: str | None
  kind: str
  shape: tuple[int, ...]
  weights: int
  biases: int
  outputs: int
  macs: int


def layer_costs(
  net: Network, *inputs: Any, **kwargs: Any
) -> tuple[LayerCost, ...]:
  """The layers of a network, from Haiku's transforms, in order of first use.

  The network is traced on shapes, so that nothing is computed and no memory is
  needed for its parameters. Each convolution and matrix product is tied to the
  weight that it uses, whatever happens to the weight on the way (a reshape, a
  mask, ψ). A weight used in no product, such as a table of embeddings, is no
  layer.

  Args:
    *inputs: what net.init takes after the key; arrays or jax.ShapeDtypeStruct,
      and anything else, such as is_training=True (which init needs where there
      is a batch norm), as it is. The first axis of the first array counts the
      examples.

  Raises:
    ValueError: if there is no array among the inputs, the products are not
      shared out evenly between the examples, or a product is inside a while
      loop.

  Example:
    >>> net = hk.transform(lambda x: hk.Linear(2, name='fc')(x))
    >>> cost, = layer_costs(net, jax.ShapeDtypeStruct((5, 3), 'float32'))
    >>> cost.leaf, cost.weights, cost.biases, cost.outputs, cost.macs
    ('fc/w', 6, 2, 2, 6)
  """
  if not isinstance(net, Network):
    raise TypeError(
      'net must come from hk.transform or hk.transform_with_state, got '
      f'{net!r}.'
    )
  leaves, structure = jax.tree.flatten((inputs, kwargs))
  # As JAX sees them: float32 for an array of NumPy's in float64.
  arrays = jax.eval_shape(lambda x: x, [x for x in leaves if _is_array(x)])
  if not arrays:
    raise ValueError(
      'layer_costs needs an example of what the network is called with: '
      'layer_costs(net, images).'
    )

  def call(function: Callable[..., Tree], arrays: Tree, *before: Tree) -> Tree:
    rest = iter(arrays)
    values = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
    inputs, kwargs = jax.tree.unflatten(structure, values)
    return function(*before, *inputs, **kwargs)

  key = jax.eval_shape(lambda: jax.random.key(0))
  made = jax.eval_shape(lambda k, a: call(net.init, a, k), key, arrays)
  variables = made if isinstance(net, hk.TransformedWithState) else (made,)
  # hk.without_apply_rng takes this argument away and leaves no other trace.
  place = list(inspect.signature(net.apply).parameters)[len(variables) :]
  keys = (key,) if place[:1] == ['rng'] else ()

  return function_costs(
    lambda theta, a, states, k: call(net.apply, a, theta, *states, *k),
    variables[0],
    arrays,
    variables[1:],
    keys,
  )


def function_costs(
  fn: Callable[..., Any], theta: Params, *args: Any
) -> tuple[LayerCost, ...]:
  """The layers of any function fn(theta, *args), in order of first use.

  As layer_costs, for networks of other libraries. The first axis of the first
  array in args counts the examples.

  Example:
    >>> fn = lambda theta, x: x @ theta['weight'].T
    >>> theta = {'weight': jnp.ones((2, 3))}
    >>> cost, = function_costs(fn, theta, jnp.ones((5, 3)))
    >>> cost.leaf, cost.weights, cost.biases, cost.outputs, cost.macs
    ('weight', 6, 2, 2, 6)
  """
  arrays = [leaf for leaf in jax.tree.leaves(args) if _is_array(leaf)]
  if not arrays:
    raise ValueError(
      'costs need an example of what the function is called with besides its '
      'weights: function_costs(fn, theta, images).'
    )
  leaves = trees.by_path(theta)
  found = walk.find_products(
    jax.make_jaxpr(fn)(theta, *args),
    [
      *(frozenset({name}) for name in leaves),
      *[None] * len(jax.tree.leaves(args)),
    ],
    {name: value.size for name, value in leaves.items()},
  )
  batch_size = arrays[0].shape[0] if arrays[0].shape else 1
  return tuple(_merge(found, leaves, batch_size))


def _is_array(value: object) -> bool:
  return hasattr(value, 'shape') and hasattr(value, 'dtype')


def _merge(
  found: Sequence[Product],
  theta: Mapping[str, jax.ShapeDtypeStruct],
  batch_size: int,
) -> Iterator[LayerCost]:
  for leaf in dict.fromkeys(product.leaf for product in found):
    uses = [product for product in found if product.leaf == leaf]
    outputs = sum(use.outputs for use in uses)
    macs = sum(use.macs for use in uses)
    if batch_size == 0 or outputs % batch_size or macs % batch_size:
      raise ValueError(
        f'the {macs:,} multiply-adds of {leaf or "activations"} cannot be '
        f'shared out between {batch_size} examples, the first axis of the '
        'first input. Pass a single example.'
      )
    shape = tuple(theta[leaf].shape) if leaf else ()
    weights = math.prod(shape) if leaf else 0
    yield LayerCost(
      leaf=leaf,
      kind=uses[0].kind,
      shape=shape,
      weights=weights,
      biases=weights // uses[0].fan_in,
      outputs=outputs // batch_size,
      macs=macs // batch_size,
    )
