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

# A network: of (theta, *args).
Function: TypeAlias = Callable[..., Any]


class Form(NamedTuple):
  """A network and what it computes with: run(parameters, *args), to be jitted.

  Attributes:
    missing: {'module/name': why} of the leaves that lack connections and are
      multiplied dense in spite of it.
  """

  run: Function
  parameters: Params
  missing: dict[str, str]


def dense(fn: Function, exported: Exported) -> Form:
  """Dense products with θ, whose zeros are multiplied like all other weights.

  The parameters of the form are theta.
  """
  return Form(fn, _on_device(exported.theta), {})


def masked(fn: Function, exported: Exported) -> Form:
  """Dense products with θ ⊙ M, multiplied out in every call.

  The parameters of the form are theta and masks.
  """

  def run(parameters: Params, *args: Any) -> Any:
    return fn(masks_lib.apply_masks(*parameters), *args)

  return Form(run, _on_device((exported.theta, exported.masks)), {})


def condensed(fn: Function, exported: Exported, *args: Any) -> Form:
  """The network without its zeros; see without_zeros.

  The parameters of the form are the connections of the leaves that are
  condensed, and θ ⊙ M of the others. A leaf with more connections than zeros is
  among these, as a value and its position take twice the memory of a value.

  Args:
    *args: of the network, or their shapes.
  """
  theta = _on_device(exported.theta)
  theta = masks_lib.apply_masks(theta, _on_device(exported.masks))
  masks = worth_condensing(exported.masks)
  run = network.without_zeros(fn, masks, theta, *args, execution='condensed')
  missing = {
    name: leaf.why for name, leaf in run.leaves.items() if leaf.held == 'dense'
  }
  masks = _filled(masks, lambda leaf: leaf.path in missing)
  return Form(run, network.condense(theta, masks), missing)


def worth_condensing(masks: Masks) -> Masks:
  """The masks, all True where more than half of the weights exist.

  Example:
    >>> worth_condensing({'a': np.eye(2) > 0, 'b': np.arange(3) > 0})
    {'a': array([[ True, False],
           [False,  True]]), 'b': array([ True,  True,  True])}
  """
  return _filled(masks, lambda leaf: np.mean(leaf.value) > 0.5)


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
