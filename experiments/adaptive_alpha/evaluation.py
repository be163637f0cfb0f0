"""What can be seen of networks whose power α may change, while they train."""

import jax
import jax.numpy as jnp

import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.report.analysis import TOTAL
from powerprop_jax.train import ensemble, loop
from powerprop_jax.train.ensemble import Members

Records = list[Row]


def records(members: Members, trained: Tree, found: Tree) -> Records:
  """Flat records of what an evaluation found, stacked over the members.

  Returns:
    For each member a record with key, start_alpha, leaf 'total', the metrics,
    validation_loss, validation_accuracy, near_zero, jump, and power, the α of
    the moment; where leaves have an α each, that is in records of their own
    with leaf and power. The metrics, trained, are means since the last
    evaluation.
  """
  trained, found = jax.device_get((trained, found))
  rows: Records = []
  for index, (alpha, key) in enumerate(zip(*members, strict=True)):
    place = {'key': int(key), 'start_alpha': float(alpha)}
    seen = ensemble.take(found, index)
    means = ensemble.take(trained, index)
    total = {
      **loop.record(means, seen['scores'], **place),
      'leaf': TOTAL,
      'near_zero': float(seen['near_zero']),
      'jump': float(seen['jump']),
    }
    power = seen['power']
    if isinstance(power, dict):
      rows.append(total)
      rows += [
        {**place, 'leaf': path, 'power': float(value)}
        for path, value in trees.by_path(power).items()
      ]
    else:
      rows.append({**total, 'power': float(power)})
  return rows


def power_of(opt_state: OptState) -> Tree:
  """α as the optimiser state holds it: a scalar, or a tree by leaf."""
  (power,) = trees.find_states(opt_state, pp.PowerState)
  return power.alpha


def share_near_zero(theta: Params, epsilon: float) -> jax.Array:
  """Share of the selected weights with |θ| < ε, all layers together.

  float32 scalar; NaN if a weight is not finite.

  Example:
    >>> theta = {'linear': {'w': jnp.array([[0.5, -0.001]])}}
    >>> share_near_zero(theta, 0.01)
    Array(0.5, dtype=float32)
  """
  chosen = [
    leaf.value for leaf in trees.named_leaves(theta) if pp.is_weight(*leaf)
  ]
  # Counts are exact integers; their sum is divided once.
  near = jnp.stack([jnp.sum(jnp.abs(value) < epsilon) for value in chosen])
  is_finite = jnp.stack([jnp.all(jnp.isfinite(value)) for value in chosen])
  size = jnp.float32(sum(value.size for value in chosen))
  share = jnp.sum(near).astype(jnp.float32) / size
  return jnp.where(jnp.all(is_finite), share, jnp.nan)
