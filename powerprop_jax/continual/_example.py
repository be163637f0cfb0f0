"""The smallest network with a task, for the examples in docstrings."""

import jax.numpy as jnp
import optax

from powerprop_jax.continual import packnet
from powerprop_jax.continual.state import PackState
from powerprop_jax.optim import sparsify
from powerprop_jax.optim.topologies import protected


def packed() -> PackState:
  """Two weights, 1 and 2, of which the task 'first' keeps the larger.

  Returns:
    The state after that task.

  Example:
    >>> packed().task_ids
    ('first',)
  """
  tx = sparsify.sparsify(optax.sgd(0.1), protected.protected())
  theta = {'linear': {'w': jnp.array([[1.0, 2.0]])}}
  config = packnet.PackConfig('efficient_packnet', (0.5,))
  state, _ = packnet.learn(
    packnet.init_pack(tx, theta, {}, config),
    'first',
    task=None,
    train=lambda learner, task: learner,
    evaluate=lambda theta, net_state, task: 1.0,
    config=config,
    key=0,
  )
  return state
