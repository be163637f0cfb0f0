"""Patterns: which connections of a leaf may exist together, k of each group.

    unstructured      one group, the leaf: k of its weights, wherever they are
    constant_fan_in   a group for each neuron, an output of a layer:
      [in, out]                 k of the n_in = in inputs of each output
      [height, width, in, out]  k of the n_in = height · width · in

A count says how many of a group exist, a ranking which. All that topologies do
with a pattern is to count and to rank.
"""

from collections.abc import Callable, Mapping
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, layouts, masks, names
from powerprop_jax.core.layouts import Layout, LeafAxes
from powerprop_jax.core.top_k import topk, topk_columns
from powerprop_jax.core.top_k.counting import Count

# What a user calls a pattern.
Structure = Literal['unstructured', 'constant_fan_in']
Shape = tuple[int, ...]

# num_kept rounds up to whole parts of an input, so that what is nearest shows.
_PARTS = 2**20


class Pattern(NamedTuple):
  """How a leaf is divided into groups, and how many of each may exist.

  The functions take leaves, and their shapes, in the layout of the pattern.

  Attributes:
    name: what users call it.
    groups: shape of a leaf -> (number of groups, weights of each).
    kept: ({'module/name': sparsity}, {'module/name': shape}) -> how many of
      each group of a leaf exist, at least 1. Raises a ValueError, naming the
      leaf, if it cannot be.
    top_k: (scores, k, among) -> mask of the k best of each group, of those
      where among is True if it is given; k an int, or int32 of shape [] or
      [groups] that may be traced.
    num_active: mask -> how many exist, int32 of shape [] for one group, and
      [groups] otherwise.
  """

  name: Structure
  groups: Callable[[Shape], tuple[int, int]]
  kept: Callable[[Mapping[str, float], Mapping[str, Shape]], dict[str, int]]
  top_k: Callable[[jax.Array, Count, jax.Array | None], jax.Array]
  num_active: Callable[[jax.Array], jax.Array]

  def layout(
    self, path: str, shape: Shape, axes: LeafAxes | None = None
  ) -> Layout:
    """How a leaf is to be laid out: [..., neurons], if there are groups.

    By its axes, or else by its name.
    """
    if self.name == 'unstructured':
      return layouts.as_stored(shape)
    return layouts.layout(path, shape, axes)


def _kept_weights(
  by_leaf: Mapping[str, float], shapes: Mapping[str, Shape]
) -> dict[str, int]:
  """num_kept of each leaf, or the counts that a distribution made together."""
  sizes = {name: math.prod(shapes[name]) for name in by_leaf}
  for name, sparsity in by_leaf.items():
    # The tolerance is for densities that a distribution makes just one weight.
    if sizes[name] * (1 - sparsity) < 1 - 1e-6:
      raise ValueError(
        f'{name!r} has {sizes[name]:,} weights and would lose all of them at '
        f'sparsity {sparsity:g}. Lower the sparsity, give this leaf one of its '
        'own (overrides of the distribution), or leave it out of select.'
      )
  return distributions.counts(by_leaf, sizes)


def _kept_inputs(
  by_leaf: Mapping[str, float], shapes: Mapping[str, Shape]
) -> dict[str, int]:
  """The whole number nearest to density · n_in, halves up, and at least 1.

  So the density of a leaf is rounded to a multiple of 1 / n_in: with 784 inputs
  and a sparsity of 0.98 it is 16 / 784. Leaves of few inputs may be much denser
  than their sparsity says: 12 inputs at 0.99 keep 1, which is 8 %.
  """
  found = {}
  for name, sparsity in by_leaf.items():
    if not shapes[name]:
      raise ValueError(
        f'{name!r} is a scalar and has no neurons. Leave it out of select.'
      )
    parts = masks.num_kept(_PARTS * math.prod(shapes[name][:-1]), sparsity)
    found[name] = max(1, (2 * parts + _PARTS) // (2 * _PARTS))
  return found


UNSTRUCTURED = Pattern(
  'unstructured',
  groups=lambda shape: (1, math.prod(shape)),
  kept=_kept_weights,
  top_k=topk.top_k_mask,
  num_active=lambda mask: jnp.sum(mask, dtype=jnp.int32),
)
CONSTANT_FAN_IN = Pattern(
  'constant_fan_in',
  groups=lambda shape: (shape[-1], math.prod(shape[:-1])),
  kept=_kept_inputs,
  top_k=topk_columns.top_k_columns,
  num_active=lambda mask: jnp.sum(
    mask, tuple(range(mask.ndim - 1)), dtype=jnp.int32
  ),
)
_KNOWN = {pattern.name: pattern for pattern in (UNSTRUCTURED, CONSTANT_FAN_IN)}


def named(structure: Structure) -> Pattern:
  """The pattern that users call so.

  Example:
    >>> named('constant_fan_in').kept({'w': 0.98}, {'w': (784, 10)})
    {'w': 16}
    >>> named('constant_fanin')
    Traceback (most recent call last):
      ...
    ValueError: structure must be 'unstructured' or 'constant_fan_in', got \
'constant_fanin'. Did you mean 'constant_fan_in'?
  """
  names.check_choice('structure', structure, _KNOWN)
  return _KNOWN[structure]
