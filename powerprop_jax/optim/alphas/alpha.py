"""Controllers of α: rules that look at the weights and say what α is to be.

A controller is a pair of pure functions. It is shown θ and the connections from
time to time, remembers what it wants in a state of arrays, and returns the α to
go on with. adaptive_alpha runs one inside a training step; with_alpha applies
what one says between steps.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Alpha, NamedLeaf, Params, Select, Tree
from powerprop_jax.optim import powerprop


class AlphaState(NamedTuple):
  """What the published rule remembers between two readings.

  Attributes:
    previous: the last reading, float32; -inf before the first. A scalar, or a
      tree by leaf as α is.
    is_growing: whether the first, geometric phase lasts, bool of the same
      structure. It ends with the first reading that fell, for good.
  """

  previous: Tree
  is_growing: Tree


class AlphaController(NamedTuple):
  """A rule for α, as pure functions; see near_zero_controller for one.

  Attributes:
    init: alpha -> state, for α as powerprop starts with it: a float32 scalar,
      or a tree of them by leaf. state is any tree of arrays whose structure,
      shapes and dtypes never change.
    update: (theta, masks, alpha, state) -> (alpha, state), where theta are the
      effective weights, zero where masks are False, and masks the connections
      that exist. The new α has the structure of the old one, is at least 1 and
      at most reparam.MAX_ALPHA.

  Example:
    >>> up = lambda theta, masks, alpha, state: (alpha + 0.5, state)
    >>> rising = AlphaController(init=lambda alpha: (), update=up)
  """

  init: Callable[[Alpha], Tree]
  update: Callable[[Params, Masks, Alpha, Tree], tuple[Alpha, Tree]]


def near_zero_controller(
  epsilon: float = 0.01,
  *,
  growth: float = 1.5,
  increment: float = 0.1,
  alpha_max: float = 4.0,
  per_leaf: bool = False,
  relative: bool = False,
  select: Select = select_lib.is_weight,
) -> AlphaController:
  """Raises α as long as the share of weights near zero does not fall.

  The reading is the share of selected connections with |θ| < epsilon, and
  next_alpha says what follows from it.

  Args:
    epsilon: how near zero, positive: the same for all leaves, or with relative
      in units of each leaf's standard deviation.
    growth: c_r, factor of α - 1 in the first phase, and its divisor whenever
      the reading falls; more than 1.
    increment: c_d, what is added to α after the first phase, at least 0.
    alpha_max: α grows no further; in (1, 64].
    per_leaf: one reading, one phase and one α for each leaf, where powerprop is
      given a tree of arrays. Leaves without an α of their own, or not selected,
      are left alone. Otherwise one of each for all selected leaves.
    relative: whether epsilon is multiplied by the standard deviation of the
      connections of each leaf; where that is 0, nothing counts as near zero.
    select: which leaves are measured.

  Raises:
    ValueError: from `init`, if α does not start in (1, alpha_max].

  Note:
    The report leaves open what is measured, what the first reading is compared
    with, and where α ends. Here the reading is taken on θ, of connections that
    exist; with |φ| < ε it would move whenever α does, by itself. It is 0 where
    there are none. The first reading counts as a success. alpha_max is ours: an
    equal reading is a success too, so that α would grow forever once the share
    stays at 0 or 1. The share also drifts with training time, learning rate and
    weight decay: compare with a run at a fixed α.

  Example:
    >>> controller = near_zero_controller(epsilon=0.1)
    >>> theta = {'linear': {'w': jnp.array([[0.05, -2.0]])}}
    >>> masks = {'linear': {'w': jnp.array([[True, True]])}}
    >>> alpha = jnp.float32(1.5)
    >>> alpha, state = controller.update(
    ...   theta, masks, alpha, controller.init(alpha))
    >>> print(alpha, state.previous)
    1.75 0.5

  Source:
    Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 5.
  """
  if not 0 < epsilon < math.inf:
    raise ValueError(f'epsilon must be positive and finite, got {epsilon}.')
  _check_rule(growth, increment, alpha_max)
  reparam.check_invertible(float(alpha_max), 'alpha_max')
  rule = functools.partial(
    next_alpha, growth=growth, increment=increment, alpha_max=alpha_max
  )

  def init(alpha: Alpha) -> AlphaState:
    _check_kind(alpha, per_leaf)
    _check_start(alpha, alpha_max)
    return AlphaState(
      jax.tree.map(lambda _: jnp.asarray(-jnp.inf, jnp.float32), alpha),
      jax.tree.map(lambda _: jnp.asarray(True), alpha),
    )

  def counts_near_zero(
    theta: Params, masks: Masks
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Connections near zero, and all of them, by the path of their leaf."""
    count = lambda mask: jnp.sum(mask, dtype=jnp.int32)
    existing, counts = trees.by_path(masks), {}
    for path, leaf in select_lib.selected(select, theta).items():
      x, mask = reparam.widen(leaf), existing[path]
      limit = epsilon * jnp.std(x, where=mask) if relative else epsilon
      counts[path] = count(mask & (jnp.abs(x) < limit)), count(mask)
    return counts

  def update(
    theta: Params, masks: Masks, alpha: Alpha, state: AlphaState
  ) -> tuple[Alpha, AlphaState]:
    counts = counts_near_zero(theta, masks)
    if per_leaf:
      return _step_by_leaf(rule, counts, alpha, state)
    whole = jnp.sum(jnp.stack([jnp.stack(c) for c in counts.values()]), 0)
    return rule(_share(whole[0], whole[1]), alpha, state)

  return AlphaController(init, update)


def next_alpha(
  reading: jax.Array | float,
  alpha: jax.Array | float,
  state: AlphaState,
  *,
  growth: float = 1.5,
  increment: float = 0.1,
  alpha_max: float = math.inf,
) -> tuple[jax.Array, AlphaState]:
  """The α that follows from one more reading, as TCP adapts its rate.

      reading                  first phase           later
      did not fall             1 + c_r (α - 1)       α + c_d
      fell                     1 + (α - 1)/c_r       1 + (α - 1)/c_r

  Nothing falls below 1. α = 1 stays there during the first phase. The reading
  says how sparse the weights are under α; NaN counts as a fall, and is not what
  the next one is compared with. growth is c_r, increment c_d.

  Example:
    >>> alpha, state = jnp.float32(1.5), AlphaState(-jnp.inf, True)
    >>> for reading in (0.5, 0.6, 0.4, 0.4):
    ...   alpha, state = next_alpha(reading, alpha, state)
    ...   print(alpha, state.is_growing)
    1.75 True
    2.125 True
    1.75 False
    1.85 False

  Source:
    Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 5, where the phase
    is called init and growth and increment are 1.5 and 0.1; after RFC 5681.
  """
  _check_rule(growth, increment, alpha_max)
  reading = jnp.asarray(reading, jnp.float32)
  alpha = jnp.asarray(alpha, jnp.float32)
  holds = reading >= state.previous
  grown = jnp.where(
    state.is_growing, 1 + growth * (alpha - 1), alpha + increment
  )
  shrunk = 1 + (alpha - 1) / growth
  alpha = jnp.where(holds, jnp.minimum(grown, alpha_max), shrunk)
  previous = jnp.where(jnp.isnan(reading), state.previous, reading)
  return alpha, AlphaState(previous, state.is_growing & holds)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)


def _step_by_leaf(
  step: Callable[..., tuple[jax.Array, AlphaState]],
  counts: dict[str, tuple[jax.Array, jax.Array]],
  alpha: Alpha,
  state: AlphaState,
) -> tuple[Alpha, AlphaState]:
  if not counts.keys() & trees.by_path(alpha).keys():
    raise ValueError(
      'no leaf is both selected by the controller and has an alpha of its own. '
      f'Selected: {", ".join(counts)}; with an alpha: '
      f'{", ".join(trees.by_path(alpha))}.'
    )

  def visit(leaf: NamedLeaf, *old: jax.Array) -> tuple[jax.Array, ...]:
    if leaf.path not in counts:
      return (leaf.value, *old)
    reading = _share(*counts[leaf.path])
    new, remembered = step(reading, leaf.value, AlphaState(*old))
    return (new, *remembered)

  found = trees.map_leaves(visit, alpha, *state)
  alphas, *states = (
    jax.tree.map(lambda _, new, i=i: new[i], alpha, found) for i in range(3)
  )
  return alphas, AlphaState(*states)


def _check_rule(growth: float, increment: float, alpha_max: float) -> None:
  if not 1 < growth < math.inf:
    raise ValueError(
      f'growth must be finite and more than 1, got {growth}: it multiplies '
      'alpha - 1 to grow and divides it to shrink.'
    )
  if not 0 <= increment < math.inf:
    raise ValueError(
      f'increment must be finite and at least 0, got {increment}.'
    )
  if not alpha_max > 1:
    raise ValueError(f'alpha_max must be more than 1, got {alpha_max}.')


def _check_kind(alpha: Alpha, per_leaf: bool) -> None:
  """Refuses one α for many controllers, and many for one."""
  is_scalar = jax.tree_util.all_leaves([alpha])
  if per_leaf and is_scalar:
    raise ValueError(
      'per_leaf needs one alpha for each leaf, got a scalar. Give powerprop a '
      "tree, for instance {'linear': {'w': jnp.float32(1.25)}}, or leave "
      'per_leaf out.'
    )
  if not (per_leaf or is_scalar):
    raise ValueError(
      'alpha is a tree with a power for each leaf, and the controller has one '
      'for all of them. Pass per_leaf=True, or give powerprop a scalar.'
    )


def _check_start(alpha: Alpha, alpha_max: float) -> None:
  for path, value in powerprop.alpha_by_path(alpha).items():
    if not (trees.is_traced(value) or 1 < value <= alpha_max):
      why = 'growth multiplies alpha - 1, so that 1 would stay 1 forever.'
      raise ValueError(
        f'alpha must start in (1, {alpha_max:g}], got {value:g}'
        + (f' for {path!r}' if path else '')
        + (f': {why} Start at 1.25, for instance.' if value <= 1 else '.')
      )
