"""Connections that move within their layer: SET and RigL."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.schedules import Schedule
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.aliases import structures
from powerprop_jax.optim.aliases.structures import Structure
from powerprop_jax.optim.topologies import constant_fan_in, drop_grow, layers
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Regrow, Topology

Sparsity = float | Mapping[str, float]


def sparse_evolution(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  stop: int,
  start: int | None = None,
  period: int = 100,
  drop_fraction: float | Schedule = 0.3,
  structure: Structure = 'unstructured',
  ablation: Ablation | None = None,
  distribution: Distribution = distributions.erk,
  replaces_step: bool = False,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """SET: drops the smallest weights, grows as many at random.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    stop: first step at which connections no longer move.
    start: first step at which they may; None is the first period.
    period: they move at multiples of it.
    drop_fraction: share of each layer's connections that moves, in (0, 1); a
      number falls along half a cosine to 0 at stop, f(t) = f₀ (1 + cos(π t /
      stop)) / 2, a schedule is taken as it is.
    structure: 'constant_fan_in' gives every neuron of a layer as many inputs as
      any other, the sparsity rounded to that; see topologies.constant_fan_in.
    ablation: with constant fan-in, when neurons lose all inputs; None is never.
      See neuron_ablation.Ablation, which has to leave out the last layer.
    distribution: shares the sparsity out between leaves.
    replaces_step: whether weights stand still at these steps. Such updates do
      not count in inner: learning-rate schedules there lag behind by as many.
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
  topology = _topology(
    structure,
    ablation,
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
  structure: Structure = 'unstructured',
  ablation: Ablation | None = None,
  distribution: Distribution = distributions.erk,
  replaces_step: bool = True,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """RigL: drops the smallest weights, grows where the gradient is largest.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    stop: T_end, first step at which connections no longer move; the paper
      stops after three quarters of training.
    start: first step at which they may; None is the first period.
    period: ΔT; they move at multiples of it.
    drop_fraction: share of each layer's connections that moves, in (0, 1); a
      number falls along half a cosine to 0 at stop, f(t) = f₀ (1 + cos(π t /
      stop)) / 2, a schedule is taken as it is.
    structure: 'constant_fan_in' gives every neuron of a layer as many inputs as
      any other, the sparsity rounded to that; see topologies.constant_fan_in.
    ablation: with constant fan-in, when neurons lose all inputs; None is never.
      See neuron_ablation.Ablation, which has to leave out the last layer.
    distribution: shares the sparsity out between leaves.
    replaces_step: whether weights stand still then, as in algorithm 1. Such
      updates do not count in inner: learning-rate schedules there lag behind by
      as many, 1 % at a period of 100. The authors' code counts them.
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
    (https://arxiv.org/abs/1911.11134); with constant fan-in, Lasby et al.,
    Dynamic sparse training with structured sparsity, 2024
    (https://arxiv.org/abs/2305.02299).
  """
  start = period if start is None else start
  layers.check_steps(start, stop, period)
  topology = _topology(
    structure,
    ablation,
    sparsity,
    schedules.every(period, start=start, stop=stop),
    _annealed(drop_fraction, stop),
    drop_grow.by_gradient,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  return sparsify_lib.sparsify(inner, topology, regrow=regrow, key=key)


def _topology(
  structure: Structure, ablation: Ablation | None, *args: Any, **kwargs: Any
) -> Topology:
  """drop_grow with or without constant fan-in."""
  if structures.is_constant_fan_in(structure):
    return constant_fan_in.drop_grow(*args, ablation=ablation, **kwargs)
  if ablation is not None:
    raise ValueError(
      "ablation removes neurons of layers with structure='constant_fan_in', "
      f'got structure={structure!r}.'
    )
  return drop_grow.drop_grow(*args, **kwargs)


def _annealed(drop_fraction: float | Schedule, stop: int) -> Schedule:
  """A schedule as it is; a number falls along half a cosine to 0 at stop."""
  layers.check_fraction(drop_fraction, 'drop_fraction')
  if callable(drop_fraction):
    return drop_fraction
  cosine: Any = optax.cosine_decay_schedule(drop_fraction, stop)
  return lambda step: jnp.asarray(cosine(step), jnp.float32)
