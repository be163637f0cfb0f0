"""Connections that stay or go: given, random, and magnitude pruning."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.topologies import fixed, gradual
from powerprop_jax.optim.topologies.gradual import Scope
from powerprop_jax.optim.topologies.layers import Distribution

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
