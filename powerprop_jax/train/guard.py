"""Steps that leave the state alone where the numbers are not finite.

A single bad gradient, from a loss that overflows in half precision or from
defective hardware, would turn every weight into NaN and the run into waste. The
guard throws such a step away, counts it, and lets the next batch try.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.train.state import TrainState
from powerprop_jax.train.step import Metrics, Step

GuardedStep = Callable[
  ['GuardedState', jax.Array, jax.Array], tuple['GuardedState', Metrics]
]


class GuardedState(NamedTuple):
  """A training state, and how often it was left alone.

  Attributes:
    train: the state. Its step counts the steps that were made; with num_skipped
      it is the number of batches seen.
    num_skipped: steps that were skipped in all, int32 scalar.
    num_in_a_row: those since the last step that was made, int32 scalar.
  """

  train: TrainState
  num_skipped: jax.Array
  num_in_a_row: jax.Array


def create(train: TrainState) -> GuardedState:
  """A state of which no step was skipped.

  Args:
    train: the training state, which is not copied.

  Returns:
    The state that guarded steps take.

  Example:
    >>> int(create(train=()).num_skipped)
    0
  """
  # Two arrays: one that appears twice could not be donated.
  return GuardedState(train, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))


def guarded(step: Step) -> GuardedStep:
  """A step that is skipped where what it gives is not finite.

  A step counts if the loss is finite and so is every leaf of the state that was
  finite before: weights, norm statistics, and what the optimiser keeps of
  gradients. Otherwise the whole state stays as it was, masks, counts of steps
  and all, and the batch is gone.

  Args:
    step: from step.make_step, or any pure function (state, images, labels) ->
      (state, metrics) with a scalar 'loss' among its metrics.

  Returns:
    A pure function over a GuardedState, to jit with its first argument donated;
    or for sharding.on_mesh, where all devices come to the same decision. The
    metrics are those of step and the two counts of the new state, by their
    names.

  Note:
    A leaf is finite if its sum in float32 is, which is the quickest to compute
    and holds for all but weights of 1e30 and more.
    On a CPU a select takes as long as lax.cond, which copies the state too; on
    a GPU it does not make the host wait for the decision.
    Learning rates follow the steps that were made, as they are counted in the
    state of the optimiser.

  Example:
    >>> def step(x, images, labels):
    ...   return x + 1, {'loss': images / labels}
    >>> state = create(jnp.float32(5))
    >>> step = guarded(step)
    >>> state, metrics = step(state, jnp.float32(1), jnp.float32(0))
    >>> float(metrics['loss']), float(state.train), int(state.num_skipped)
    (inf, 5.0, 1)
    >>> state, metrics = step(state, jnp.float32(1), jnp.float32(2))
    >>> float(metrics['loss']), float(state.train), int(state.num_in_a_row)
    (0.5, 6.0, 0)
  """

  def guarded_step(
    state: GuardedState, images: jax.Array, labels: jax.Array
  ) -> tuple[GuardedState, Metrics]:
    train, metrics = step(state.train, images, labels)
    is_sound = jnp.isfinite(metrics['loss']) & _stays_finite(state.train, train)
    skipped = (~is_sound).astype(jnp.int32)
    after = GuardedState(
      train=_select(is_sound, train, state.train),
      num_skipped=state.num_skipped + skipped,
      num_in_a_row=jnp.where(is_sound, 0, state.num_in_a_row + 1),
    )
    counts = {
      'num_skipped': after.num_skipped,
      'num_in_a_row': after.num_in_a_row,
    }
    return after, {**metrics, **counts}

  return guarded_step


def _stays_finite(old: Any, new: Any) -> jax.Array:
  """Whether no leaf stopped being finite; some states start with ∞."""
  is_finite = lambda x: jnp.isfinite(jnp.sum(x, dtype=jnp.float32))
  checks = [
    is_finite(n) | ~is_finite(o)
    for o, n in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    if jnp.issubdtype(n.dtype, jnp.inexact)
  ]
  if not checks:
    return jnp.asarray(True)
  # The smallest of all, by sorting: XLA's CPU compiler would copy any other
  # way to combine them, with the sums, into each select of _select, and take
  # five minutes for ResNet-50 instead of a quarter of one.
  return jax.lax.sort(jnp.stack(checks))[0]


def _select(is_new: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(is_new, n, o), new, old)
