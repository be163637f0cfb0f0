"""What packing does to arrays: compiled once, for all tasks and densities."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.continual import state as state_lib
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import scores, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import NamedLeaf, OptState, Params
from powerprop_jax.optim import views


@functools.partial(jax.jit, static_argnames='initialise')
def redrawn(
  phi: Params,
  protected: Masks,
  scale: dict[str, jax.Array],
  power: OptState,
  key: jax.Array,
  initialise: Callable[[jax.Array], Params] | None,
) -> Params:
  """φ with new values, ψ⁻¹(θ), in the free weights of some leaves.

  Args:
    protected: masks like phi, True where values stay.
    scale: {'module/name': s} of the leaves whose free weights are drawn, in
      θ-space, from a normal distribution with the root mean square s.
    power: α, as in PackState.
    initialise: key -> θ, to draw from instead of a normal distribution.

  Example:
    >>> phi = {'w': jnp.array([1., 2.])}
    >>> fixed = {'w': jnp.array([True, False])}
    >>> new = redrawn(phi, fixed, {'w': 0.}, (), jax.random.key(0), None)
    >>> new['w']
    Array([1., 0.], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, Algorithm 1, re-initialisation of
    pruned weights: at φ = 0 they would be at a critical point.
  """
  if initialise is None:
    noise = optax.tree.random_like(key, phi, jax.random.normal)
    leaves = trees.by_path(noise)
    # Not -0.0 for a scale of 0.
    scaled = {
      path: jnp.where(s == 0, 0, s * leaves[path].astype(jnp.float32))
      for path, s in scale.items()
    }
    theta = state_lib.with_leaves(
      noise, {path: x.astype(leaves[path].dtype) for path, x in scaled.items()}
    )
  else:
    theta = initialise(key)
    masks_lib.check_same_shapes(phi, theta, 'φ', 'what initialise returned')
  drawn = trees.by_path(views.latent_params(theta, power))

  def visit(leaf: NamedLeaf, fixed: jax.Array) -> jax.Array:
    p: jax.Array = leaf.value
    if leaf.path not in scale:
      return p
    return jnp.where(fixed, p, drawn[leaf.path].astype(p.dtype))

  return trees.map_leaves(visit, phi, protected)


@jax.jit
def merged(
  protected: Masks, before: Params, after: Params
) -> tuple[Params, dict[str, tuple[jax.Array, jax.Array]]]:
  """Trained weights with the protected bits of those before, and a check.

  (weights, {'module/name': (is it finite, did the protected ones stay)}).

  Example:
    >>> phi, checks = merged(
    ...     {'w': jnp.array([True, False])},
    ...     {'w': jnp.array([-0.0, 1.])}, {'w': jnp.array([0.0, 3.])})
    >>> phi['w'], [bool(x) for x in checks['w']]
    (Array([-0.,  3.], dtype=float32), [True, True])
  """
  pairs = zip(
    trees.named_leaves(after),
    jax.tree.leaves(before),
    jax.tree.leaves(protected),
    strict=True,
  )
  checks = {
    leaf.path: (
      jnp.all(jnp.isfinite(leaf.value)),
      ~jnp.any(fixed & (leaf.value != old)),
    )
    for leaf, old, fixed in pairs
  }
  # A step of 0 turns a protected -0.0 into 0.0; this undoes it.
  return jax.tree.map(jnp.where, protected, before, after), checks


@functools.partial(jax.jit, static_argnames='shared')
def ranked(
  phi: Params,
  power: OptState,
  counts: dict[str, jax.Array],
  owned: Masks | None,
  shared: tuple[str, ...],
) -> Masks:
  """Masks of the largest |θ|; with owned weights, of the others and of these.

  Of θ, not φ: over several leaves the two rank alike only if all have one α.

  Args:
    counts: how many to keep, as for ranking.masks_from_counts.
    owned: masks like phi, or None; weights that are kept in any case, and
      neither ranked nor counted.
    shared: 'module/name' of the leaves that are masked.

  Example:
    >>> phi, owned = {'w': jnp.array([3., 2., 1.])}, None
    >>> ranked(phi, (), {'w': 1}, owned, ('w',))['w']
    Array([ True, False, False], dtype=bool)
    >>> owned = {'w': jnp.array([True, False, False])}
    >>> ranked(phi, (), {'w': 1}, owned, ('w',))['w']
    Array([ True,  True, False], dtype=bool)
  """

  def select(module_name: str, name: str, value: jax.Array) -> bool:
    del value
    return trees.join_name(module_name, name) in shared

  magnitudes = scores.magnitude(views.effective_params(phi, power))
  if owned is None:
    return ranking.masks_from_counts(magnitudes, counts, select=select)
  among = jax.tree.map(jnp.logical_not, owned)
  kept = ranking.masks_from_counts(
    magnitudes, counts, among=among, select=select
  )
  return masks_lib.union(kept, owned)
