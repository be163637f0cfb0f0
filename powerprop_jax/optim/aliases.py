"""Sparse training in one line: each is sparsify around a topology.

    tx = rigl(powerprop(optax.sgd(0.1, momentum=0.9), 2.0), 0.9, stop=7_500)

All take the optimiser first and the final sparsity second; what is left out has
the value of the paper. `topologies` has the parts to build others from.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.topologies import (
  drop_grow,
  fixed,
  gradual,
  layers,
)
from powerprop_jax.optim.topologies import top_kast as top_kast_lib
from powerprop_jax.optim.topologies.gradual import Scope
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topologies.top_kast import Norm
from powerprop_jax.optim.topology import Regrow

Sparsity = float | Mapping[str, float]


def static(
  inner: optax.GradientTransformation,
  sparsity: Sparsity | None = None,
  *,
  masks: Masks | None = None,
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """Trains a fixed set of connections: random ones, or those of given masks.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}, for
      random masks.
    masks: the masks, instead of a sparsity.
    distribution: shares the sparsity out between leaves.
    select: which leaves random masks are for.
    key: seed of the random masks, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: unless exactly one of sparsity and masks is given; otherwise as
      for sparsify.

  Example:
    >>> theta = {'linear': {'w': jnp.ones((4, 5))}}
    >>> state = static(optax.sgd(0.1), 0.75).init(theta)
    >>> int(state.masks['linear']['w'].sum())
    5
  """
  if (sparsity is None) == (masks is None):
    raise ValueError(
      'static needs a sparsity or masks, one of the two, got '
      + ('neither.' if masks is None else 'both.')
    )
  if sparsity is None:
    topology = fixed.given(masks)
  else:
    topology = fixed.at_random(
      sparsity, distribution=distribution, select=select
    )
  return sparsify_lib.sparsify(inner, topology, key=key)


def gradual_pruning(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  start: int,
  stop: int,
  period: int = 100,
  power: float = 3,
  scope: Scope = 'layer',
  distribution: Distribution = distributions.uniform,
  normalise: bool = False,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning along a polynomial, dense until start, sparse from stop.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros in the end, in [0, 1), or, per layer, a mapping
      {'module/name': sparsity}.
    start: the step at which the polynomial leaves 0, at least 0.
    stop: the step at which the full sparsity is reached, after start.
    period: weights are removed every so many steps after start, and at stop.
    power: of the polynomial.
    scope: 'layer', or 'global' to rank all weights together.
    distribution: per layer, shares the sparsity out between leaves.
    normalise: divide scores by the norm of their leaf; see topologies.gradual.
    select: which leaves are pruned.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    At start itself nothing is removed yet. JaxPruner counts one step ahead and
    removes the first weights there.

  Example:
    >>> tx = gradual_pruning(optax.sgd(0.1), 0.8, start=1_000, stop=5_000)

  Source:
    Zhu & Gupta, To prune, or not to prune, 2017, equation 1
    (https://arxiv.org/abs/1710.01878).
  """
  if period < 1:
    raise ValueError(f'period must be at least 1, got {period}.')
  curve = schedules.polynomial(0.5, start, stop, power)

  def when(step: jax.typing.ArrayLike) -> jax.Array:
    since = jnp.asarray(step) - start
    is_between = (since > 0) & (since < stop - start)
    return (is_between & (since % period == 0)) | (since == stop - start)

  topology = gradual.gradual(
    sparsity,
    lambda step: curve(step) / 0.5,
    when,
    scope=scope,
    distribution=distribution,
    normalise=normalise,
    select=select,
  )
  return sparsify_lib.sparsify(inner, topology)


def one_shot_pruning(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  step: int,
  scope: Scope = 'layer',
  distribution: Distribution = distributions.uniform,
  normalise: bool = False,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning at one step of training, and retraining from there.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros from then on, in [0, 1), or, per layer, a mapping
      {'module/name': sparsity}.
    step: the first update that is sparse, at least 0.
    scope: 'layer', or 'global' to rank all weights together.
    distribution: per layer, shares the sparsity out between leaves.
    normalise: divide scores by the norm of their leaf; see topologies.gradual.
    select: which leaves are pruned.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Example:
    >>> tx = one_shot_pruning(optax.sgd(0.1), 0.9, step=5_000)
  """
  topology = gradual.gradual(
    sparsity,
    lambda step: jnp.ones([], jnp.float32),
    schedules.at(step),
    scope=scope,
    distribution=distribution,
    normalise=normalise,
    select=select,
  )
  return sparsify_lib.sparsify(inner, topology)


def sparse_evolution(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  stop: int,
  start: int | None = None,
  period: int = 100,
  drop_fraction: float | Schedule = 0.3,
  distribution: Distribution = distributions.erk,
  replaces_step: bool = False,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """SET: drops the smallest weights, grows as many at random.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    stop: first step at which connections no longer move.
    start: first step at which they may; None is the first period.
    period: they move at multiples of it.
    drop_fraction: share of each layer's connections that moves, in (0, 1); a
      number falls along half a cosine to 0 at stop, f(t) = f₀ (1 + cos(π t /
      stop)) / 2, a schedule is taken as it is.
    distribution: shares the sparsity out between leaves.
    replaces_step: whether weights stand still at these steps.
    select: which leaves are masked.
    regrow: first value of a new connection; see sparsify.
    key: seed, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    The code of RigL takes the gradient step too when SET rewires, as here;
    JaxPruner skips it (replaces_step=True). The original drops a constant share
    once an epoch: drop_fraction=constant(0.3), period=steps of an epoch.

  Example:
    >>> tx = sparse_evolution(optax.sgd(0.1), 0.9, stop=7_500)

  Source:
    Mocanu et al., Scalable training of artificial neural networks with adaptive
    sparse connectivity, 2018 (https://arxiv.org/abs/1707.04780).
  """
  start = period if start is None else start
  layers.check_steps(start, stop, period)
  topology = drop_grow.drop_grow(
    sparsity,
    schedules.every(period, start=start, stop=stop),
    _annealed(drop_fraction, stop),
    drop_grow.at_random,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  return sparsify_lib.sparsify(inner, topology, regrow=regrow, key=key)


def rigl(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  stop: int,
  start: int | None = None,
  period: int = 100,
  drop_fraction: float | Schedule = 0.3,
  distribution: Distribution = distributions.erk,
  replaces_step: bool = True,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """RigL: drops the smallest weights, grows where the gradient is largest.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    stop: T_end, first step at which connections no longer move; the paper
      stops after three quarters of training.
    start: first step at which they may; None is the first period.
    period: ΔT; they move at multiples of it.
    drop_fraction: share of each layer's connections that moves, in (0, 1); a
      number falls along half a cosine to 0 at stop, f(t) = f₀ (1 + cos(π t /
      stop)) / 2, a schedule is taken as it is.
    distribution: shares the sparsity out between leaves.
    replaces_step: whether weights stand still then, as in algorithm 1.
    select: which leaves are masked.
    regrow: first value of a new connection; see sparsify.
    key: seed of the first masks, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    The authors' code moves connections at step 0 already (start=0), lets stop
    itself count, and anneals from start; PyTorch ports begin at ΔT, as here,
    since at step 0 there is nothing to learn from magnitudes.

  Example:
    >>> tx = rigl(optax.sgd(0.1, momentum=0.9), 0.9, stop=7_500)

  Source:
    Evci et al., Rigging the lottery, 2020, algorithm 1
    (https://arxiv.org/abs/1911.11134).
  """
  start = period if start is None else start
  layers.check_steps(start, stop, period)
  topology = drop_grow.drop_grow(
    sparsity,
    schedules.every(period, start=start, stop=stop),
    _annealed(drop_fraction, stop),
    drop_grow.by_gradient,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  return sparsify_lib.sparsify(inner, topology, regrow=regrow, key=key)


def top_kast(
  inner: optax.GradientTransformation,
  sparsity: float,
  backward_sparsity: float,
  *,
  stop: int | None = None,
  period: int = 1,
  penalty: float = 1e-4,
  norm: Norm = 'l2',
  distribution: Distribution = distributions.uniform,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Top-KAST: computes with the largest weights, trains some more.

  Args:
    inner: any Optax optimiser, with powerprop around it if wanted.
    sparsity: share of zeros that the network computes with, in [0, 1).
    backward_sparsity: share of weights that are not trained; at most sparsity.
    stop: first step at which both sets no longer change; None is never.
    period: both are chosen anew at multiples of it.
    penalty: coefficient of the exploration penalty, at least 0.
    norm: 'l1' or 'l2'; see topologies.top_kast.
    distribution: shares both sparsities out between leaves.
    select: which leaves are masked.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    The paper chooses the sets at every step and reports that every 100 steps
    do as well; that is much faster.

  Example:
    >>> tx = top_kast(optax.sgd(0.1), 0.9, 0.8, period=100)

  Source:
    Jayakumar et al., Top-KAST: Top-K Always Sparse Training, 2020
    (https://arxiv.org/abs/2106.03517).
  """
  topology = top_kast_lib.top_kast(
    sparsity,
    backward_sparsity,
    schedules.every(period, stop=stop),
    penalty=penalty,
    norm=norm,
    distribution=distribution,
    select=select,
  )
  return sparsify_lib.sparsify(inner, topology)


def _annealed(drop_fraction: float | Schedule, stop: int) -> Schedule:
  """A schedule as it is; a number falls along half a cosine to 0 at stop."""
  layers.check_fraction(drop_fraction, 'drop_fraction')
  if callable(drop_fraction):
    return drop_fraction
  cosine: Any = optax.cosine_decay_schedule(drop_fraction, stop)
  return lambda step: jnp.asarray(cosine(step), jnp.float32)
