"""Connections that move, also between layers: SNFS, DSR and Top-KAST."""

from collections.abc import Mapping

import jax
import optax

from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.schedules import Schedule
from powerprop_jax.core.trees import Select
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.aliases import structures
from powerprop_jax.optim.aliases.structures import Structure
from powerprop_jax.optim.topologies import constant_fan_in_snfs, layers
from powerprop_jax.optim.topologies import dsr as dsr_lib
from powerprop_jax.optim.topologies import snfs as snfs_lib
from powerprop_jax.optim.topologies import top_kast as top_kast_lib
from powerprop_jax.optim.topologies.layers import Distribution
from powerprop_jax.optim.topologies.top_kast import Norm
from powerprop_jax.optim.topology import Regrow

Sparsity = float | Mapping[str, float]


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
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
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


def snfs(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  period: int,
  stop: int,
  start: int | None = None,
  drop_fraction: float | Schedule = 0.5,
  min_drop_fraction: float = 0.005,
  momentum: float = 0.9,
  second_moment: float | None = None,
  redistribute: bool = True,
  structure: Structure = 'unstructured',
  distribution: Distribution = distributions.uniform,
  replaces_step: bool = False,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """SNFS, sparse momentum: moves connections to where momentum is largest.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    period: connections move at multiples of it; the steps of an epoch.
    stop: first step at which they no longer move; the steps of all epochs, so
      that the end of the last one does not count.
    start: first step at which they may; None is the first period.
    drop_fraction: share of a layer's connections that is dropped, in (0, 1); a
      number falls along half a cosine to min_drop_fraction at stop, a schedule
      is taken as it is.
    min_drop_fraction: where the cosine ends, in [0, drop_fraction].
    momentum: β of the topology's own momentum, m ← β m + g.
    second_moment: β₂ to rank by |m|/√v, as with Adam; None ranks by |m|.
    redistribute: whether connections change layers; see topologies.snfs.
    structure: 'constant_fan_in' gives every neuron of a layer as many inputs as
      any other; see topologies.constant_fan_in_snfs.
    distribution: shares the sparsity out between leaves at the start.
    replaces_step: whether weights stand still at these steps. Such updates do
      not count in inner: learning-rate schedules there lag behind by as many.
    select: which leaves are masked.
    regrow: first value of a new connection; see sparsify.
    key: seed of the first masks, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify. It holds one dense float32
    momentum, two with second_moment.

  Raises:
    ValueError: if an argument is out of range.

  Note:
    RigL's comparison with SNFS has redistribute=False and
    distribution=distributions.erk. For a linear decay of the drop fraction,
    pass optax.linear_schedule(0.5, 0, stop).

  Example:
    >>> tx = snfs(optax.sgd(0.1, 0.9), 0.95, period=600, stop=60_000)

  Source:
    Dettmers & Zettlemoyer, Sparse networks from scratch, 2019
    (https://arxiv.org/abs/1907.04840).
  """
  start = period if start is None else start
  layers.check_steps(start, stop, period)
  layers.check_fraction(drop_fraction, 'drop_fraction')
  if not callable(drop_fraction):
    if not 0 <= min_drop_fraction <= drop_fraction:
      raise ValueError(
        f'min_drop_fraction must be in [0, drop_fraction = {drop_fraction}], '
        f'got {min_drop_fraction}.'
      )
    lowest = min_drop_fraction / drop_fraction
    drop_fraction = optax.cosine_decay_schedule(drop_fraction, stop, lowest)
  make = (
    constant_fan_in_snfs.snfs
    if structures.is_constant_fan_in(structure)
    else snfs_lib.snfs
  )
  topology = make(
    sparsity,
    schedules.every(period, start=start, stop=stop),
    drop_fraction,
    momentum=momentum,
    second_moment=second_moment,
    redistribute=redistribute,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  return sparsify_lib.sparsify(inner, topology, regrow=regrow, key=key)


def dsr(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  period: int,
  stop: int,
  start: int | None = None,
  num_dropped: int = 600,
  threshold: float = 1e-3,
  distribution: Distribution = distributions.uniform,
  replaces_step: bool = False,
  select: Select = select_lib.is_weight,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """DSR: drops below a threshold for all layers, grows as many at random.

  Args:
    inner: an Optax optimiser, with powerprop around it if wanted; see sparsify.
    sparsity: share of zeros, in [0, 1), or {'module/name': sparsity}.
    period: connections move at multiples of it.
    stop: first step at which they no longer move.
    start: first step at which they may; None is the first period.
    num_dropped: how many should move each time; the threshold is halved if more
      do, doubled if fewer. 400_000 for ResNet-50.
    threshold: of |θ|, at the start; greater than 0.
    distribution: shares the sparsity out between leaves at the start.
    replaces_step: whether weights stand still at these steps. Such updates do
      not count in inner: learning-rate schedules there lag behind by as many.
    select: which leaves are masked.
    regrow: first value of a new connection; see sparsify.
    key: seed, an int or a PRNG key.

  Returns:
    A gradient transformation over φ; see sparsify.

  Raises:
    ValueError: if an argument is out of range; from init, if there are not
      num_dropped connections to drop.

  Note:
    The authors lengthen the period from 1,000 steps to 8,000 during training;
    for that, build it from topologies.dsr with a `when` of your own.

  Example:
    >>> tx = dsr(optax.sgd(0.1, 0.9), 0.95, period=1_000, stop=57_000)

  Source:
    Mostafa & Wang, Parameter efficient training of deep convolutional neural
    networks by dynamic sparse reparameterization, 2019
    (https://arxiv.org/abs/1902.05967).
  """
  start = period if start is None else start
  layers.check_steps(start, stop, period)
  topology = dsr_lib.dsr(
    sparsity,
    schedules.every(period, start=start, stop=stop),
    num_dropped=num_dropped,
    threshold=threshold,
    distribution=distribution,
    select=select,
    replaces_step=replaces_step,
  )
  return sparsify_lib.sparsify(inner, topology, regrow=regrow, key=key)
