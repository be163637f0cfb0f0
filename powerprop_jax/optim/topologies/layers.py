"""Layer by layer: how many weights each keeps, random masks, maps over leaves.

The pieces that topologies share. Counts are Python integers, worked out from
shapes whenever a function is traced, so that they never travel in a state.
"""

from collections.abc import Callable, Mapping
import operator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, masks, ranking, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule
from powerprop_jax.core.trees import Params, Select, Tree


class Distribution(Protocol):
  """Shares a sparsity out between layers, as uniform, er and erk do."""

  def __call__(
    self, theta: Params, sparsity: float, *, select: Select
  ) -> Mapping[str, float]:
    """{'module/name': sparsity} of every selected leaf."""


def kept_counts(
  theta: Params,
  sparsity: float | Mapping[str, float],
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
) -> dict[str, int]:
  """How many weights each selected leaf keeps.

  Args:
    theta: parameters, or their shapes.
    sparsity: share of zeros over all selected leaves, in [0, 1), to be shared
      out by distribution; or a mapping {'module/name': sparsity}, which then is
      the distribution.
    distribution: such as distributions.erk, or functools.partial of it with
      overrides.
    select: which leaves are masked.

  Returns:
    {'module/name': count}, each at least 1; empty for a tree without leaves.

  Raises:
    ValueError: if a leaf is left without a single weight, if the mapping does
      not name the selected leaves, or from distribution.

  Example:
    >>> theta = {'a': {'w': jnp.ones((5, 4))}, 'b': {'w': jnp.ones((2, 5))}}
    >>> kept_counts(theta, 0.8, distributions.uniform)
    {'a/w': 4, 'b/w': 2}
    >>> kept_counts(theta, {'a/w': 0.5, 'b/w': 0.99})
    Traceback (most recent call last):
      ...
    ValueError: 'b/w' has 10 weights and would lose all of them at sparsity \
0.99. Lower the sparsity, give this leaf one of its own (overrides of the \
distribution), or leave it out of select.
  """
  by_leaf = leaf_sparsities(theta, sparsity, distribution, select)
  sizes = {leaf.path: leaf.value.size for leaf in trees.named_leaves(theta)}
  for name in by_leaf:
    # The tolerance is for densities that a distribution makes just one weight.
    if sizes[name] * (1 - by_leaf[name]) < 1 - 1e-6:
      raise ValueError(
        f'{name!r} has {sizes[name]:,} weights and would lose all of them at '
        f'sparsity {by_leaf[name]:g}. Lower the sparsity, give this leaf one '
        'of its own (overrides of the distribution), or leave it out of select.'
      )
  return distributions.counts(by_leaf, sizes)


def leaf_sparsities(
  theta: Params,
  sparsity: float | Mapping[str, float],
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
) -> Mapping[str, float]:
  """The sparsity of each selected leaf.

  Args:
    theta: parameters, or their shapes.
    sparsity: as for kept_counts.
    distribution: likewise.
    select: which leaves are masked.

  Returns:
    {'module/name': sparsity in [0, 1)}; empty for a tree without leaves.

  Raises:
    ValueError: if a sparsity is out of range, if the mapping does not name the
      selected leaves, or from distribution.
    TypeError: if distribution is no function.
  """
  names = select_lib.selected_names(select, theta)
  if not names:
    return {}
  if not callable(distribution):
    raise TypeError(
      'distribution must be a function such as pp.erk or pp.uniform, got '
      f'{distribution!r}.'
    )
  by_leaf = (
    sparsity
    if isinstance(sparsity, Mapping)
    else distribution(theta, sparsity, select=select)
  )
  if set(by_leaf) != set(names):
    raise ValueError(
      f'the sparsities name {", ".join(sorted(by_leaf))}; they must name '
      f'exactly the selected leaves {", ".join(names)}.'
    )
  for name in names:
    masks.check_sparsity(by_leaf[name], f'the sparsity of {name!r}')
  if isinstance(by_leaf, distributions.Shares):
    return by_leaf
  return {name: by_leaf[name] for name in names}


def random_masks(
  key: jax.Array,
  theta: Params,
  counts: Mapping[str, int],
  select: Select = select_lib.is_weight,
) -> Masks:
  """Masks with an exact number of connections per leaf, drawn uniformly.

  Args:
    key: PRNG key.
    theta: parameters, for structure, shapes and shardings.
    counts: {'module/name': count} of the selected leaves.
    select: which leaves are masked.

  Returns:
    Masks like theta, True on leaves that are not selected.

  Example:
    >>> theta = {'a': {'w': jnp.ones((5, 4))}}
    >>> mask = random_masks(jax.random.key(0), theta, {'a/w': 7})['a']['w']
    >>> int(mask.sum())
    7
  """
  if not jax.tree.leaves(theta):
    return theta
  drawn = scores.random(key, theta)
  return ranking.masks_from_counts(drawn, counts, select=select)


def map_masks(
  fn: Callable[..., jax.Array],
  select: Select,
  theta: Params,
  masks: Masks,
  *rest: Any,
) -> Masks:
  """New masks fn(mask, theta, *rest) of the selected leaves; keeps the others.

  Args:
    fn: from a leaf of masks, theta and each of rest to the leaf's new mask.
    select: which leaves are masked.
    theta: parameters, by which select chooses.
    masks: masks like theta.
    *rest: more trees like theta.

  Returns:
    Masks like theta.
  """

  def visit(
    module_name: str, name: str, t: Any, mask: Tree, *values: Any
  ) -> Any:
    return fn(mask, t, *values) if select(module_name, name, t) else mask

  return trees.map_named(visit, theta, masks, *rest)


def num_active(mask: jax.Array) -> jax.Array:
  """How many connections a mask has, int32 scalar."""
  return jnp.sum(mask, dtype=jnp.int32)


def share(fraction: jax.Array, count: jax.Array) -> jax.Array:
  """floor(fraction · count), int32, never more than count.

  Args:
    fraction: float32 scalar in [0, 1].
    count: int32 scalar.

  Returns:
    int32 scalar; exact up to the rounding of float32 above 2^24.
  """
  part = jnp.floor(fraction * count.astype(jnp.float32)).astype(jnp.int32)
  return jnp.clip(part, 0, count)


def check_fraction(value: Any, name: str) -> None:
  """Refuses a number outside (0, 1); schedules and traced values pass."""
  if callable(value) or isinstance(value, jax.core.Tracer):
    return
  if not 0 < value < 1:
    raise ValueError(f'{name} must be in (0, 1), got {value}.')


def check_steps(start: int, stop: int, period: int) -> None:
  """Refuses a range of steps without a rewiring in it.

  Args:
    start: first step that may rewire.
    stop: first step that no longer may.
    period: steps from one rewiring to the next.

  Raises:
    ValueError: naming what was given.
  """
  for name, value in (('start', start), ('stop', stop), ('period', period)):
    if operator.index(value) < (1 if name == 'period' else 0):
      least = 1 if name == 'period' else 0
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  first = -(-start // period) * period
  if first >= stop:
    raise ValueError(
      f'nothing would ever be rewired: the multiples of {period=} in '
      f'[{start=}, {stop=}) are none. Choose a later stop or a shorter period.'
    )


def as_schedule(value: float | Schedule) -> Schedule:
  """A schedule as it is, a number as the schedule that always says it."""
  if callable(value):
    return value
  return lambda step: jnp.asarray(value, jnp.float32)
