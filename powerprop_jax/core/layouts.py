"""What the axes of a weight are: inputs, outputs, a window, layers of a stack.

A product sums over the inputs of a weight, and over the window of a
convolution. Libraries agree on neither names nor order:

    w       [..., in, out]      Haiku
    kernel  [..., in, out]      Flax; in attention [in, heads, dim], and
                                [heads, dim, out] in the layer called 'out'
    weight  [out, in, ...]      Equinox and PyTorch

Where a network is at hand, powerprop_jax.jaxprs reads the axes off what it
multiplies; otherwise the names above say which they are.
"""

from collections.abc import Mapping
import math
import re
from typing import NamedTuple, TypeAlias

import jax

# What leaves that are weights are called, and by whom.
WEIGHT_NAMES = {
  'w': 'Haiku',
  'kernel': 'Flax',
  'weight': 'Equinox and PyTorch',
}

# Modules of which a leaf of that name is none: norms and tables of embeddings.
_NO_WEIGHTS = re.compile(
  r'(norm|embed|(^|[/_.])(bn|ln|wte|wpe|lut)\d*([/_.]|$))[^/]*$', re.IGNORECASE
)

Shape: TypeAlias = tuple[int, ...]


class Axes(NamedTuple):
  """The axes of a leaf, each in one of these, in the order of a product.

  Attributes:
    inputs: summed over, besides the window.
    outputs: those of what comes out.
    window: height, width and the like of a convolution; summed over.
    repeats: one product for each entry: layers of a stack, experts.
    groups: groups of channels that are convolved apart from each other.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  window: tuple[int, ...] = ()
  repeats: tuple[int, ...] = ()
  groups: int = 1

  @property
  def order(self) -> tuple[int, ...]:
    """The axes as [repeats, window, inputs, outputs]."""
    return (*self.repeats, *self.window, *self.inputs, *self.outputs)

  def layer(self, shape: Shape) -> Shape:
    """Shape of one layer, [*window, in, out], whatever the layout.

    Example:
      >>> Axes(inputs=(1,), outputs=(0,), window=(2, 3)).layer((8, 4, 3, 3))
      (3, 3, 4, 8)
    """
    if not self.inputs and not self.window:
      return tuple(shape[axis] for axis in self.outputs)
    size = lambda axes: math.prod(shape[axis] for axis in axes)
    window = tuple(shape[axis] for axis in self.window)
    return (*window, size(self.inputs), size(self.outputs))


# Of each leaf, by 'module/name'.
LeafAxes: TypeAlias = Mapping[str, Axes]


class Layout(NamedTuple):
  """A leaf as [..., in, neurons], in whatever order it is stored.

  A neuron is an output of a layer. What is stored so already stays as it is.
  """

  axes: Axes
  stored: Shape

  @property
  def shape(self) -> Shape:
    """[*window, in, out], or [inputs, neurons] of a leaf that is moved.

    Example:
      >>> Layout(Axes((1,), (0,)), (8, 4)).shape
      (4, 8)
    """
    if self._is_plain():
      return self.stored
    neurons = math.prod(self.stored[axis] for axis in self._last())
    return math.prod(self.stored) // max(neurons, 1), neurons

  def to_neurons(self, x: jax.Array) -> jax.Array:
    """An array like the leaf, in this shape."""
    return (
      x if self._is_plain() else x.transpose(self._order()).reshape(self.shape)
    )

  def from_neurons(self, x: jax.Array) -> jax.Array:
    """Undoes to_neurons."""
    if self._is_plain():
      return x
    order = self._order()
    x = x.reshape([self.stored[axis] for axis in order])
    return x.transpose([order.index(axis) for axis in range(len(order))])

  def _last(self) -> tuple[int, ...]:
    return (*self.axes.repeats, *self.axes.outputs)

  def _order(self) -> tuple[int, ...]:
    return (*self.axes.window, *self.axes.inputs, *self._last())

  def _is_plain(self) -> bool:
    in_order = self._order() == tuple(range(len(self.stored)))
    return in_order and len(self._last()) <= 1


def is_weight_name(module_name: str, name: str) -> bool:
  """Whether a leaf of rank 2 or more called so is a weight.

  Example:
    >>> is_weight_name('mlp/fc', 'kernel'), is_weight_name('norm_1', 'weight')
    (True, False)
  """
  return name in WEIGHT_NAMES and not _NO_WEIGHTS.search(module_name)


def as_stored(shape: Shape) -> Layout:
  """The layout that leaves a leaf of this shape as it is."""
  axes = tuple(range(len(shape)))
  return Layout(Axes(axes[:-1], axes[-1:]), shape)


def layout(path: str, shape: Shape, axes: LeafAxes | None) -> Layout:
  """The layout of a leaf, by its axes if there are some, or by its name.

  Example:
    >>> layout('fc/weight', (8, 4), None).shape
    (4, 8)
  """
  found = (axes or {}).get(path)
  module_name, _, name = path.rpartition('/')
  return Layout(found or by_name(module_name, name, shape), shape)


def by_name(module_name: str, name: str, shape: Shape) -> Axes:
  """The axes that a leaf has by its name, as the table above says.

  Axes that are neither input nor output are its window.

  Example:
    >>> by_name('conv', 'w', (3, 3, 4, 8))
    Axes(inputs=(2,), outputs=(3,), window=(0, 1), repeats=(), groups=1)
    >>> by_name('fc', 'weight', (8, 4)).layer((8, 4))
    (4, 8)
  """
  rank = len(shape)
  if rank < 2:
    return Axes((), tuple(range(rank)))
  if name == 'weight':
    return Axes((1,), (0,), window=tuple(range(2, rank)))
  if name == 'kernel' and rank == 3:
    parts = module_name.split('/')
    if parts[-1] == 'out':
      return Axes((0, 1), (2,))
    if parts[-1] in ('query', 'key', 'value'):
      return Axes((0,), (1, 2))
  return Axes((rank - 2,), (rank - 1,), window=tuple(range(rank - 2)))
