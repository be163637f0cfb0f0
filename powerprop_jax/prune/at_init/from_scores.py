"""Masks from scores over a whole network, and what can be wrong with them."""

from typing import Unpack
import warnings

import jax
import jax.numpy as jnp

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.prune import one_shot
from powerprop_jax.prune.one_shot import Overridden


class LayerCollapseWarning(UserWarning):
  """A layer has lost all its connections.

  Nothing passes through such a layer of a plain network, which then cannot be
  trained. A layer with a fixed cosine transform or a shortcut around it still
  works: there, ignore it with warnings.simplefilter.
  """


def masks_from_scores(
  scores: Tree,
  sparsity: Sparsity,
  **ranked: Unpack[Overridden],
) -> Masks:
  """Masks that keep the weights with the largest scores, by default globally.

  As prune, which ranks a function of θ, with the checks that extreme sparsities
  need. Warns with a LayerCollapseWarning, which names the layers, if the
  ranking leaves nothing of a layer (unless inside jit).

  Raises:
    ValueError: as for prune; also if the sparsity leaves less than one weight
      for each layer, or the scores are not finite (outside jit).

  Example:
    >>> scores = {'a': {'w': jnp.array([[1., 5.]])},
    ...           'b': {'w': jnp.array([[4., 3.]])}}
    >>> masks = masks_from_scores(scores, 0.5)
    >>> print(masks['a']['w'], masks['b']['w'])
    [[False  True]] [[ True False]]
  """
  counts = final_counts(scores, sparsity, **ranked)
  select = ranked.get('select', select_lib.is_weight)
  _check_finite(scores, 'the scores', select)
  masks = ranking.masks_from_counts(scores, counts, select=select)
  warn_of_collapse(masks, select)
  return masks


def final_counts(
  theta: Params, sparsity: Sparsity, **ranked: Unpack[Overridden]
) -> dict[str, int]:
  """As one_shot.kept_counts, refusing less than one weight for each layer."""
  ranked.setdefault('scope', 'global')
  counts = one_shot.kept_counts(theta, sparsity, **ranked)
  leaves = select_lib.selected(
    ranked.get('select', select_lib.is_weight), theta
  )
  sizes = {path: leaf.size for path, leaf in leaves.items()}
  own = one_shot.own_sparsities(tuple(sizes), sparsity, ranked)
  for name, share in own.items():
    # The tolerance is for densities that are meant to be just one weight.
    if 0 < sizes[name] * (1 - share) < 1 - 1e-6:
      raise ValueError(
        f'{name!r} has {sizes[name]:,} weights: sparsity {share:g} leaves '
        'less than one of them. Lower the sparsity, give this leaf one of its '
        "own with overrides, or rank all leaves together with scope='global'."
      )
  shared = [name for name in sizes if name not in own and sizes[name]]
  if shared and counts[ranking.SHARED] < len(shared):
    raise ValueError(
      f'sparsity {sparsity:g} leaves {counts[ranking.SHARED]} weights for '
      f'{len(shared)} layers ({", ".join(shared)}), less than one each. Lower '
      'the sparsity.'
    )
  return counts


def warn_of_collapse(
  masks: Masks, select: Select, *, stacklevel: int = 3
) -> None:
  """Warns of selected leaves whose masks are all False, unless traced."""
  if trees.is_traced(masks):
    return
  if empty := one_shot.empty_leaves(masks, select):
    warnings.warn(
      f'no connection is left in {", ".join(empty)}. Lower the sparsity, prune '
      "in more steps, rank per layer with scope='layer', or give these leaves "
      'a sparsity of their own with overrides.',
      LayerCollapseWarning,
      stacklevel=stacklevel,
    )


def check_scores(scores: Tree, method: str, select: Select) -> None:
  """Refuses scores of selected leaves that rank nothing, unless traced."""
  _check_finite(scores, f'the scores of {method}', select)
  if is_zero(select_lib.selected(select, scores)):
    raise ValueError(
      f'{method} scores every weight 0, so that it cannot rank them. Weights '
      'that start at zero, as those of a cosine layer, have no scores: score a '
      'network with other initial weights, or draw the support at random. '
      'Otherwise the network is cut through: keep more weights or take more '
      'steps.'
    )


def _check_finite(scores: Tree, what: str, select: Select) -> None:
  for path, value in select_lib.selected(select, scores).items():
    if not trees.is_traced(value) and not jnp.all(jnp.isfinite(value)):
      raise ValueError(
        f'{what} are not finite in {path!r}. Check that the weights, the loss '
        'and its derivatives are.'
      )


def is_zero(tree: Tree) -> bool:
  """Whether a tree is certainly zero everywhere; never if it is traced."""
  leaves = jax.tree.leaves(tree)
  return not trees.is_traced(tree) and not any(bool(jnp.any(x)) for x in leaves)
