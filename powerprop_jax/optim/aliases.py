"""Sparse training in one line: each is sparsify around a topology.

    tx = rigl(powerprop(optax.sgd(0.1, momentum=0.9), 2.0), 0.9, stop=7_500)

All take an Optax optimiser first, with or without powerprop around it, and the
final sparsity second, {'module/name': sparsity} to give each leaf its own; what
is left out has the value of the paper. They return a gradient transformation
over φ, and refuse what is out of range with a ValueError. `topologies` has the
parts to build others from, and says how each method works.

Connections move at multiples of `period` in [start, stop), where start=None is
the first period. With `replaces_step` weights stand still at these steps, which
then do not count in inner: learning-rate schedules there lag behind by as many.
"""

from collections.abc import Callable
import inspect
import operator
from typing import Any, ParamSpec, TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import schedules
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.optim.sparsify import sparsify
from powerprop_jax.optim.topologies import counts, drop_grow, fixed, gradual
from powerprop_jax.optim.topologies import dsr as dsr_lib
from powerprop_jax.optim.topologies import snfs as snfs_lib
from powerprop_jax.optim.topologies import top_kast as top_kast_lib
from powerprop_jax.optim.topologies.counts import Leaves, Patterned
from powerprop_jax.optim.topologies.drop_grow import Growth
from powerprop_jax.optim.topologies.gradual import Scope
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topologies.top_kast import Norm
from powerprop_jax.optim.topology import Regrow

_Arguments = ParamSpec('_Arguments')
_Made = TypeVar('_Made')


class Pruning(Patterned, total=False):
  """How gradual_pruning and one_shot_pruning rank; see topologies.gradual."""

  scope: Scope
  normalise: bool


class Moving(Patterned, total=False):
  """How SET and RigL move connections; see topologies.drop_grow."""

  growth: Growth
  ablation: Ablation | None
  replaces_step: bool


class Momentum(Patterned, total=False):
  """How SNFS ranks and shares out; see topologies.snfs."""

  momentum: float
  second_moment: float | None
  redistribute: bool
  replaces_step: bool


class Threshold(Leaves, total=False):
  """How many connections DSR drops; see topologies.dsr."""

  num_dropped: int
  threshold: float
  replaces_step: bool


class Exploring(Leaves, total=False):
  """What pulls at weights outside the forward set; see topologies.top_kast."""

  penalty: float
  norm: Norm


def static(
  inner: optax.GradientTransformation,
  sparsity: Sparsity | None = None,
  *,
  masks: Masks | None = None,
  key: int | jax.Array = 0,
  **options: Unpack[Patterned],
) -> optax.GradientTransformationExtraArgs:
  """Trains a fixed set of connections: random ones, or those of given masks.

  Args:
    masks: instead of a sparsity, which is of random masks.
    **options: of random masks: structure, distribution (erk), select.

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
  # Built in any case, for it checks the options.
  at_random = fixed.at_random(0.0 if sparsity is None else sparsity, **options)
  if masks is None:
    return sparsify(inner, at_random, key=key)
  if options.get('structure', 'unstructured') != 'unstructured':
    raise ValueError(
      "structure='constant_fan_in' draws random masks and needs a sparsity, "
      'got masks. Leave structure out, these masks are taken as they are.'
    )
  return sparsify(inner, fixed.given(masks), key=key)


def gradual_pruning(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  start: int,
  stop: int,
  period: int = 100,
  power: float = 3,
  **options: Unpack[Pruning],
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning along a polynomial, dense until start, sparse from stop.

  Args:
    start: the step at which the polynomial leaves 0, at least 0.
    stop: the step at which the full sparsity is reached, after start.
    period: weights are removed every so many steps after start, and at stop.
    power: of the polynomial.
    **options: scope, structure, distribution (uniform), normalise, select; see
      topologies.gradual.

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

  topology = gradual.gradual(
    sparsity, lambda step: curve(step) / 0.5, when, **options
  )
  return sparsify(inner, topology)


def one_shot_pruning(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  step: int,
  **options: Unpack[Pruning],
) -> optax.GradientTransformationExtraArgs:
  """Magnitude pruning at one step of training, and retraining from there.

  Args:
    step: the first update that is sparse, at least 0.
    **options: scope, structure, distribution (uniform), normalise, select; see
      topologies.gradual.

  Example:
    >>> tx = one_shot_pruning(optax.sgd(0.1), 0.9, step=5_000)
  """
  done = lambda step: jnp.ones([], jnp.float32)
  topology = gradual.gradual(sparsity, done, schedules.at(step), **options)
  return sparsify(inner, topology)


def sparse_evolution(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  stop: int,
  start: int | None = None,
  period: int = 100,
  drop_fraction: float | Schedule = 0.3,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
  **options: Unpack[Moving],
) -> optax.GradientTransformationExtraArgs:
  """SET: drops the smallest weights, grows as many at random.

  Connections move at multiples of period in [start, stop).

  Args:
    drop_fraction: share of each layer's connections that moves, in (0, 1); a
      number falls along half a cosine to 0 at stop, f(t) = f₀ (1 + cos(π t /
      stop)) / 2, a schedule is taken as it is.
    **options: growth, structure, ablation, distribution (erk), select,
      replaces_step; see topologies.drop_grow.

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
  topology = drop_grow.drop_grow(
    sparsity,
    _when(start, stop, period),
    _annealed(drop_fraction, stop),
    **options,
  )
  return sparsify(inner, topology, regrow=regrow, key=key)


def _arguments_of(
  known: Callable[_Arguments, _Made],
) -> Callable[[Callable[..., _Made]], Callable[_Arguments, _Made]]:
  """Gives a function the arguments of another, for type checkers and help."""

  def decorate(fn: Callable[..., _Made]) -> Callable[_Arguments, _Made]:
    fn.__signature__ = inspect.signature(known)  # type: ignore[attr-defined]
    return fn

  return decorate


@_arguments_of(sparse_evolution)
def rigl(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
  """RigL: drops the smallest weights, grows where the gradient is largest.

  The arguments are those of sparse_evolution; as in algorithm 1, weights stand
  still where connections move, unless replaces_step is False.

  Args:
    stop: T_end; the paper stops after three quarters of training.
    period: ΔT.

  Note:
    The authors' code moves connections at step 0 already (start=0), lets stop
    itself count, and anneals from start; PyTorch ports begin at ΔT, as here,
    since at step 0 there is nothing to learn from magnitudes. Their code counts
    the steps that a rewiring replaces, 1 % at a period of 100.

  Example:
    >>> tx = rigl(optax.sgd(0.1, momentum=0.9), 0.9, stop=7_500)

  Source:
    Evci et al., Rigging the lottery, 2020, algorithm 1
    (https://arxiv.org/abs/1911.11134); with constant fan-in, Lasby et al.,
    Dynamic sparse training with structured sparsity, 2024
    (https://arxiv.org/abs/2305.02299).
  """
  options.setdefault('growth', drop_grow.by_gradient)
  options.setdefault('replaces_step', True)
  return sparse_evolution(*args, **options)


def snfs(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  period: int,
  stop: int,
  start: int | None = None,
  drop_fraction: float | Schedule = 0.5,
  min_drop_fraction: float = 0.005,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
  **options: Unpack[Momentum],
) -> optax.GradientTransformationExtraArgs:
  """SNFS, sparse momentum: moves connections to where momentum is largest.

  Connections move at multiples of period in [start, stop). It holds one dense
  float32 momentum, two with second_moment.

  Args:
    period: the steps of an epoch.
    stop: the steps of all epochs, so that the end of the last does not count.
    drop_fraction: share of a layer's connections that is dropped, in (0, 1); a
      number falls along half a cosine to min_drop_fraction at stop, a schedule
      is taken as it is.
    min_drop_fraction: where the cosine ends, in [0, drop_fraction].
    **options: momentum, second_moment, redistribute, structure, distribution
      (uniform), select, replaces_step; see topologies.snfs.

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
  topology = snfs_lib.snfs(
    sparsity,
    _when(start, stop, period),
    _annealed(drop_fraction, stop, min_drop_fraction),
    **options,
  )
  return sparsify(inner, topology, regrow=regrow, key=key)


def dsr(
  inner: optax.GradientTransformation,
  sparsity: Sparsity,
  *,
  period: int,
  stop: int,
  start: int | None = None,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
  **options: Unpack[Threshold],
) -> optax.GradientTransformationExtraArgs:
  """DSR: drops below a threshold for all layers, grows as many at random.

  Connections move at multiples of period in [start, stop).

  Args:
    **options: num_dropped, threshold, distribution (erk), select,
      replaces_step; see topologies.dsr.

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
  topology = dsr_lib.dsr(sparsity, _when(start, stop, period), **options)
  return sparsify(inner, topology, regrow=regrow, key=key)


def top_kast(
  inner: optax.GradientTransformation,
  sparsity: float,
  backward_sparsity: float,
  *,
  stop: int | None = None,
  period: int = 1,
  **options: Unpack[Exploring],
) -> optax.GradientTransformationExtraArgs:
  """Top-KAST: computes with the largest weights, trains some more.

  Args:
    sparsity: share of zeros that the network computes with, in [0, 1).
    backward_sparsity: share of weights that are not trained; at most sparsity.
    stop: first step at which both sets no longer change; None is never.
    period: both are chosen anew at multiples of it.
    **options: penalty, norm, distribution (erk, of both), select; see
      topologies.top_kast.

  Note:
    The paper chooses the sets at every step and reports that every 100 steps
    do as well; that is much faster.

  Example:
    >>> tx = top_kast(optax.sgd(0.1), 0.9, 0.8, period=100)

  Source:
    Jayakumar et al., Top-KAST: Top-K Always Sparse Training, 2020
    (https://arxiv.org/abs/2106.03517).
  """
  when = schedules.every(period, stop=stop)
  topology = top_kast_lib.top_kast(sparsity, backward_sparsity, when, **options)
  return sparsify(inner, topology)


def _when(start: int | None, stop: int, period: int) -> When:
  """Multiples of period in [start, stop), of which there must be one."""
  start = period if start is None else start
  for name, value in (('start', start), ('stop', stop), ('period', period)):
    least = 1 if name == 'period' else 0
    if operator.index(value) < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  first = -(-start // period) * period
  if first >= stop:
    raise ValueError(
      f'nothing would ever be rewired: the multiples of {period=} in '
      f'[{start=}, {stop=}) are none. Choose a later stop or a shorter period.'
    )
  return schedules.every(period, start=start, stop=stop)


def _annealed(
  drop_fraction: float | Schedule, stop: int, least: float = 0
) -> Schedule:
  """A schedule as it is; a number falls along half a cosine until stop."""
  counts.check_fraction(drop_fraction, 'drop_fraction')
  if callable(drop_fraction):
    return drop_fraction
  if least != 0 and not 0 <= least <= drop_fraction:
    raise ValueError(
      f'min_drop_fraction must be in [0, drop_fraction = {drop_fraction}], '
      f'got {least}.'
    )
  cosine: Schedule = optax.cosine_decay_schedule(
    drop_fraction, stop, least / drop_fraction
  )
  return lambda step: jnp.asarray(cosine(step), jnp.float32)
