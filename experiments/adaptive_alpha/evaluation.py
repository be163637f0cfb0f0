"""What can be seen of lanes whose power α may change, while they train."""

from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.report.analysis import TOTAL
from powerprop_jax.train.ensemble import Members

Records = list[Row]


def look_records(lanes: Members, trained: Any, found: Tree) -> Records:
  """Flat records of what a look at the lanes found.

  Args:
    lanes: the runs.
    trained: stacked loss and accuracy, means since the last look.
    found: what the look found, stacked.

  Returns:
    For each lane a record with key, start_alpha, leaf 'total', the metrics,
    validation_loss, validation_accuracy, near_zero, jump, and power, the α of
    the moment; where leaves have an α each, that is in records of their own
    with leaf and power.
  """
  trained, found = jax.device_get((trained, found))
  records: Records = []
  for lane, (alpha, key) in enumerate(zip(*lanes, strict=True)):
    place = {'key': int(key), 'start_alpha': float(alpha)}
    total = {
      **place,
      'leaf': TOTAL,
      **{name: float(value[lane]) for name, value in trained.items()},
      **{
        f'validation_{name}': float(value[lane])
        for name, value in found['scores'].items()
      },
      'near_zero': float(found['near_zero'][lane]),
      'jump': float(found['jump'][lane]),
    }
    power = found['power']
    if isinstance(power, dict):
      records.append(total)
      records += [
        {**place, 'leaf': leaf.path, 'power': float(leaf.value[lane])}
        for leaf in trees.named_leaves(power)
      ]
    else:
      records.append({**total, 'power': float(power[lane])})
  return records


def power_of(opt_state: OptState) -> Tree:
  """α as the optimiser state holds it: a scalar, or a tree by leaf."""
  (power,) = trees.find_states(opt_state, PowerState)
  return power.alpha


def share_near_zero(theta: Params, epsilon: float) -> jax.Array:
  """Share of the selected weights with |θ| < ε, all layers together.

  Args:
    theta: effective parameters.
    epsilon: the distance from zero.

  Returns:
    float32 scalar; NaN if a weight is not finite.

  Example:
    >>> theta = {'linear': {'w': jnp.array([[0.5, -0.001]])}}
    >>> share_near_zero(theta, 0.01)
    Array(0.5, dtype=float32)
  """
  chosen = [
    leaf.value
    for leaf in trees.named_leaves(theta)
    if select_lib.is_weight(*leaf)
  ]
  # Counts are exact integers; their sum is divided once.
  near = jnp.stack([jnp.sum(jnp.abs(value) < epsilon) for value in chosen])
  is_finite = jnp.stack([jnp.all(jnp.isfinite(value)) for value in chosen])
  size = jnp.float32(sum(value.size for value in chosen))
  share = jnp.sum(near).astype(jnp.float32) / size
  return jnp.where(jnp.all(is_finite), share, jnp.nan)
