"""Pruning at initialisation on eight devices: the masks of one."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import small

from powerprop_jax.prune import at_init

_SPECS = {
  'a': {'w': PartitionSpec('x', 'y')},
  'b': {'w': PartitionSpec('y', 'x')},
}


def _theta():
  rng = np.random.default_rng(0)
  # Coarse values, so that sums do not depend on their order and ties occur.
  draw = lambda shape: jnp.asarray(rng.choice([-2, -1, 1, 2], shape), float)
  return {'a': {'w': draw((16, 8))}, 'b': {'w': draw((8, 16))}}


def _batches():
  rng = np.random.default_rng(1)
  images = rng.choice([-1, 0, 1], (2, 4, 16)).astype(np.float32)
  return [(x,) for x in images]


def _mlp(theta, images):
  return jax.nn.relu(images @ theta['a']['w']) @ theta['b']['w']


# Products of matrices on an explicit mesh must say how their result is sharded,
# so there the network is one connection after another.
def _chains(theta, images):
  return jnp.mean(images) * theta['a']['w'] * theta['b']['w'].T


def _masks(method, net, theta):
  loss = lambda theta, images: jnp.mean((net(theta, images) - 1) ** 2)
  if method == 'synflow':
    return at_init.synflow_masks(net, theta, (1, 16), 0.75, steps=3)
  masks_of = getattr(at_init, method)
  if method in ('force', 'iterative_snip'):
    return masks_of(loss, theta, _batches(), 0.75, steps=3)
  return at_init.masks_from_scores(masks_of(loss, theta, _batches()), 0.75)


class ShardedTest(parameterized.TestCase):
  @parameterized.product(
    method=('snip', 'grasp', 'iterative_snip', 'force', 'synflow'),
    explicit=(False, True),
  )
  @pytest.mark.slow
  def test_masks_are_those_of_one_device(self, method, explicit):
    net, theta = _chains if explicit else _mlp, _theta()
    alone = _masks(method, net, theta)
    mesh, sharded = small.on_devices(theta, _SPECS, explicit)
    with jax.set_mesh(mesh):
      masks = _masks(method, net, sharded)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_equal(host(masks), host(alone))
    for name, leaves in _SPECS.items():
      self.assertEqual(masks[name]['w'].sharding.spec, leaves['w'])
