"""How many connections each layer has, and maps over the layers.

The pieces that topologies share. Counts are Python integers, worked out from
shapes whenever a function is traced, so that they never travel in a state.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, masks, names, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Distribution, Sparsity
from powerprop_jax.core.layouts import Layout, LeafAxes
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule
from powerprop_jax.core.top_k import patterns, ranking
from powerprop_jax.core.top_k.patterns import Pattern, Structure
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.optim.topology import Rewiring


class Leaves(TypedDict, total=False):
  """Which leaves are masked, and what each gets of the sparsity.

  Attributes:
    distribution: shares the sparsity out between leaves, for SNFS and DSR at
      the start: uniform for pruning and SNFS, erk for the others. With
      overrides it is functools.partial(erk, overrides=...).
    select: which leaves are masked; is_weight.
    axes: of leaves whose names do not say which are inputs and which outputs,
      {'module/name': Axes}, as pp.leaf_axes finds them.
  """

  distribution: Distribution
  select: Select
  axes: LeafAxes | None


class Patterned(Leaves, total=False):
  """Likewise, and which connections of a leaf may exist together.

  Attributes:
    structure: 'unstructured', or 'constant_fan_in', which gives every neuron of
      a layer as many inputs as any other, the sparsity rounded to that; see
      core.top_k.patterns.
  """

  structure: Structure


def check_options(options: Leaves, known: type[Leaves]) -> None:
  """Refuses options that a method does not have, with the nearest name.

  Example:
    >>> check_options({'selekt': None}, Leaves)
    Traceback (most recent call last):
      ...
    TypeError: there is no option 'selekt' here. Did you mean 'select'? There
    are: axes, distribution, select.
  """
  there_are = sorted(known.__annotations__)
  for name in options:
    if name not in there_are:
      raise TypeError(
        f'there is no option {name!r} here.{names.hint(name, there_are)} There '
        f'are: {", ".join(there_are)}.'
      )


@dataclasses.dataclass(frozen=True)
class Budget:
  """How many connections the selected leaves have, and masks of so many.

  A sparsity for all of them is shared out by the distribution; a mapping then
  is the distribution.

  Example:
    >>> theta = {'a': {'w': jnp.ones((5, 4))}, 'b': {'w': jnp.ones((2, 5))}}
    >>> budget = Budget(0.8, distributions.uniform)
    >>> budget.counts(theta)
    {'a/w': 4, 'b/w': 2}
    >>> int(budget.random_masks(jax.random.key(0), theta)['a']['w'].sum())
    4
  """

  sparsity: Sparsity
  distribution: Distribution = distributions.erk
  select: Select = select_lib.is_weight
  structure: Structure = 'unstructured'
  axes: LeafAxes | None = None

  def __post_init__(self) -> None:
    patterns.named(self.structure)
    if not isinstance(self.sparsity, Mapping):
      masks.check_sparsity(self.sparsity)

  @property
  def pattern(self) -> Pattern:
    """Which connections of a leaf may exist together."""
    return patterns.named(self.structure)

  def counts(self, theta: Params) -> dict[str, int]:
    """How many connections each group of each selected leaf has.

    {'module/name': count} from parameters or their shapes, each at least 1;
    empty for a tree without leaves. Refuses a sparsity that leaves nothing of a
    leaf.
    """
    return self.pattern.kept(self._sparsities(theta), self.shapes(theta))

  def layout(self, path: str, leaf: jax.Array) -> Layout:
    """How the pattern has the leaf of this name."""
    return self.pattern.layout(path, jnp.shape(leaf), self.axes)

  def shapes(self, theta: Params) -> dict[str, tuple[int, ...]]:
    """{'module/name': shape} of all leaves as the pattern has them."""
    leaves = trees.by_path(theta).items()
    return {path: self.layout(path, leaf).shape for path, leaf in leaves}

  def random_masks(self, key: jax.Array, theta: Params) -> Masks:
    """Masks with these counts, drawn uniformly; the same on any devices."""
    if not jax.tree.leaves(theta):
      return theta
    return ranking.masks_from_counts(
      scores.random(key, theta),
      self.counts(theta),
      select=self.select,
      pattern=self.pattern,
      axes=self.axes,
    )

  def _sparsities(self, theta: Params) -> Mapping[str, float]:
    """The sparsity of each selected leaf."""
    names = select_lib.selected_names(self.select, theta)
    if not names:
      return {}
    if not callable(self.distribution):
      raise TypeError(
        'distribution must be a function such as pp.erk or pp.uniform, got '
        f'{self.distribution!r}.'
      )
    by_leaf = self.sparsity
    if not isinstance(by_leaf, Mapping):
      share: Any = self.distribution
      # A distribution of one's own need not know of axes.
      share = functools.partial(share, axes=self.axes) if self.axes else share
      by_leaf = share(theta, by_leaf, select=self.select)
    distributions.check_by_leaf(by_leaf, names)
    if isinstance(by_leaf, distributions.Shares):
      return by_leaf
    return {name: by_leaf[name] for name in names}


def map_masks(
  fn: Callable[..., jax.Array], select: Select, rewiring: Rewiring, *rest: Tree
) -> Masks:
  """New masks fn(leaf, mask, *rest) of the selected leaves of θ.

  fn is shown a NamedLeaf. The masks of other leaves stay.
  """
  return trees.map_leaves(
    lambda leaf, mask, *values: (
      fn(leaf, mask, *values) if select(*leaf) else mask
    ),
    rewiring.theta,
    rewiring.masks,
    *rest,
  )


def held(masks: Masks, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
  """How many connections some leaves have, and how many they could have.

  Returns:
    (counts, sizes), both int32[L] in the order of names.

  Example:
    >>> masks = {'a': {'w': jnp.array([[True, False]])}}
    >>> held(masks, ('a/w',))
    (Array([1], dtype=int32), Array([2], dtype=int32))
  """
  leaves = trees.by_path(masks)
  counts = jnp.stack([num_active(leaves[name]) for name in names])
  return counts, jnp.array([leaves[name].size for name in names], jnp.int32)


def num_active(mask: jax.Array) -> jax.Array:
  """How many connections a mask has, int32 scalar."""
  return jnp.sum(mask, dtype=jnp.int32)


def share(fraction: jax.Array, count: jax.Array) -> jax.Array:
  """floor(fraction · count), int32, never more than count.

  For a float32 fraction in [0, 1] and an int32 count; exact up to the rounding
  of float32 above 2^24.
  """
  part = jnp.floor(fraction * count.astype(jnp.float32)).astype(jnp.int32)
  return jnp.clip(part, 0, count)


def check_fraction(value: float | Schedule, name: str) -> None:
  """Refuses a number outside (0, 1); schedules and traced values pass."""
  if callable(value) or trees.is_traced(value):
    return
  if not 0 < value < 1:
    raise ValueError(f'{name} must be in (0, 1), got {value}.')


def as_schedule(drop_fraction: float | Schedule) -> Schedule:
  """A schedule as it is, a number in (0, 1) as one that always says it."""
  check_fraction(drop_fraction, 'drop_fraction')
  if callable(drop_fraction):
    return drop_fraction
  return lambda step: jnp.asarray(drop_fraction, jnp.float32)
