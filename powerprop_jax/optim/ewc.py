"""Elastic weight consolidation: a penalty on moving what earlier tasks need.

    L(θ) + λ/2 Σ_k Σ_i F_k,i (θ_i - θ*_k,i)²

with one term for each earlier task k, F_k the diagonal of its Fisher
information and θ*_k the weights after it. A sum of such terms is one such term
up to a constant, with importance A = Σ_k F_k and centre c = Σ_k F_k θ*_k / A:
any number of tasks takes the memory of one. The penalty is a gradient
transformation, and A and c are data in its state, so that nothing is compiled
again for the next task.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Params, Tree, Updates


class EwcState(NamedTuple):
  """State of ewc.

  Attributes:
    importance: A, a tree like the parameters, at least 0.
    centre: c, a tree like the parameters.
  """

  importance: Tree
  centre: Params


def ewc(strength: float) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of the penalty, λ A (θ - c).

  Put it before the optimiser, inside powerprop, where parameters are θ:
  powerprop(optax.chain(ewc(λ), optax.sgd(0.1)), α). Until consolidated has
  given it a task it adds nothing.

  Args:
    strength: λ, at least 0. With F the mean over examples, and losses that are
      means, λ = 1 weighs an earlier task like the present one. A step size
      above 2/(λ A) for the largest A diverges.

  Example:
    >>> tx, theta = ewc(2.0), jnp.array([1.0, 1.0])
    >>> state = consolidated(tx.init(theta), jnp.array([3.0, 0.0]), theta)
    >>> tx.update(jnp.zeros(2), state, jnp.array([1.5, 9.0]))[0]
    Array([3., 0.], dtype=float32)

  Source:
    Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
    2017, equation 3 (https://arxiv.org/abs/1612.00796).

  Note:
    With several earlier tasks this is one penalty for each of them, as in the
    paper. The online variant (Schwarz et al., Progress & compress, 2018) keeps
    one, about the latest weights.
  """
  if not 0 <= strength < float('inf'):
    raise ValueError(
      f'strength must be at least 0 and finite, got {strength:g}.'
    )

  def init(params: Params) -> EwcState:
    zeros = optax.tree.zeros_like
    return EwcState(importance=zeros(params), centre=zeros(params))

  def update(
    updates: Updates, state: EwcState, params: Params = None, **extra_args: Any
  ) -> tuple[Updates, EwcState]:
    del extra_args
    trees.require_params(params, 'ewc')
    theta = params
    updates = jax.tree.map(
      lambda g, p, a, c: g + strength * a * (p - c), updates, theta, *state
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(init, update)


def consolidated(
  opt_state: OptState, importance: Tree, theta: Params
) -> OptState:
  """The optimiser state with the penalty of one more task.

  Args:
    importance: F of the task, a tree like theta, at least 0; see fisher. What
      the next tasks may change freely, such as a head, has zeros.

  Example:
    >>> state = ewc(1.0).init(jnp.zeros(1))
    >>> state = consolidated(state, jnp.array([1.0]), jnp.array([2.0]))
    >>> consolidated(state, jnp.array([3.0]), jnp.array([4.0]))
    EwcState(importance=Array([4.], dtype=float32),
             centre=Array([3.5], dtype=float32))
  """
  old = penalty(opt_state)
  total = jax.tree.map(jnp.add, old.importance, importance)

  def move(f: jax.Array, a: jax.Array, c: jax.Array, t: jax.Array) -> jax.Array:
    share = jnp.where(a > 0, f / jnp.where(a > 0, a, 1), 0)
    return c + share * (t - c)

  centre = jax.tree.map(move, importance, total, old.centre, theta)
  return with_penalty(opt_state, EwcState(total, centre))


def penalty(opt_state: OptState) -> EwcState:
  """The penalty that an optimiser state holds."""
  found = trees.find_states(opt_state, EwcState)
  if len(found) != 1:
    raise ValueError(
      f'the optimiser state must hold one ewc, but holds {len(found)}. Build '
      'the optimiser with optax.chain(ewc(strength), …).'
    )
  return found[0]


def with_penalty(opt_state: OptState, new: EwcState) -> OptState:
  """The optimiser state with another penalty, e.g. a fresh one."""
  penalty(opt_state)
  return trees.replace_states(opt_state, EwcState, lambda _: new)


def fisher(
  logits_fn: Callable[[Params, jax.Array], jax.Array],
  theta: Params,
  images: jax.Array,
  key: jax.Array,
  *,
  batch_size: int = 10,
) -> Tree:
  """Diagonal of the Fisher information of a classifier.

  F = E_x E_{y∼p(y|x,θ)} (∂ log p(y|x,θ)/∂θ)², entry by entry. One
  label is drawn from the network's own prediction for each image.

  Args:
    logits_fn: (theta, images) -> logits [N, classes]; must not normalise by
      batch, since each example's gradient is squared by itself.
    batch_size: gradients held at a time; divides the number of images.

  Example:
    >>> logits_fn = lambda theta, x: jnp.stack([x @ theta, -x @ theta], axis=1)
    >>> images = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> fisher(logits_fn, jnp.zeros(2), images, jax.random.key(0), batch_size=2)
    Array([5., 0.], dtype=float32)

  Note:
    Many published implementations use the labels of the data instead (the
    'empirical' Fisher), which vanishes where the network fits them.
  """
  num = images.shape[0]
  if batch_size < 1 or num == 0 or num % batch_size:
    raise ValueError(
      f'batch_size must divide the number of images, got {batch_size} and '
      f'{num}.'
    )

  def squared_gradient(image: jax.Array, key: jax.Array) -> Tree:
    def log_likelihood(theta: Params) -> jax.Array:
      log_probs = jax.nn.log_softmax(logits_fn(theta, image[None])[0])
      drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
      return log_probs[drawn]

    return jax.tree.map(jnp.square, jax.grad(log_likelihood)(theta))

  def add_batch(
    total: Tree, batch: tuple[jax.Array, jax.Array]
  ) -> tuple[Tree, None]:
    squares = jax.vmap(squared_gradient)(*batch)
    return jax.tree.map(lambda t, s: t + jnp.sum(s, 0), total, squares), None

  batches = images.reshape(-1, batch_size, *images.shape[1:])
  keys = jax.random.split(key, num).reshape(-1, batch_size)
  zeros = optax.tree.zeros_like(theta)
  total, _ = jax.lax.scan(add_batch, zeros, (batches, keys))
  return jax.tree.map(lambda t: t / num, total)
