"""Connections that stay or go: given, random, and magnitude pruning."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.aliases import structures
from powerprop_jax.optim.aliases.structures import Structure
from powerprop_jax.optim.topologies import constant_fan_in, fixed, gradual
from powerprop_jax.optim.topologies.gradual import Scope
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topology import Topology

Sparsity = float | Mapping[str, float]


def static(
  inner: optax.GradientTransformation,
  sparsity: Sparsity | None = None,
  *,
  masks: Masks | None = None,
  structure: Structure = 'unstructured',
  distribution: Distribution = distributions.erk,
  select: Select = select_lib.is_weight,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """Trains a fixed set of connections: random ones, or those of given masks.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}, for
      random masks.
    masks: the masks, instead of a sparsity.
    structure: of random masks; 'constant_fan_in' gives every neuron of a layer
      as many inputs as any other, the sparsity rounded to that; see
      topologies.constant_fan_in.
    distribution: shares the sparsity out between leaves.
    select: which leaves random masks are for.
    key: seed of the random masks, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: unless exactly one of sparsity and masks is given, or if given
      masks shall have a structure; otherwise as for sparsify.

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
  is_constant = structures.is_constant_fan_in(structure)
  if sparsity is None:
    if is_constant:
      raise ValueError(
        "structure='constant_fan_in' draws random masks and needs a sparsity, "
        'got masks. Leave structure away, these masks are taken as they are.'
      )
    topology = fixed.given(masks)
  else:
    at_random = constant_fan_in.at_random if is_constant else fixed.at_random
    topology = at_random(sparsity, distribution=distribution, select=select)
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
  structure: Structure = 'unstructured',
  distribution: Distribution = distributions.uniform,
  normalise: bool = False,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning along a polynomial, dense until start, sparse from stop.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros in the end, in [0, 1), or, per layer, a mapping
      {'module/name': sparsity}.
    start: the step at which the polynomial leaves 0, at least 0.
    stop: the step at which the full sparsity is reached, after start.
    period: weights are removed every so many steps after start, and at stop.
    power: of the polynomial.
    scope: 'layer', or 'global' to rank all weights together.
    structure: 'constant_fan_in' ranks the inputs of each neuron by themselves
      and leaves every neuron of a layer as many as any other; see
      topologies.constant_fan_in.
    distribution: per layer, shares the sparsity out between leaves.
    normalise: divide scores by the norm of their leaf; see topologies.gradual.
    select: which leaves are pruned.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    At start itself nothing is removed yet. JaxPruner counts one step ahead and
    removes the first weights there. A ramp of stop - start <= period steps has
    nothing in between: all zeros come at once, at stop, as in one_shot_pruning.

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

  topology = _gradual(
    structure,
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
  structure: Structure = 'unstructured',
  distribution: Distribution = distributions.uniform,
  normalise: bool = False,
  select: Select = select_lib.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning at one step of training, and retraining from there.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros from then on, in [0, 1), or, per layer, a mapping
      {'module/name': sparsity}.
    step: the first update that is sparse, at least 0.
    scope: 'layer', or 'global' to rank all weights together.
    structure: 'constant_fan_in' ranks the inputs of each neuron by themselves
      and leaves every neuron of a layer as many as any other; see
      topologies.constant_fan_in.
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
  topology = _gradual(
    structure,
    sparsity,
    lambda step: jnp.ones([], jnp.float32),
    schedules.at(step),
    scope=scope,
    distribution=distribution,
    normalise=normalise,
    select=select,
  )
  return sparsify_lib.sparsify(inner, topology)


def _gradual(
  structure: Structure,
  *args: Any,
  scope: Scope,
  normalise: bool,
  **kwargs: Any,
) -> Topology:
  """gradual with or without constant fan-in."""
  if not structures.is_constant_fan_in(structure):
    return gradual.gradual(*args, scope=scope, normalise=normalise, **kwargs)
  if scope != 'layer':
    raise ValueError(
      "structure='constant_fan_in' ranks the inputs of each neuron by "
      f"themselves, got scope={scope!r}. Use scope='layer'."
    )
  # normalise changes no ranking within a leaf.
  return constant_fan_in.gradual(*args, **kwargs)
