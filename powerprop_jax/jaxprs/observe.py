"""What enters the products of a function: a statistic for each weight."""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core as jax_core

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.jaxprs import moves, rewrite
from powerprop_jax.jaxprs.rewrite import Found, Held


def observe(
  fn: Callable[..., Any],
  statistic: Callable[[jax.Array], Tree],
  *,
  select: Select = select_lib.is_weight,
  patches: bool = True,
) -> Callable[..., tuple[Any, dict[str, list[Tree]]]]:
  """A function that also returns a statistic of what its weights multiply.

  Args:
    fn: of (theta, *args), in any library.
    statistic: called with the inputs of each product with a selected leaf,
      [..., in] as the leaf has them, and returns any tree of arrays: squared
      norms, a Gram matrix, means.
    patches: of a convolution these are patches [..., window · in], one for each
      of its places, in which an entry comes as often as it is multiplied. False
      gives the images that it reads, [N, ..., channels].

  Returns:
    (theta, *args) -> (result, {'module/name': [statistic of each product]}). In
    a scan over layers the statistics come stacked. A leaf that it does not
    multiply by, or takes apart before (products says by what), has none.

  Raises:
    ValueError: if a product is in a while loop, or a convolution that takes the
      leaf for its images or has batch_group_count.

  Example:
    >>> fn = lambda theta, x: x @ theta['w']
    >>> squares = observe(fn, lambda x: (x**2).sum(axis=0))
    >>> squares({'w': jnp.ones((2, 3))}, jnp.array([[1., 2.], [0., 1.]]))[1]
    {'w': [Array([1., 5.], dtype=float32)]}
  """
  rule = _Observer(statistic, patches)

  def observed(theta: Params, *args: Any) -> tuple[Any, dict[str, list[Tree]]]:
    names = set(select_lib.selected_names(select, theta))
    chosen = {n: x for n, x in trees.by_path(theta).items() if n in names}
    return rewrite.run(fn, rule, rewrite.hold(chosen, theta), *args)

  return observed


class _Observer:
  """A rule that changes nothing, and sees what is multiplied."""

  def __init__(self, statistic: Callable[[jax.Array], Tree], patches: bool):
    self._statistic, self._patches = statistic, patches

  def dense(self, held: Held, used_by: str) -> jax.Array:
    del used_by
    layer: jax.Array = held.value
    return layer

  def layers(self, held: Held) -> Tree:
    return held.value

  def product(
    self, eqn: jax_core.JaxprEqn, held: Held, other: jax.Array, side: int
  ) -> Found:
    x = inputs(eqn, held, other, side, patches=self._patches)
    return Found(None, self._statistic(x))


def inputs(
  eqn: jax_core.JaxprEqn,
  held: Held,
  other: jax.Array,
  side: int,
  *,
  patches: bool = True,
) -> jax.Array:
  """What a held leaf is multiplied with, [..., in] in the order of the leaf."""
  if eqn.primitive.name == 'dot_general':
    return _contracted(eqn, held, other, side)
  if side == 0 or eqn.params['batch_group_count'] > 1:
    what = 'takes part in' if side else 'stands for the images of'
    raise ValueError(
      f'{held.view.leaf!r} {what} a convolution'
      f'{" with batch_group_count" * side}, where nothing enters it as it does '
      'a weight. Leave it out of select.'
    )
  if patches:
    return _patches(eqn.params, held, other)
  images, channels, *places = eqn.params['dimension_numbers'].lhs_spec
  return other.transpose(images, *places, channels)


def _contracted(
  eqn: jax_core.JaxprEqn, held: Held, x: jax.Array, side: int
) -> jax.Array:
  """The other operand as [*batch, *free, in]."""
  contracted, batch = eqn.params['dimension_numbers']
  first, last = batch[1 - side], contracted[1 - side]
  free = [a for a in range(x.ndim) if a not in first and a not in last]
  x = x.transpose(*first, *free, *last)
  shape = x.shape[: len(first) + len(free)]
  pieces = [
    piece for axis in contracted[side] for piece in held.view.axes[axis]
  ]
  axes = sorted({piece.axis for piece in pieces})
  x = moves.arranged(x, shape, pieces, moves.pieces_in_order(pieces, axes))
  return x.reshape(*shape, math.prod(piece.size for piece in pieces))


def _patches(params: Mapping[str, Any], held: Held, x: jax.Array) -> jax.Array:
  """Images as [N, *places, window · in], with groups before the last axis."""
  spec = params['dimension_numbers']
  sizes = [math.prod(p.size for p in axis) for axis in held.view.axes]
  window = [sizes[axis] for axis in spec.rhs_spec[2:]]
  x = x.transpose(*spec.lhs_spec)
  found = lax.conv_general_dilated_patches(
    x,
    window,
    params['window_strides'],
    params['padding'],
    params['lhs_dilation'],
    params['rhs_dilation'],
  )
  groups, channels = params['feature_group_count'], x.shape[1]
  places = found.shape[2:]
  per_group, size = channels // groups, math.prod(window)
  found = found.reshape(x.shape[0], groups, per_group, size, *places)
  rank = len(places)
  found = found.transpose(0, *range(4, 4 + rank), 1, 3, 2)
  shape = (x.shape[0], *places, groups, size * per_group)
  found = found.reshape(shape)
  return found if groups > 1 else found[..., 0, :]
