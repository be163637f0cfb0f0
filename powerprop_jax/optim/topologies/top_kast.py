"""Top-KAST: a sparse forward set inside a larger set of trained weights.

The forward set A holds the largest weights of each layer, the backward set
B ⊃ A some more. The network computes with A; B is trained, so that weights
just outside A can grow into it, and a penalty keeps those from lingering.
"""

from typing import Literal, Unpack, get_args

import jax
import jax.numpy as jnp

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, scores, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import When
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import NamedLeaf, Params, Updates
from powerprop_jax.optim.topologies.counts import Budget, Leaves, check_options
from powerprop_jax.optim.topology import Topology

Norm = Literal['l1', 'l2']


def top_kast(
  forward_sparsity: float,
  backward_sparsity: float,
  when: When,
  *,
  penalty: float = 1e-4,
  norm: Norm = 'l2',
  **leaves: Unpack[Leaves],
) -> Topology:
  """Computes with the largest weights, trains some more.

  Args:
    forward_sparsity: 1 - D, share of weights outside A, in [0, 1).
    backward_sparsity: 1 - (D + M), share outside B; at most forward_sparsity.
    penalty: coefficient of the exploration penalty, at least 0; 0 is without.
    norm: 'l2' for Σ θ²/2 over A plus Σ θ²/(2D) over the rest of B, with the
      forward density D of the leaf; 'l1' for Σ |θ| and Σ |θ|/D.

  Returns:
    A Topology whose masks are A and whose memory is B∖A. Weights outside B keep
    their values and stand still.

  Raises:
    ValueError: from init, if a leaf's B would be smaller than its A.

  Note:
    The paper calls the penalty L2, its formula is printed with |θ|; both are
    here.
    With equal densities an extremely sparse network may die, as its last layer
    keeps too few weights: docs/results/sparse_training.md.
    The sets are chosen at the start of an update, so that the next forward pass
    uses those of the weights one step before.

  Source:
    As for aliases.top_kast.
  """
  masks_lib.check_sparsity(forward_sparsity, 'forward_sparsity')
  masks_lib.check_sparsity(backward_sparsity, 'backward_sparsity')
  if backward_sparsity > forward_sparsity:
    raise ValueError(
      'the backward set must contain the forward set: backward_sparsity must '
      f'be at most forward_sparsity, got {backward_sparsity} and '
      f'{forward_sparsity}.'
    )
  if not 0 <= penalty < float('inf'):
    raise ValueError(f'penalty must be at least 0, got {penalty}.')
  names.check_choice('norm', norm, get_args(Norm))

  check_options(leaves, Leaves)
  inside, around = (
    Budget(sparsity, **leaves)
    for sparsity in (forward_sparsity, backward_sparsity)
  )

  def counts(theta: Params) -> tuple[dict[str, int], dict[str, int]]:
    forward, backward = inside.counts(theta), around.counts(theta)
    for name, count in forward.items():
      if backward[name] < count:
        raise ValueError(
          f'the distribution gives {name!r} {count} forward weights and only '
          f'{backward[name]} backward. Choose another distribution.'
        )
    return forward, backward

  def choose(theta: Params) -> tuple[Masks, Masks]:
    forward, backward = counts(theta)
    if not forward:
      return theta, theta
    ranked = scores.magnitude(theta)
    a, b = (
      ranking.masks_from_counts(ranked, counts, select=inside.select)
      for counts in (forward, backward)
    )
    return a, masks_lib.difference(b, a)

  def penalise(
    grads: Updates, theta: Params, masks: Masks, extra: Masks
  ) -> Updates:
    forward, _ = counts(theta)
    slope = jnp.sign if norm == 'l1' else lambda t: t

    def visit(
      leaf: NamedLeaf, g: jax.Array, in_a: jax.Array, in_rest: jax.Array
    ) -> jax.Array:
      if leaf.path not in forward:
        return g
      t = leaf.value.astype(jnp.float32)
      rest = jnp.where(in_rest, slope(t) * (t.size / forward[leaf.path]), 0)
      pull = penalty * jnp.where(in_a, slope(t), rest)
      return (g.astype(jnp.float32) + pull).astype(g.dtype)

    return trees.map_leaves(visit, theta, grads, masks, extra)

  return Topology(
    init=lambda key, theta: choose(theta),
    rewire=lambda rewiring: choose(rewiring.theta),
    when=when,
    trainable=lambda masks, extra: jax.tree.map(jnp.logical_or, masks, extra),
    penalise=penalise if penalty else None,
    needs_grads=False,
    regrow='keep',
  )
