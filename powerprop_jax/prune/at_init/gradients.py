"""Gradients and Hessian products of a loss over more data than fits at once.

A batch at a time: the program of one batch adds to a running sum, in float32,
so that memory does not grow with their number. Batches count by their numbers
of examples, so that how the data is cut up does not matter.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core.trees import Params, Tree

Batch: TypeAlias = tuple[Any, ...]
# What a loss takes after theta, batch by batch: a list, or an iterator.
Batches: TypeAlias = Iterable[Batch]
# (theta, *batch) -> scalar, the mean over the examples of the batch.
Loss: TypeAlias = Callable[..., jax.Array]


def classification_loss(
  logits_fn: Callable[[Params, jax.Array], jax.Array],
  *,
  temperature: float = 1.0,
  published_nll: bool = False,
) -> Loss:
  """A loss for the scores below: mean cross-entropy of logits / temperature.

  Build it once: programs are compiled again for every new loss.

  loss_fn(theta, images, labels), with integer labels [N].

  Args:
    logits_fn: (theta, images) -> logits [N, classes]. For a network with batch
      normalisation, that of a training step, such as
      lambda theta, images: net.apply(theta, net_state, None, images, True)[0].
    temperature: what logits are divided by, above 0. GraSP takes 200.
    published_nll: whether to leave out the normalisation of the logits, -z_y in
      place of -z_y + log Σ exp(z). The code that was published with GraSP and
      with FORCE hands raw logits to a loss of log-probabilities, and so ranks
      by this one.

  Example:
    >>> loss_fn = classification_loss(lambda theta, images: images @ theta)
    >>> loss_fn(jnp.zeros((3, 2)), jnp.ones((5, 3)), jnp.zeros(5, int))
    Array(0.6931472, dtype=float32)

  Source:
    Wang et al., Picking winning tickets before training by preserving gradient
    flow, 2020 (https://arxiv.org/abs/2002.07376): the temperature.
  """
  if not temperature > 0:
    raise ValueError(f'temperature must be above 0, got {temperature}.')

  def loss_fn(theta: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits_fn(theta, images) / temperature
    if published_nll:
      at_label = jnp.take_along_axis(logits, labels[:, jnp.newaxis], axis=1)
      return -jnp.mean(at_label)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  return loss_fn


def mean_gradient(loss_fn: Loss, theta: Params, batches: Batches) -> Tree:
  """∂L/∂θ of the loss over all batches.

  Args:
    batches: as for snip, with the examples along the first axis of the first
      array. One program for each shape of a batch is traced, and used again
      whenever the same loss_fn comes back.

  Returns:
    float32 gradients like theta.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean(theta * x)
    >>> batches = [(jnp.array([1., 2.]),), (jnp.array([6.]),)]
    >>> mean_gradient(loss_fn, jnp.array(1.), batches)
    Array(3., dtype=float32)
  """
  total = jax.tree.map(lambda t: jnp.zeros_like(t, jnp.float32), theta)
  count = 0
  for batch in batches:
    count += _num_examples(batch)
    total = _add(loss_fn, total, theta, batch)
  if not count:
    raise ValueError(
      'batches is empty: there is no data to compute a gradient from. Pass a '
      'list of tuples; an iterator can be used only once.'
    )
  return jax.tree.map(lambda t: t / count, total)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(loss_fn: Loss, total: Tree, theta: Params, batch: Batch) -> Tree:
  means, weight = jax.grad(loss_fn)(theta, *batch), _num_examples(batch)
  return jax.tree.map(
    lambda t, m: t + weight * m.astype(jnp.float32), total, means
  )


def mean_curvature(
  loss_fn: Loss, theta: Params, direction: Tree, batches: Batches
) -> Tree:
  """H v, the second derivative of the loss over all batches times a direction.

  The gradient of ⟨∂L/∂θ, v⟩: in reverse mode twice, which every layer has. The
  direction v and the products, float32, are like theta; all else is as for
  mean_gradient.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean(x) * jnp.sum(theta**2)
    >>> batches = [(jnp.array([1., 2.]),), (jnp.array([6.]),)]
    >>> mean_curvature(loss_fn, jnp.ones(2), jnp.array([1., 10.]), batches)
    Array([ 6., 60.], dtype=float32)
  """
  slope = _Slope(loss_fn)
  return mean_gradient(slope, theta, _with_last(batches, direction))


@dataclasses.dataclass(frozen=True)
class _Slope:
  """⟨∂L/∂θ, v⟩ of a loss on a batch whose last element is v.

  Equal for equal losses, so that a program of one is used again.
  """

  loss_fn: Loss

  def __call__(self, theta: Params, *batch: Any) -> jax.Array:
    *examples, direction = batch
    grads = jax.grad(self.loss_fn)(theta, *examples)
    products = jax.tree.map(
      lambda g, v: jnp.sum(g.astype(jnp.float32) * v.astype(jnp.float32)),
      grads,
      direction,
    )
    return sum(jax.tree.leaves(products), jnp.zeros([], jnp.float32))


def _with_last(batches: Batches, last: Tree) -> Batches:
  for batch in batches:
    _num_examples(batch)  # refuses what is no batch
    yield (*batch, last)


def _num_examples(batch: Batch) -> int:
  if not isinstance(batch, tuple):
    raise TypeError(
      'each batch must be a tuple of what loss_fn takes after theta, got a '
      f'{type(batch).__name__}. For a single batch pass [(images, labels)].'
    )
  arrays = jax.tree.leaves(batch)
  shape = jnp.shape(arrays[0]) if arrays else ()
  if not shape or not shape[0]:
    raise ValueError(
      'the first array of a batch must have its examples, at least one, along '
      f'its first axis; got the shape {shape}.'
    )
  return int(shape[0])
