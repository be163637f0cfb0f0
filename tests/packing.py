"""A small network, its tasks and its training, for the tests of packing."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax import continual
from powerprop_jax.core import trees
from powerprop_jax.optim import powerprop, sparsify, views
from powerprop_jax.optim.topologies import protected

jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


class Task(NamedTuple):
  """Examples, and how far the statistics of the norm move at a step."""

  x: np.ndarray
  y: np.ndarray
  rate: float = 0.2


def make_task(seed, rate=0.2):
  """Labels of a random linear rule over six inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(64, 6)).astype(np.float32)
  y = np.argmax(x @ rng.normal(size=(6, 4)), axis=1).astype(np.int32)
  return Task(x, y, rate)


def theta(hidden=5):
  """Weights with the names that the contract table's optimisers know."""
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    'm': {
      'w': jax.random.normal(keys[0], (6, hidden)),
      'b': 0.1 * jax.random.normal(keys[1], (hidden,)),
    },
    'n': {'w': jax.random.normal(keys[2], (hidden, 4))},
  }


def net_state(hidden=5):
  return {'norm': {'mean': jnp.zeros(hidden), 'var': jnp.ones(hidden)}}


def _logits(theta, norm, hidden):
  normed = (hidden - norm['mean'][None]) / jnp.sqrt(norm['var'] + 1e-3)[None]
  return jax.nn.relu(normed + theta['m']['b'][None]) @ theta['n']['w']


def _apply(theta, net_state, x):
  """Logits in evaluation: norms use the statistics they are given."""
  return _logits(theta, net_state['norm'], x @ theta['m']['w'])


apply = jit(_apply)


def loss(theta, net_state, x, y, rate):
  """Loss in training: batch norm, and its statistics a rate further."""
  hidden = x @ theta['m']['w']
  batch = {'mean': hidden.mean(0), 'var': hidden.var(0)}
  moved = jax.tree.map(
    lambda old, new: old + rate * (new - old), net_state['norm'], batch
  )
  logits = _logits(theta, batch, hidden)
  error = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  return error, {'norm': jax.lax.stop_gradient(moved)}


@jit
def accuracy(theta, net_state, x, y):
  return (_apply(theta, net_state, x).argmax(1) == y).mean()


def evaluate(theta, net_state, task):
  return accuracy(theta, net_state, task.x, task.y)


def make_tx(inner, alpha=2.0):
  return sparsify.sparsify(
    powerprop.powerprop(inner, alpha), protected.protected()
  )


def make_train(tx, num_steps=8, check=lambda step: step):
  """A training function, which donates what it is given to a jitted step."""

  def step(phi, net_state, opt_state, x, y, rate):
    weights = views.effective_params(phi, opt_state)
    grads, net_state = jax.grad(loss, has_aux=True)(
      weights, net_state, x, y, rate
    )
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), net_state, opt_state

  step = jit(check(step), donate_argnums=(0, 1, 2))

  def train(learner, task):
    for _ in range(num_steps):
      learner = continual.Learner(*step(*learner, *task))
    return learner

  return train


def config(*densities, **kwargs):
  return continual.PackConfig(densities or (0.2, 0.4), **kwargs)


def init(method='efficient_packnet', inner=None, alpha=2.0, **kwargs):
  tx = make_tx(inner or optax.adam(0.03), alpha)
  return continual.init_pack(tx, theta(), net_state(), method, **kwargs)


def packed():
  """Two weights, 1 and 2, of which the task 'first' keeps the larger."""
  tx = sparsify.sparsify(optax.sgd(0.1), protected.protected())
  theta = {'linear': {'w': jnp.array([[1.0, 2.0]])}}
  state = continual.init_pack(tx, theta, {}, 'efficient_packnet')
  return learn(state, config(0.5), 'first')[0]


def keep(learner, task):
  """A training that does nothing."""
  return learner


def perfect(theta, net_state, task):
  return 1.0


def scripted(*scores):
  """An evaluation that returns these, one after another."""
  left = iter(scores)
  return lambda *_: next(left)


def learn(
  state, config, task_id, train=keep, evaluate=perfect, task=None, **kwargs
):
  """A task, whose key is the number of those before it."""
  return continual.learn(
    state, task_id, task, train, evaluate, config, len(state.tasks), **kwargs
  )


def shared(tree):
  """The shared leaves of a tree by name, on the host."""
  return {
    path: np.array(leaf)
    for path, leaf in trees.by_path(tree).items()
    if path.endswith('w')
  }


def where_free(state, change, phi):
  """φ with a change where no task of the state owns a weight."""
  return jax.tree.map(
    lambda p, owned: jnp.where(owned, p, change(p)), phi, state.protected
  )


def same_bits(a, b):
  """Whether two trees of arrays are equal to the last bit, signs included."""
  leaves = [jax.tree.leaves(tree) for tree in (a, b)]
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(*leaves, strict=True)
  )
