"""Trees for methods that move connections between layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.optim.topology import Rewiring

SHAPES = {'a': (12, 9), 'b': (9, 14), 'c': (3, 3, 2, 4), 'd': (14, 2)}
always = lambda step: step >= 0


def random_tree(seed, scale=1.0):
  generator = np.random.default_rng(seed)
  tree = {
    name: {'w': scale * generator.normal(size=shape)}
    for name, shape in SHAPES.items()
  }
  tree['a']['b'] = generator.normal(size=9)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def random_masks(densities, seed=0):
  generator = np.random.default_rng(seed)
  masks = {'a': {'b': jnp.ones(9, bool)}}
  for name, density in zip(SHAPES, densities, strict=True):
    size = math.prod(SHAPES[name])
    flat = np.zeros(size, bool)
    flat[generator.permutation(size)[: max(1, round(density * size))]] = True
    masks.setdefault(name, {})['w'] = jnp.asarray(flat.reshape(SHAPES[name]))
  return masks


def flatten(tree):
  return {name: np.asarray(tree[name]['w']).ravel() for name in SHAPES}


def counts(masks):
  return np.array([flat.sum() for flat in flatten(masks).values()])


def rewiring(masks, theta, memory, seed=0):
  key, step = jax.random.key(seed), jnp.asarray(0, jnp.int32)
  return Rewiring(key, step, masks, memory, theta, theta)
