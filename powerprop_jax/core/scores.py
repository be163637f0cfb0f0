"""Scores that rank weights for pruning; larger means keep.

Each takes trees of one structure and returns a tree of float32 scores with the
same structure, shapes and shardings, whatever the dtype of the parameters. All
of them are about the effective weights θ: in terms of φ they would depend on α.
"""

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.trees import NamedLeaf, Tree

# Tells the stream of random scores from all others of the same key.
_STREAM = 0x5C03E5


def magnitude(theta: Tree) -> Tree:
  """|θ|, the score of the paper.

  Example:
    >>> magnitude(jnp.array([-2., 0., 1.]))
    Array([2., 0., 1.], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, section 4
    (https://arxiv.org/abs/2110.00296).
  """
  return jax.tree.map(lambda t: jnp.abs(_float32(t)), theta)


def gradient(grads: Tree) -> Tree:
  """|∂L/∂θ|, by which missing connections are ranked for growth.

  Example:
    >>> gradient(jnp.array([0.5, -3.]))
    Array([0.5, 3. ], dtype=float32)

  Source:
    Evci et al., Rigging the Lottery, 2020, section 3
    (https://arxiv.org/abs/1911.11134).
  """
  return magnitude(grads)


def saliency(theta: Tree, grads: Tree) -> Tree:
  """|θ ∂L/∂θ|, the first-order change of the loss if a weight is removed.

  Example:
    >>> saliency(jnp.array([-2., 4.]), jnp.array([3., 0.5]))
    Array([6., 2.], dtype=float32)

  Source:
    Lee et al., SNIP, 2019, equation 6, without the normalisation, which does
    not change the order (https://arxiv.org/abs/1810.02340).
  """

  def visit(leaf: NamedLeaf, g: jax.Array) -> jax.Array:
    if jnp.shape(leaf.value) != jnp.shape(g):
      raise ValueError(
        f'theta and grads must have the same shapes; leaf {leaf.path!r} is '
        f'{jnp.shape(leaf.value)} in theta and {jnp.shape(g)} in grads.'
      )
    return jnp.abs(_float32(leaf.value) * _float32(g))

  return trees.map_leaves(visit, theta, grads)


def random(key: jax.Array, theta: Tree) -> Tree:
  """Independent uniform scores in [0, 1): the control for every other score.

  Call it under jax.set_mesh if the shards are on an explicit mesh. The PRNG key
  may be that which the weights were drawn with, for the scores come from a
  stream of their own: of weights and scores from one stream, those with the
  largest scores could be the largest weights.

  Example:
    >>> random(jax.random.key(0), {'w': jnp.zeros((2, 3))})['w'].shape
    (2, 3)
  """
  own = jax.random.fold_in(key, _STREAM)
  return optax.tree.random_like(
    own, theta, jax.random.uniform, dtype=jnp.float32
  )


def _float32(x: jax.Array) -> jax.Array:
  return jnp.asarray(x).astype(jnp.float32)
