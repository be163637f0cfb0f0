"""What happens to the masks while a network trains, by evaluation."""

import jax
import numpy as np

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import topology, views
from powerprop_jax.train import ensemble
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.step import TrainState

# Masks by 'module/name'.
MasksByLeaf = Row


def masks_of(state: TrainState) -> MasksByLeaf:
  """The masks of the weights of one network; none of a dense network."""
  if topology.find_sparse_state(state.opt_state) is None:
    return {}
  masks = views.current_masks(state.phi, state.opt_state)
  weights, found = map(trees.named_leaves, (state.phi, masks))
  return {
    weight.path: mask.value
    for weight, mask in zip(weights, found, strict=True)
    if select_lib.is_weight(*weight)
  }


def stacked_masks(state: TrainState) -> MasksByLeaf:
  """The masks of all members of a stacked state, on the host."""
  return jax.device_get(jax.jit(jax.vmap(masks_of))(state))


class MaskWatch:
  """Counts connections that changed since the last evaluation, and the start.

  It keeps the masks of both on the host, one byte a weight and member.

  Args:
    state: stacked states before their first step.
  """

  def __init__(self, state: TrainState):
    self._first = self._last = stacked_masks(state)

  def begin(self, state: TrainState) -> None:
    """Remembers the masks of stacked states from which training continues."""
    self._last = stacked_masks(state)

  def records(self, members: Members, masks: MasksByLeaf) -> list[Row]:
    """What one evaluation finds, and the reference for the next one.

    The masks are stacked, on the host.

    Returns:
      For each member a record of all layers together, with alpha, key, churn
      and churn_from_start: the share of the connections now that were not there
      at the last evaluation, and at the start. Then one for each layer, with
      alpha, key, layer and density. Nothing for a dense network.
    """
    found: list[Row] = []
    for index, name in enumerate(ensemble.names(members) if masks else []):
      now, last, first = (
        ensemble.take(m, index) for m in (masks, self._last, self._first)
      )
      churn = {
        'churn': _share_new(now, last),
        'churn_from_start': _share_new(now, first),
      }
      found.append(name | churn)
      found += [
        {**name, 'layer': layer, 'density': float(mask.mean())}
        for layer, mask in now.items()
      ]
    self._last = masks
    return found


def density(masks: MasksByLeaf) -> float:
  """Share of the weights that are connections; 1 without masks."""
  if not masks:
    return 1.0
  connections = sum(int(np.sum(mask)) for mask in masks.values())
  return connections / sum(mask.size for mask in masks.values())


def _share_new(now: MasksByLeaf, before: MasksByLeaf) -> float:
  connections = sum(int(np.sum(mask)) for mask in now.values())
  new = sum(int(np.sum(mask & ~before[leaf])) for leaf, mask in now.items())
  return new / connections
