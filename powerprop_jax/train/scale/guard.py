"""Steps that leave the state alone where the numbers are not finite.

A single bad gradient, from a loss that overflows in half precision or from
defective hardware, would turn every weight into NaN and the run into waste. The
guard throws such a step away, counts it, and lets the next batch try.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.train.step import Metrics, Step, TrainState, TrainStep

GuardedStep = Callable[
  ['GuardedState', jax.Array, jax.Array], tuple['GuardedState', Metrics]
]


# What a guarded step adds to the metrics.
COUNTS = ('num_skipped', 'num_in_a_row')


class GuardedState(NamedTuple):
  """A training state, and how often it was left alone.

  Attributes:
    train: the state. Its step counts the steps that were made; with num_skipped
      it is the number of batches seen.
    num_skipped: steps that were skipped in all, int32 scalar.
    num_in_a_row: those since the last sound step, int32 scalar. A step that was
      made and left weights that are not finite is one of them.
  """

  train: TrainState
  num_skipped: jax.Array
  num_in_a_row: jax.Array


def create(train: TrainState) -> GuardedState:
  """A state of which no step was skipped; the training state is not copied.

  Example:
    >>> int(create(train=()).num_skipped)
    0
  """
  # Two arrays: one that appears twice could not be donated.
  return GuardedState(train, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))


def guarded(step: Step) -> GuardedStep:
  """A step that is skipped where what it gives is not finite.

  A skipped step leaves the whole state as it was, masks, counts of steps and
  all, and the batch is gone. A step of step.make_step is skipped if the loss,
  a gradient or the network's own state, such as norm statistics, is not
  finite; no update is made then. Should the update of a finite gradient make a
  weight infinite, the state stays so: that step counts as one in the row, and
  all that follow are skipped. Any other step is skipped if the loss is not
  finite, or a leaf of the state that was finite before.

  Args:
    step: from step.make_step, or any pure function (state, images, labels) ->
      (state, metrics) with a scalar 'loss' among its metrics.

  Returns:
    A pure function over a GuardedState, to jit with its first argument donated;
    or for sharding.on_mesh, where all devices come to the same decision. The
    metrics are those of step and the two counts of the new state, by their
    names.

  Note:
    A leaf is finite if its sum in float32 is, and a gradient if its sum of
    squares is, which second moments need too. That is the quickest to compute
    and holds for all but weights of 1e30 and gradients of 1e19.
    The update is a loop of at most one turn, which works in place. A choice
    between an old and a new state needs both: with sparse methods, which change
    masks in place, that took 8 to 10 % of a step of ResNet-50 on a CPU, and
    still does with steps of your own. On a GPU the host waits for the decision,
    as it does for that to rewire; what this costs has not been measured.
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
    if isinstance(step, TrainStep):
      taken = _update_if_sound(step, state.train, images, labels)
    else:
      taken = _choose(step, state.train, images, labels)
    after = GuardedState(
      train=taken.train,
      num_skipped=state.num_skipped + (~taken.is_made).astype(jnp.int32),
      num_in_a_row=jnp.where(taken.is_sound, 0, state.num_in_a_row + 1),
    )
    counts = after._asdict()
    return after, {**taken.metrics, **{name: counts[name] for name in COUNTS}}

  return guarded_step


@jax.jit
def is_finite(state: GuardedState) -> jax.Array:
  """Whether weights are finite, the same on all devices and hosts.

  Example:
    >>> from powerprop_jax.train.step import TrainState
    >>> train = TrainState(0, {'w': jnp.array([1.0, jnp.inf])}, {}, (), 0)
    >>> is_finite(create(train))
    Array(False, dtype=bool)
  """
  return trees.all_finite(state.train.phi)


class _Taken(NamedTuple):
  """What came of a step: whether it was made, and left finite weights."""

  train: TrainState
  metrics: Metrics
  is_made: jax.Array
  is_sound: jax.Array


def _update_if_sound(
  step: TrainStep, train: TrainState, images: jax.Array, labels: jax.Array
) -> _Taken:
  """Looks at what the first half of a step gives, before the second."""
  given = grads, net_state, metrics = step.gradient(train, images, labels)
  squares = (jnp.square(g.astype(jnp.float32)) for g in _float_leaves(grads))
  sums = map(_sum, (*squares, *_float_leaves(net_state)))
  is_made = _all(map(jnp.isfinite, (metrics['loss'], *sums)))

  def body(carry: Tree) -> Any:
    # XLA moves what a loop computes from its surroundings out of the loop.
    (_, train, _), (grads, net_state, _) = jax.lax.optimization_barrier(
      (carry, given)
    )
    train = step.update(train, grads, net_state)
    is_sound = _all(map(jnp.isfinite, map(_sum, _float_leaves(train.phi))))
    return jnp.asarray(False), train, is_sound

  _, train, is_sound = jax.lax.while_loop(
    lambda carry: carry[0], body, (is_made, train, jnp.asarray(False))
  )
  return _Taken(train, metrics, is_made, is_sound)


def _choose(
  step: Step, old: TrainState, images: jax.Array, labels: jax.Array
) -> _Taken:
  """Makes a step, and takes the old state if the new one is not finite."""
  new, metrics = step(old, images, labels)
  is_sound = jnp.isfinite(metrics['loss']) & _all(
    jnp.isfinite(_sum(n)) | ~jnp.isfinite(_sum(o))  # some states start with ∞
    for o, n in zip(_float_leaves(old), _float_leaves(new), strict=True)
  )
  train = jax.tree.map(lambda n, o: jnp.where(is_sound, n, o), new, old)
  return _Taken(train, metrics, is_sound, is_sound)


def _float_leaves(tree: Tree) -> list[jax.Array]:
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _sum(leaf: jax.Array) -> jax.Array:
  return jnp.sum(leaf, dtype=jnp.float32)


def _all(checks: Iterable[jax.Array]) -> jax.Array:
  """Whether all scalars are true.

  The smallest of them, by sorting: XLA's CPU compiler would copy any other way
  to combine them, with the sums, into each use of the result, and take five
  minutes for the selects of ResNet-50 instead of a quarter of one.
  """
  return jax.lax.sort(jnp.stack([jnp.asarray(True), *checks]))[0]
