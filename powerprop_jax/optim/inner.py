"""What sparsify has to know of the optimiser inside: its slots, what it moves.

optax.tree.map_params finds, in the state of any optimiser, the trees that are
like the parameters. Some have one array a weight (momenta), some less (the rows
and columns of factored moments), some nothing (masked leaves).

A leaf is frozen if the step on it does not depend on the gradient, and masked
if its mask is drawn or rewired: both are read off the programs.
"""

from collections.abc import Callable
import warnings

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.optim.topology import Rewiring, SparseState, Topology

# Wrappers that show their inner transformation only some of the leaves.
PARTIAL = (optax.MaskedState, optax.transforms.PartitionState)


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


def warn_of_frozen(
  inner: optax.GradientTransformation,
  topology: Topology,
  state: SparseState,
  phi: Params,
) -> None:
  """Warns of leaves that inner never moves, but that the topology masks."""
  is_partial = trees.find_states(state.inner_state, *PARTIAL)
  if not (is_partial and jax.tree.leaves(phi)):
    return
  inner = optax.with_extra_args_support(inner)
  try:
    moved = _outputs_that_depend(
      lambda grads: inner.update(grads, state.inner_state, phi)[0], phi
    )
  except Exception:  # It needs more, such as the loss, which is not known yet.
    return
  drawn = _outputs_that_depend(
    lambda key: topology.init(jax.random.wrap_key_data(key), phi)[0],
    jnp.zeros(2, jnp.uint32),
  )
  rewired = [False] * len(drawn)
  if (rewire := topology.rewire) is not None:
    key, old = jax.random.key(0), (state.step, state.masks, state.memory)
    rewired = _outputs_that_depend(
      lambda theta: rewire(Rewiring(key, *old, theta, phi))[0], phi
    )
  names = [leaf.path for leaf in trees.named_leaves(phi)]
  frozen = [
    repr(name)
    for name, *is_so in zip(names, moved, drawn, rewired, strict=True)
    if not is_so[0] and (is_so[1] or is_so[2])
  ]
  if frozen:
    warnings.warn(
      f'the optimiser inside sparsify never moves {", ".join(frozen)}, but its '
      'topology takes connections away there. Leave frozen leaves out of the '
      "topology's select, for instance select=exclude(is_weight, pattern).",
      stacklevel=3,
    )


def _outputs_that_depend(fn: Callable[[Tree], Tree], given: Tree) -> list[bool]:
  """For each leaf that fn returns, whether anything in it comes of `given`."""
  jaxpr = jax.make_jaxpr(fn)(given).jaxpr
  reached = set(map(id, jaxpr.invars))
  for eqn in jaxpr.eqns:
    if any(id(variable) in reached for variable in eqn.invars):
      reached.update(map(id, eqn.outvars))
  return [id(variable) in reached for variable in jaxpr.outvars]
