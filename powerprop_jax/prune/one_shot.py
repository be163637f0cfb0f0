"""One-shot pruning: masks for any parameter tree, and sweeps over sparsities.

    sparsity ──kept_counts──▶ counts ─┐
                                      ├─masks_from_counts──▶ masks
    theta ─────score────────▶ scores ─┘

Counts are worked out on the host, from shapes; everything after that can be
compiled with the counts as arguments, so that one program serves every
sparsity.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp

from powerprop_jax.core import distributions, scores, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names as names_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Overrides, Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k.ranking import SHARED, masks_from_counts
from powerprop_jax.core.trees import Params, Select, Tree

T = TypeVar('T')
# Of each of several sparsities.
OverridesAt = Callable[[Any], Overrides | None]


class Ranked(TypedDict, total=False):
  """Which weights are ranked, and against which others.

  Attributes:
    scope: 'layer', where every selected leaf loses its own share, or 'global',
      where they are ranked together and lose one share of their sum.
    select: which leaves are pruned; the masks of others are all True.
  """

  scope: str
  select: Select


class Overridden(Ranked, total=False):
  """Likewise, with leaves that are ranked by themselves.

  Attributes:
    overrides: {pattern: sparsity} of leaves pruned at a sparsity of their own.
      With scope='global' the sparsity is that of the other leaves together.
  """

  overrides: Overrides | None


def prune(
  theta: Params,
  sparsity: Sparsity,
  *,
  score: Callable[[Params], Tree] = scores.magnitude,
  **ranked: Unpack[Overridden],
) -> Masks:
  """Masks that remove the lowest-scoring share of weights, or of each layer's.

  Args:
    theta: effective parameters. (Per layer, |φ| ranks as |θ| does; globally
      only if all leaves have the same α.)
    sparsity: share of zeros, in [0, 1); per layer also a mapping
      {'module/name': sparsity} for every selected leaf, as from
      distributions.erk.
    score: theta -> tree of scores like theta.
    **ranked: scope ('layer'), select, overrides; see Overridden.

  Returns:
    Masks, in which a leaf or group of n weights keeps exactly
    masks.num_kept(n, sparsity) of them.

  Raises:
    ValueError: if a weight is not finite. Under jax.jit that cannot be seen;
      NaN then goes first.

  Note:
    The authors' notebook keeps int(p n) of n weights for a fraction p, and
    twice the fraction in the output layer. Here that is sparsity 1 - p with
    overrides={'logits/w$': max(0, 1 - 2 * p)}, which keeps p n rounded up.

  Example:
    >>> theta = {'linear': {'w': jnp.array([[0.1, -3.], [2., -0.2]])}}
    >>> prune(theta, 0.5)['linear']['w']
    Array([[False,  True],
           [ True, False]], dtype=bool)

  Source:
    Schwarz et al., Powerpropagation, 2021 (https://arxiv.org/abs/2110.00296),
    the authors' notebook.
  """
  counts = kept_counts(theta, sparsity, **ranked)
  check_finite(theta, 'theta')
  select = ranked.get('select', select_lib.is_weight)
  return masks_from_counts(score(theta), counts, select=select)


def check_finite(theta: Params, what: str) -> None:
  """Refuses weights that are not finite, where they can be looked at."""
  for leaf in trees.named_leaves(theta):
    if not (trees.is_traced(leaf.value) or jnp.all(jnp.isfinite(leaf.value))):
      raise ValueError(
        f'{what}: leaf {leaf.path!r} holds a number that is not finite. Its '
        'training diverged; try a smaller learning rate.'
      )


def empty_leaves(masks: Masks, select: Select) -> list[str]:
  """Names of the selected leaves of which no weight is left."""
  chosen = masks_lib.selected(masks, select)
  return [path for path, m in chosen.items() if m.size and not jnp.any(m)]


def sweep(
  evaluate: Callable[[Params], T],
  theta: Params,
  sparsities: Sequence[Sparsity],
  *,
  score: Callable[[Params], Tree] = scores.magnitude,
  overrides: Overrides | OverridesAt | None = None,
  **ranked: Unpack[Ranked],
) -> T:
  """What evaluate says of theta pruned at each of several sparsities.

  One program, traced once: the counts are its arguments, and sparsities are
  taken one after another, so that memory does not grow with their number. Under
  jax.vmap over a leading axis of theta it does the same for each network. The
  scores are computed once, before any pruning.

  Args:
    evaluate: pruned theta -> tree of scalars (or arrays); must be traceable.
    sparsities: at least one; each as for prune.
    score: as for prune.
    overrides: as for prune, or a function of the sparsity that returns them;
      with scope='global' it must fix the same leaves at every sparsity.
    **ranked: scope, select; as for prune.

  Returns:
    The tree that evaluate returns, with a leading axis over sparsities.

  Note:
    Called outside jit, every call compiles again. To repeat a sweep, write
    run = jax.jit(lambda theta: sweep(evaluate, theta, sparsities)) once.

  Example:
    >>> theta = {'linear': {'w': jnp.array([[0.5, -3.], [2., -1.]])}}
    >>> total = lambda theta: jnp.abs(theta['linear']['w']).sum()
    >>> sweep(total, theta, [0.0, 0.5, 0.75])
    Array([6.5, 5. , 3. ], dtype=float32)
  """
  if not len(sparsities):
    raise ValueError('sweep needs at least one sparsity, got none.')
  counts = counts_of_each(theta, sparsities, overrides, **ranked)
  if any(c.keys() != counts[0].keys() for c in counts):
    raise ValueError(
      "with scope='global', overrides must fix the same leaves at every "
      'sparsity: '
      + '; '.join(sorted({', '.join(c.keys() - {SHARED}) for c in counts}))
      + '.'
    )
  stacked = {
    name: jnp.asarray([c[name] for c in counts], jnp.int32)
    for name in counts[0]
  }
  ranking, select = score(theta), ranked.get('select', select_lib.is_weight)

  def evaluate_at(counts: dict[str, jax.Array]) -> T:
    kept = masks_from_counts(ranking, counts, select=select)
    return evaluate(masks_lib.apply_masks(theta, kept))

  return jax.lax.map(evaluate_at, stacked)


def counts_of_each(
  theta: Params,
  sparsities: Sequence[Sparsity],
  overrides: Overrides | OverridesAt | None,
  **ranked: Unpack[Ranked],
) -> list[dict[str, int]]:
  """kept_counts at each of several sparsities."""
  overrides_at = overrides if callable(overrides) else lambda _: overrides
  return [
    kept_counts(theta, sparsity, overrides=overrides_at(sparsity), **ranked)
    for sparsity in sparsities
  ]


def kept_counts(
  theta: Params, sparsity: Sparsity, **ranked: Unpack[Overridden]
) -> dict[str, int]:
  """How many weights each leaf keeps, and how many the others share.

  Arguments are those of prune; shapes will do for theta.

  Returns:
    {'module/name': count} of the leaves that are ranked by themselves, and with
    scope='global' {SHARED: count} of all the others together.

  Example:
    >>> theta = {'a': {'w': jnp.ones((5, 4))}, 'b': {'w': jnp.ones((2, 5))}}
    >>> kept_counts(theta, 0.8)
    {'a/w': 4, 'b/w': 2}
    >>> kept_counts(theta, 0.8, scope='global')
    {'*': 6}
    >>> kept_counts(theta, 0.8, scope='global', overrides={'^b/': 0.5})
    {'b/w': 5, '*': 4}
  """
  leaves = select_lib.selected(
    ranked.get('select', select_lib.is_weight), theta
  )
  sizes = {path: leaf.size for path, leaf in leaves.items()}
  own = own_sparsities(tuple(sizes), sparsity, ranked)
  counts = distributions.counts(own, sizes)
  others = [name for name in sizes if name not in own]
  if others:
    assert not isinstance(sparsity, Mapping)
    together = sum(sizes[name] for name in others)
    counts[SHARED] = masks_lib.num_kept(together, sparsity)
  return counts


def own_sparsities(
  names: Sequence[str], sparsity: Sparsity, ranked: Overridden
) -> Mapping[str, float]:
  """The sparsity of each of the leaves that is ranked by itself.

  Example:
    >>> own_sparsities(['a/w', 'b/w'], 0.9, {'overrides': {'^b/': 0.5}})
    {'a/w': 0.9, 'b/w': 0.5}
  """
  scope = ranked.get('scope', 'layer')
  names_lib.check_choice('scope', scope, ('layer', 'global'))
  own: Mapping[str, float] = {}
  if not isinstance(sparsity, Mapping):
    masks_lib.check_sparsity(sparsity)
    own = dict.fromkeys(names, sparsity) if scope == 'layer' else {}
  elif scope == 'layer':
    distributions.check_by_leaf(sparsity, names)
    own = sparsity
  else:
    raise ValueError(
      "scope='global' takes one sparsity for all leaves, got a mapping. Use "
      "scope='layer', or a number with overrides."
    )
  fixed = distributions.match_overrides(names, ranked.get('overrides'))
  return {**own, **fixed} if fixed else own


def by_group(
  values: Mapping[str, int], counts: Iterable[str]
) -> dict[str, int]:
  """Sums over the groups of kept_counts of a number that each leaf has."""
  sums = dict.fromkeys(counts, 0)
  for name, value in values.items():
    sums[name if name in sums else SHARED] += value
  return sums
