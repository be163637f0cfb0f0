"""The state of a training run, and the step that turns it into the next.

The gradient is taken at θ, not through ψ: the optimiser inside powerprop wants
∂L/∂θ, which is finite at φ = 0 too. Data is an argument of every compiled
function; closed over, it would become a constant of the program.

What is random in a step depends on the key of the run and the number of the
step alone, so that a resumed run repeats it.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.optim import sparsify, views
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Prepare


class TrainState(NamedTuple):
  """What one training step turns into the next; all that a checkpoint holds.

  Attributes:
    step: training steps done, int32 scalar.
    phi: latent parameters.
    net_state: the network's own state, such as batch-norm averages.
    opt_state: state of the gradient transformation; holds α and the masks.
    key: typed PRNG key of the run, which never changes; each step derives its
      own from it, for augmentation and dropout.
  """

  step: jax.Array
  phi: hk.Params
  net_state: hk.State
  opt_state: OptState
  key: jax.Array

  @property
  def theta(self) -> hk.Params:
    """Effective parameters, what the network computes with."""
    return views.effective_params(self.phi, self.opt_state)


S = TypeVar('S')
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
Advance = Callable[[TrainState, Arrays, jax.Array], tuple[TrainState, Metrics]]
# (key, images as they are stored) -> images of the same shape and dtype.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def create(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  key: jax.Array,
  images: jax.Array,
) -> TrainState:
  """The state before the first step, with a network that is initialised.

  Args:
    net: a network from nets.make: net.apply(theta, net_state, key, images,
      is_training) gives (logits, net_state).
    key: PRNG key of the initial weights and of all that is random later; the
      same key gives the same function at step 0 for every α.
    images: a batch of inputs, float, for its shape.
  """
  theta, net_state = net.init(key, images, is_training=True)
  phi, opt_state = views.init(tx, theta)
  # The key is of another stream than the weights, and an array of its own.
  key = jax.random.fold_in(key, 1)
  return TrainState(jnp.zeros([], jnp.int32), phi, net_state, opt_state, key)


def shapes(net: hk.TransformedWithState, images: Tree) -> Params:
  """Shapes of the parameters of a network for images, or their shape."""
  init = functools.partial(net.init, is_training=True)
  theta, _ = jax.eval_shape(init, jax.random.key(0), images)
  return theta


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
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'label_smoothing must be in [0, 1), got {label_smoothing:g}.'
    )
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
    # What the network does not use of its key is not computed.
    step_key = jax.random.fold_in(state.key, state.step)
    key, augment_key = jax.random.split(step_key)
    if augment is not None:
      images = augment(augment_key, images)
    inputs = prepare(images)

    def loss_fn(
      theta: hk.Params,
    ) -> tuple[jax.Array, tuple[hk.State, jax.Array]]:
      logits, net_state = net.apply(
        theta, state.net_state, key, inputs, is_training=True
      )
      losses = cross_entropy(logits, labels, label_smoothing)
      return jnp.mean(losses), (net_state, logits)

    (loss, (net_state, logits)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(theta)
    correct = jnp.argmax(logits, -1) == labels
    accuracy = jnp.mean(correct.astype(jnp.float32))
    return grads, net_state, {'loss': loss, 'accuracy': accuracy}

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


def cross_entropy(
  logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy of each example, in nats.

  Args:
    logits: [batch, classes].
    labels: [batch], integer.
    smoothing: share of each label that is spread over all classes alike.

  Example:
    >>> cross_entropy(jnp.zeros((1, 2)), jnp.array([1]))
    Array([0.6931472], dtype=float32)
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if not smoothing:
    return losses
  # Cross-entropy is linear in the labels.
  spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
  return (1 - smoothing) * losses + smoothing * spread


def make_advance(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  **options: Any,
) -> Advance:
  """Many steps in one dispatch; the options are those of make_step."""
  return repeated(make_step(net, tx, **options))


def repeated(
  step: Callable[[S, jax.Array, jax.Array], tuple[S, Metrics]],
) -> Callable[[S, Arrays, jax.Array], tuple[S, Metrics]]:
  """A step, again and again: advance(state, arrays, indices).

  Returns:
    A function to jit with its first argument donated. indices is
    int32[num_steps, batch], rows of the data to train on; metrics are the means
    over these steps.
  """

  def advance(
    state: S, arrays: Arrays, indices: jax.Array
  ) -> tuple[S, Metrics]:
    def body(state: S, batch: jax.Array) -> tuple[S, Metrics]:
      return step(state, arrays.images[batch], arrays.labels[batch])

    state, metrics = jax.lax.scan(body, state, indices)
    return state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

  return advance
