"""What an Optax optimiser remembers of single weights: its slots.

optax.tree.map_params finds, in the state of any optimiser, the trees that are
like the parameters. Some have one array a weight (momenta), some less (the rows
and columns of factored moments), some nothing (masked leaves).
"""

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Tree


def check_known(
  inner: optax.GradientTransformation, inner_state: OptState
) -> None:
  """Refuses an optimiser whose slots cannot be told apart by weight.

  optax.tree.map_params needs an init that accepts a tree without leaves.
  """
  try:
    optax.tree.map_params(inner, lambda slot: slot, inner_state)
  except Exception as error:
    raise ValueError(
      'the optimiser inside sparsify does not keep its slots by leaf, so that '
      'those of dropped and new connections could not be cleared: '
      f'optax.tree.map_params finds none ({str(error).splitlines()[0]}). Leave '
      'out optax.flatten, which lays all weights in one vector; the numbers '
      'are the same.'
    ) from error


def renewed(
  inner: optax.GradientTransformation,
  inner_state: OptState,
  fresh: OptState,
  changed: Masks,
) -> OptState:
  """inner_state, with the slots of changed weights taken from fresh.

  The two may differ in static fields, such as an α that was changed, but not in
  their arrays; so it goes through these in order.
  """

  def choose(slots: Tree, changed: Masks) -> Tree:
    """For each array in a tree like the parameters where to renew it."""
    # What stands for a leaf is mostly an array, but may be a tree, or empty.
    return jax.tree.map(
      lambda w, slot: jax.tree.map(
        # Factored slots belong to rows and columns, not to weights.
        lambda x: w if jnp.shape(x) == jnp.shape(w) else False,
        slot,
      ),
      changed,
      slots,
    )

  chosen = optax.tree.map_params(
    inner,
    choose,
    fresh,
    changed,
    transform_non_params=lambda _: False,
    is_leaf=lambda _: True,  # a whole tree like the parameters at a time
  )
  olds, structure = jax.tree.flatten(inner_state)
  leaves = zip(
    jax.tree.leaves(chosen), jax.tree.leaves(fresh), olds, strict=True
  )
  return jax.tree.unflatten(
    structure,
    [
      old if where is False else jnp.where(where, new.astype(old.dtype), old)
      for where, new, old in leaves
    ],
  )
