"""Layers that an optimiser leaves alone and a topology does not.

Read off the programs: a leaf is frozen if the step on it does not depend on the
gradient, and masked if its mask is drawn or rewired.
"""

from collections.abc import Callable
import warnings

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.optim.topology import Rewiring, Topology

# Without one of these no leaf is treated apart, and nothing needs a look.
_PARTIAL = (optax.MaskedState, optax.transforms.PartitionState)


def warn_of_frozen(
  inner: optax.GradientTransformation,
  topology: Topology,
  inner_state: OptState,
  phi: Params,
  masks: Masks,
  memory: Tree,
) -> None:
  """Warns of leaves that inner never moves, but that the topology masks."""
  is_partial = trees.find_states(inner_state, *_PARTIAL)
  if not (is_partial and jax.tree.leaves(phi)):
    return
  inner = optax.with_extra_args_support(inner)
  try:
    moved = _outputs_that_depend(
      lambda grads: inner.update(grads, inner_state, phi)[0], phi
    )
  except Exception:  # It needs more, such as the loss, which is not known yet.
    return
  drawn = _outputs_that_depend(
    lambda key: topology.init(jax.random.wrap_key_data(key), phi)[0],
    jnp.zeros(2, jnp.uint32),
  )
  rewired = [False] * len(drawn)
  if (rewire := topology.rewire) is not None:
    key, step = jax.random.key(0), jnp.int32(0)
    rewired = _outputs_that_depend(
      lambda theta: rewire(Rewiring(key, step, masks, memory, theta, phi))[0],
      phi,
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
