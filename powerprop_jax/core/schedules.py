"""Functions of the training step: how sparse to be, and when to act.

A Schedule maps a step to a sparsity, a float32 scalar; a When maps a step to
yes or no, a bool scalar. Both take a Python integer or a traced int32 scalar
and are safe inside jit. What cannot be (a sparsity outside [0, 1), a negative
step, a stop that is not after start) is a ValueError as they are built.
"""

from collections.abc import Callable
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]  # step -> sparsity
When = Callable[[jax.typing.ArrayLike], jax.Array]  # step -> bool


def constant(sparsity: float) -> Schedule:
  """The same sparsity at every step.

  Example:
    >>> constant(0.5)(7)
    Array(0.5, dtype=float32)
  """
  masks.check_sparsity(sparsity)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    del step
    return jnp.asarray(sparsity, jnp.float32)

  return schedule


def one_shot(sparsity: float, step: int) -> Schedule:
  """0 before a step, and the full sparsity from that step on.

  Example:
    >>> schedule = one_shot(0.5, step=100)
    >>> float(schedule(99)), float(schedule(100))
    (0.0, 0.5)
  """
  masks.check_sparsity(sparsity)
  first = _check_step('step', step)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    due = jnp.asarray(step) >= first
    return jnp.where(due, jnp.float32(sparsity), jnp.float32(0))

  return schedule


def polynomial(
  sparsity: float, start: int, stop: int, power: float = 3
) -> Schedule:
  """Rises from 0 to sparsity between two steps, fast at first.

  s_t = s_f (1 - (1 - (t - t_0) / (t_1 - t_0))^power), 0 until start, t_0, and
  the full sparsity s_f from stop, t_1, on. Most weights go early, while the
  network can still recover. The power is 3 in the paper; 1 is a straight line.

  Note:
    Equation 1 of the source with s_i = 0. There the masks change every Δt
    steps; here that is the business of a When, such as every.

  Example:
    >>> schedule = polynomial(0.8, start=0, stop=100)
    >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 150)]
    [0.0, 0.7, 0.8, 0.8]

  Source:
    Zhu & Gupta, To prune, or not to prune, 2017, equation 1
    (https://arxiv.org/abs/1710.01878).
  """
  masks.check_sparsity(sparsity)
  start, stop = _check_step('start', start), _check_step('stop', stop)
  if stop <= start:
    raise ValueError(f'stop must be after start, got {start=} and {stop=}.')
  if not (power > 0 and math.isfinite(power)):
    raise ValueError(f'power must be a positive number, got {power}.')

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # Subtract as integers: float32 does not tell large steps apart.
    elapsed = jnp.asarray(jnp.asarray(step) - start, jnp.float32)
    progress = jnp.clip(elapsed / (stop - start), 0, 1)
    return jnp.float32(sparsity) * (1 - (1 - progress) ** power)

  return schedule


def every(
  period: int, *, start: int | None = None, stop: int | None = None
) -> When:
  """True at multiples of period in [start, stop).

  Step 0 is one of them. start=None is 0, stop=None is never.

  Example:
    >>> when = every(100, start=50, stop=300)
    >>> [step for step in range(0, 501, 50) if when(step)]
    [100, 200]
  """
  if operator.index(period) < 1:
    raise ValueError(f'period must be at least 1, got {period}.')
  first = _check_step('start', 0 if start is None else start)
  if stop is not None and _check_step('stop', stop) <= first:
    raise ValueError(f'stop must be after start, got start={first}, {stop=}.')

  def when(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    due = (step % period == 0) & (step >= first)
    return due if stop is None else due & (step < stop)

  return when


def at(*steps: int) -> When:
  """True at the given steps only, of which there is at least one.

  Example:
    >>> when = at(10, 40)
    >>> [step for step in range(50) if when(step)]
    [10, 40]
  """
  if not steps:
    raise ValueError('at needs at least one step, got none; see never.')
  listed = np.array([_check_step('step', step) for step in steps], np.int32)

  def when(step: jax.typing.ArrayLike) -> jax.Array:
    return jnp.any(jnp.asarray(step) == listed)

  return when


def never(step: jax.typing.ArrayLike) -> jax.Array:
  """False at every step.

  Example:
    >>> bool(never(0))
    False
  """
  del step
  return jnp.asarray(False)


def _check_step(name: str, step: int) -> int:
  step = operator.index(step)  # a TypeError for 1.5
  if step < 0:
    raise ValueError(f'{name} must be at least 0, got {step}.')
  return step
