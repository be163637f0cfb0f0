"""One trained network as a function of its inputs, in each form it can take.

    form = condensed(fn, exported, images)
    logits = jax.jit(form.run)(form.parameters, images)

The network is fn(theta, *args), in any library, where theta is in the
containers of the exported one. All forms compute the same up to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.export.exported import Exported
from powerprop_jax.sparse import network
from powerprop_jax.sparse.network import Execution, WithoutZeros

# A network: of (theta, *args).
Function: TypeAlias = Callable[..., Any]


class Form(NamedTuple):
  """A network, run(parameters, *args), to be jitted; what it computes with."""

  run: Function
  parameters: Params


class Plan(NamedTuple):
  """How a network is computed without its zeros.

  Attributes:
    run: of the connections.
    masks: of the leaves that are condensed, all True for the others.
  """

  run: WithoutZeros
  masks: Masks


def dense(fn: Function, exported: Exported) -> Form:
  """Dense products with θ, whose zeros are multiplied like all other weights.

  The parameters of the form are theta.
  """
  return Form(fn, _on_device(exported.theta))


def masked(fn: Function, exported: Exported) -> Form:
  """Dense products with θ ⊙ M, multiplied out in every call.

  The parameters of the form are theta and masks.
  """

  def run(parameters: Params, *args: Any) -> Any:
    return fn(masks_lib.apply_masks(*parameters), *args)

  return Form(run, _on_device((exported.theta, exported.masks)))


def condensed(fn: Function, exported: Exported, *args: Any) -> Form:
  """The network without its zeros, for arguments like these; see plan.

  The parameters of the form are the connections of the leaves that are
  condensed, and θ ⊙ M of the others.
  """
  theta, masks = _on_device(exported.theta), _on_device(exported.masks)
  theta = masks_lib.apply_masks(theta, masks)
  found = plan(fn, exported.masks, theta, *args)
  return Form(found.run, network.condense(theta, found.masks))


def plan(
  fn: Function,
  masks: Masks,
  theta: Params,
  *args: Any,
  execution: Execution = 'condensed',
) -> Plan:
  """Which leaves a network multiplies without their zeros; see without_zeros.

  None with more connections than zeros, as a value and its position take twice
  the memory of a value. Gradients do not count in what is faster.
  """
  masks = _filled(
    masks, lambda leaf: 2 * np.count_nonzero(leaf.value) > np.size(leaf.value)
  )
  run = network.without_zeros(fn, masks, theta, *args, execution=execution)
  is_dense = {n for n, leaf in run.leaves.items() if leaf.held == 'dense'}
  return Plan(run, _filled(masks, lambda leaf: leaf.path in is_dense))


def _filled(masks: Masks, where: Callable[[trees.NamedLeaf], Any]) -> Masks:
  """The masks, all True at some leaves."""
  return trees.map_leaves(
    lambda leaf: (
      np.ones(np.shape(leaf.value), bool) if where(leaf) else leaf.value
    ),
    masks,
  )


def _on_device(tree: Tree) -> Tree:
  return jax.tree.map(jnp.asarray, tree)
