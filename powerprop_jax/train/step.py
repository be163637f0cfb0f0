"""Training and evaluation steps, many per dispatch.

The gradient is taken at θ, not through ψ: the optimiser inside powerprop wants
∂L/∂θ, which is finite at φ = 0 too. Data is an argument of every compiled
function; closed over, it would become a constant of the program.

What is random in a step depends on the key of the run and the number of the
step alone, so that a resumed run repeats it.
"""

from collections.abc import Callable
import dataclasses
from typing import TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from powerprop_jax.optim import sparsify, views
from powerprop_jax.train import evaluate
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.state import TrainState

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
Advance = Callable[[TrainState, Arrays, jax.Array], tuple[TrainState, Metrics]]
Prepare: TypeAlias = splits.Prepare
# (key, images as they are stored) -> images of the same shape and dtype.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
  """A step in two halves: step(state, images, labels) -> (state, metrics).

  Attributes:
    gradient: (state, images, labels) -> (∂L/∂θ, net_state, metrics); a fourth
      argument is θ, for those who have it already.
    update: (state, ∂L/∂θ, net_state) -> state.

  Example:
    >>> step = TrainStep(lambda x, *_: (1.0, {}, {}), lambda x, g, _: x - g)
    >>> step(3.0, None, None)
    (2.0, {})
  """

  gradient: Callable[..., tuple[hk.Params, hk.State, Metrics]]
  update: Callable[[TrainState, hk.Params, hk.State], TrainState]

  def __call__(
    self, state: TrainState, images: jax.Array, labels: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """Both halves, one after the other."""
    grads, net_state, metrics = self.gradient(state, images, labels)
    return self.update(state, grads, net_state), metrics


def make_step(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  *,
  prepare: Prepare = splits.to_float,
  augment: Augment | None = None,
  label_smoothing: float = 0.0,
) -> TrainStep:
  """One step of training: step(state, images, labels) -> (state, metrics).

  Args:
    prepare: turns images into what the network sees, e.g. data.normalise(…).
    augment: (key, images) -> images, before that; None leaves them alone.
    label_smoothing: share of each label that is spread over all classes alike,
      in [0, 1).

  Returns:
    A pure function in two halves. Images are [batch, height, width, channels],
    float or uint8; labels [batch], integer. Metrics are the mean cross-entropy
    loss, in nats, and the accuracy of the batch before the step.

  Raises:
    ValueError: if label_smoothing is out of range.
  """
  gradient_at = _make_gradient(net, prepare, augment, label_smoothing)
  # What sparsify holds at zero in the state's own φ need not be masked again. A
  # wrapper around it may leave no trace in the state, and change what it holds.
  pinned = sparsify.parts(tx) is not None

  def gradient(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    theta: hk.Params | None = None,
  ) -> tuple[hk.Params, hk.State, Metrics]:
    if theta is None:
      theta = views.effective_params(state.phi, state.opt_state, pinned=pinned)
    return gradient_at(theta, state, images, labels)

  def update(
    state: TrainState, grads: hk.Params, net_state: hk.State
  ) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, state.phi)
    return state._replace(
      step=state.step + 1,
      phi=optax.apply_updates(state.phi, updates),
      net_state=net_state,
      opt_state=opt_state,
    )

  return TrainStep(gradient, update)


def make_advance(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  *,
  prepare: Prepare = splits.to_float,
  augment: Augment | None = None,
) -> Advance:
  """Many steps in one dispatch: advance(state, arrays, indices).

  Same numbers as make_step called again and again.

  Returns:
    A function to jit with its first argument donated. indices is
    int32[num_steps, batch], rows of the data to train on; metrics are the means
    over these steps.
  """
  step = make_step(net, tx, prepare=prepare, augment=augment)

  def advance(
    state: TrainState, arrays: Arrays, indices: jax.Array
  ) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
      return step(state, arrays.images[batch], arrays.labels[batch])

    state, metrics = jax.lax.scan(body, state, indices)
    return state, means(metrics)

  return advance


def means(metrics: Metrics) -> Metrics:
  """Means over the steps, the first axis."""
  return jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)


def _make_gradient(
  net: hk.TransformedWithState,
  prepare: Prepare,
  augment: Augment | None,
  label_smoothing: float = 0.0,
) -> Callable[..., tuple[hk.Params, hk.State, Metrics]]:
  """(theta, state, images, labels) -> (∂L/∂θ, net_state, metrics)."""
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'label_smoothing must be in [0, 1), got {label_smoothing:g}.'
    )

  def loss_fn(
    theta: hk.Params,
    net_state: hk.State,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[jax.Array, tuple[hk.State, jax.Array]]:
    logits, net_state = net.apply(
      theta, net_state, key, images, is_training=True
    )
    losses = evaluate.cross_entropy(logits, labels, label_smoothing)
    return jnp.mean(losses), (net_state, logits)

  def gradient(
    theta: hk.Params, state: TrainState, images: jax.Array, labels: jax.Array
  ) -> tuple[hk.Params, hk.State, Metrics]:
    # What the network does not use of its key is not computed.
    step_key = jax.random.fold_in(state.key, state.step)
    key, augment_key = jax.random.split(step_key)
    if augment is not None:
      images = augment(augment_key, images)
    (loss, (net_state, logits)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(theta, state.net_state, key, prepare(images), labels)
    correct = jnp.argmax(logits, -1) == labels
    accuracy = jnp.mean(correct.astype(jnp.float32))
    return grads, net_state, {'loss': loss, 'accuracy': accuracy}

  return gradient
