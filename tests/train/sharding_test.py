"""Sharded arrays: same results as on one device, and no gathering."""

import re

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from powerprop_jax.core import masks, scores, topk

GATHERS = re.compile('all-gather|all-to-all|collective-permute')
SHAPES = {
  'conv': ((8, 6, 16), PartitionSpec('x', None, 'y')),
  'flat': ((64,), PartitionSpec(('x', 'y'))),
  'linear': ((16, 8), PartitionSpec('y', 'x')),
  'last': ((5, 12), PartitionSpec(None, 'x')),
  'scalar': ((), PartitionSpec()),
}
MESHES = ('automatic', 'explicit')


def make_mesh(kind):
  if kind == 'automatic':
    return Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))
  return jax.make_mesh((4, 2), ('x', 'y'))


def random_tree(dtype=jnp.float32):
  generator = np.random.default_rng(0)
  return {
    name: jnp.asarray(generator.integers(-3, 3, shape), dtype)
    for name, (shape, _) in SHAPES.items()
  }


def shard(tree, mesh):
  return {
    name: jax.device_put(leaf, NamedSharding(mesh, SHAPES[name][1]))
    for name, leaf in tree.items()
  }


class TopKTest(parameterized.TestCase):
  @parameterized.product(
    mesh=MESHES,
    dtype=(jnp.float32, jnp.bfloat16),
    has_among=(False, True),
  )
  def test_tree_without_gathers(self, mesh, dtype, has_among):
    tree = random_tree(dtype)
    sharded = shard(tree, make_mesh(mesh))
    if has_among:
      fn = lambda x, k: topk.top_k_masks(
        x, k, among=jax.tree.map(lambda leaf: leaf != 1, x)
      )
    else:
      fn = topk.top_k_masks
    compiled = jax.jit(fn).lower(sharded, 0).compile()
    self.assertIsNone(GATHERS.search(compiled.as_text()))
    for k in (0, 1, 333, 640):
      got = compiled(sharded, jnp.asarray(k, jnp.int32))
      chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, fn(tree, k))
      )
      for name, leaf in got.items():
        self.assertEqual(leaf.sharding.spec, sharded[name].sharding.spec)

  @parameterized.product(mesh=MESHES, name=tuple(SHAPES))
  def test_array_without_gathers(self, mesh, name):
    scores_of_leaf = random_tree()[name]
    sharded = shard({name: scores_of_leaf}, make_mesh(mesh))[name]
    compiled = jax.jit(topk.top_k_mask).lower(sharded, 0).compile()
    self.assertIsNone(GATHERS.search(compiled.as_text()))
    k = jnp.asarray(sharded.size // 3, jnp.int32)
    np.testing.assert_array_equal(
      compiled(sharded, k), topk.top_k_mask(scores_of_leaf, k)
    )

  @parameterized.parameters(*MESHES)
  def test_outside_jit_too(self, mesh):
    tree = random_tree()
    got = topk.top_k_masks(shard(tree, make_mesh(mesh)), 100)
    chex.assert_trees_all_equal(
      jax.tree.map(np.asarray, got),
      jax.tree.map(np.asarray, topk.top_k_masks(tree, 100)),
    )


class MasksAndScoresTest(parameterized.TestCase):
  @parameterized.parameters(*MESHES)
  def test_keep_the_sharding(self, mesh):
    mesh_of_kind = make_mesh(mesh)
    tree = shard(random_tree(), mesh_of_kind)
    with jax.set_mesh(mesh_of_kind):
      random = jax.jit(scores.random)(jax.random.key(0), tree)
    full = masks.full_masks(tree)
    for made in (
      full,
      masks.apply_masks(tree, full),
      scores.magnitude(tree),
      random,
    ):
      for name, leaf in made.items():
        if mesh == 'explicit':
          self.assertEqual(leaf.sharding.spec, tree[name].sharding.spec)
    self.assertEqual(float(masks.density(full)), 1.0)
    self.assertEqual(float(masks.overlap(full, full).total.agreement), 1.0)
