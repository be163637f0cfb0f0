"""What happens to the masks while a network trains, look by look."""

import jax
import numpy as np

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Select
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import topology, views
from powerprop_jax.train.ensemble import Lanes
from powerprop_jax.train.state import TrainState

# Masks by 'module/name'.
MasksByLeaf = Row


def masks_of(
  state: TrainState, select: Select = select_lib.is_weight
) -> MasksByLeaf:
  """The masks of the selected leaves of one lane; none of a dense network.

  Args:
    state: the state of one lane, possibly traced.
    select: which leaves.

  Returns:
    {'module/name': mask}.
  """
  if topology.find_sparse_state(state.opt_state) is None:
    return {}
  masks = views.current_masks(state.phi, state.opt_state)
  weights, found = map(trees.named_leaves, (state.phi, masks))
  return {
    weight.path: mask.value
    for weight, mask in zip(weights, found, strict=True)
    if select(*weight)
  }


def stacked_masks(state: TrainState) -> MasksByLeaf:
  """The masks of all lanes of a stacked state, on the host."""
  return jax.device_get(jax.jit(jax.vmap(masks_of))(state))


class MaskWatch:
  """Counts the connections that changed since the last look, and the start.

  It keeps the masks of the start and of the last look on the host, one byte a
  weight and lane.
  """

  def __init__(self, state: TrainState):
    """Remembers the masks of the start.

    Args:
      state: stacked states before their first step.
    """
    self._first = self._last = stacked_masks(state)

  def begin(self, state: TrainState) -> None:
    """Remembers the masks of the last look before an interruption.

    Args:
      state: stacked states from which training continues.
    """
    self._last = stacked_masks(state)

  def records(self, lanes: Lanes, masks: MasksByLeaf) -> list[Row]:
    """What one look finds, and the reference for the next one.

    Args:
      lanes: the runs.
      masks: the masks now, stacked, on the host.

    Returns:
      For each lane a record of all layers together, with alpha, key, churn and
      churn_from_start: the share of the connections now that were not there at
      the last look, and at the start. Then one for each layer, with alpha, key,
      layer and density. Nothing for a dense network.
    """
    found: list[Row] = []
    if masks:
      for lane, (alpha, key) in enumerate(zip(*lanes, strict=True)):
        name = {'alpha': float(alpha), 'key': int(key)}
        found.append(
          {
            **name,
            'churn': _share_new(masks, self._last, lane),
            'churn_from_start': _share_new(masks, self._first, lane),
          }
        )
        found += [
          {**name, 'layer': layer, 'density': float(mask[lane].mean())}
          for layer, mask in masks.items()
        ]
    self._last = masks
    return found


def density(masks: MasksByLeaf, lane: int) -> float:
  """Share of the weights of a lane that are connections; 1 without masks."""
  if not masks:
    return 1.0
  connections = sum(int(np.sum(mask[lane])) for mask in masks.values())
  return connections / sum(mask[lane].size for mask in masks.values())


def _share_new(now: MasksByLeaf, before: MasksByLeaf, lane: int) -> float:
  connections = sum(int(np.sum(mask[lane])) for mask in now.values())
  new = sum(
    int(np.sum(mask[lane] & ~before[leaf][lane])) for leaf, mask in now.items()
  )
  return new / connections
