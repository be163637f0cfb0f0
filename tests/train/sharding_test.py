"""Sharded arrays: same results as on one device, and no gathering."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from powerprop_jax.core import masks, scores
from powerprop_jax.core.top_k import topk

GATHERS = re.compile('all-gather|all-to-all|collective-permute')
SHAPES = {
  'conv': ((8, 6, 16), PartitionSpec('x', None, 'y')),
  'flat': ((64,), PartitionSpec(('x', 'y'))),
  'linear': ((16, 8), PartitionSpec('y', 'x')),
  'last': ((5, 12), PartitionSpec(None, 'x')),
  'scalar': ((), PartitionSpec()),
}
MESHES = {
  'automatic': Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y')),
  'explicit': jax.make_mesh((4, 2), ('x', 'y')),
}
on_each_mesh = pytest.mark.parametrize('kind', MESHES)


def random_tree(dtype=jnp.float32):
  generator = np.random.default_rng(0)
  return {
    name: jnp.asarray(generator.integers(-3, 3, shape), dtype)
    for name, (shape, _) in SHAPES.items()
  }


def shard(tree, kind):
  return {
    name: jax.device_put(leaf, NamedSharding(MESHES[kind], SHAPES[name][1]))
    for name, leaf in tree.items()
  }


def compiled_without_gathers(fn, sharded):
  compiled = jax.jit(fn).lower(sharded, 0).compile()
  assert not GATHERS.search(compiled.as_text())
  return lambda k: jax.tree.map(np.asarray, compiled(sharded, jnp.int32(k)))


@on_each_mesh
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('has_among', [False, True])
@pytest.mark.slow
def test_top_k_of_a_tree_gathers_nothing(kind, dtype, has_among):
  tree = random_tree(dtype)
  fn = topk.top_k_masks
  if has_among:
    fn = lambda x, k: topk.top_k_masks(
      x, k, among=jax.tree.map(lambda leaf: leaf != 1, x)
    )
  found = compiled_without_gathers(fn, shard(tree, kind))
  for k in (0, 1, 333, 640):
    expected = jax.tree.map(np.asarray, fn(tree, k))
    chex.assert_trees_all_equal(found(k), expected)


@on_each_mesh
@pytest.mark.slow
def test_masks_and_scores_keep_the_sharding(kind):
  tree = shard(random_tree(), kind)
  with jax.set_mesh(MESHES[kind]):
    random = jax.jit(scores.random)(jax.random.key(0), tree)
  full = masks.full_masks(tree)
  top = topk.top_k_masks(tree, 100)  # outside jit
  expected = topk.top_k_masks(random_tree(), 100)
  chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (top, expected)))
  kept = [jax.jit(functools.partial(topk.top_k_masks, k=100))(tree)]
  if kind == 'explicit':
    kept += [full, masks.apply_masks(tree, full), scores.magnitude(tree)]
    kept += [random]
  for made in kept:
    for name, leaf in made.items():
      assert leaf.sharding.spec == tree[name].sharding.spec
  assert float(masks.density(full)) == 1.0
  assert float(masks.overlap(full, full).total.agreement) == 1.0
