"""Training a network for many α and keys, and pruning what came out.

The glue between lanes, which know how to stack runs, and the loop, which knows
how to train and save whatever it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Select, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble as lanes_lib
from powerprop_jax.train import loop
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.ensemble import Lanes
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.runs import divergence, metrics
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.state import TrainState


def train(
  net: hk.TransformedWithState,
  make_tx: Callable[[Any], optax.GradientTransformation],
  lanes: Lanes,
  splits: data.Splits,
  config: LoopConfig,
  folder: RunFolder,
  *,
  at_once: int | None = None,
  tensorboard: bool = False,
) -> TrainState:
  """Trains a network once for every lane.

  Args:
    net: a network from nets.make.
    make_tx: from α, an array, to a gradient transformation over φ.
    lanes: the runs.
    splits: the data; it is moved to the device.
    config: lengths.
    folder: where metrics and checkpoints go.
    at_once: lanes computed side by side; None is all of them, 1 needs the least
      memory.
    tensorboard: whether to write TensorBoard files too.

  Returns:
    The stacked final states.
  """
  # The update reads α from the state, so any α builds the same step.
  advance = step_lib.make_advance(net, make_tx(jnp.float32(1)))
  score = step_lib.make_evaluate(net)
  return fit(
    initial_states(net, make_tx, lanes, splits),
    advance,
    lambda state, arrays: score(state.theta, state.net_state, arrays),
    lanes,
    splits,
    config,
    folder,
    at_once=at_once,
    tensorboard=tensorboard,
  )


def fit(
  state: Tree,
  advance: Callable[[Any, Arrays, jax.Array], tuple[Any, Any]],
  evaluate: Callable[[Any, Arrays], Any],
  lanes: Lanes,
  splits: data.Splits,
  config: LoopConfig,
  folder: RunFolder,
  *,
  at_once: int | None = None,
  records: Callable[[Lanes, Any, Any], loop.Records] | None = None,
  start: int = 0,
  **options: Any,
) -> Any:
  """Trains the stacked states of many lanes in one program.

  Args:
    state: the states before the first step, TrainStates or what else advance
      and evaluate take; they are donated.
    advance: many steps of one lane, from step.make_advance.
    evaluate: (state, validation split) -> what a look at one lane finds.
    lanes: the runs.
    splits: the data; it is moved to the device.
    config: lengths.
    folder: where metrics and checkpoints go.
    at_once: lanes computed side by side; None is all of them, 1 needs the least
      memory.
    records: (lanes, train_metrics, found) -> flat records to log, from what
      advance and evaluate gave, stacked; None is score_records.
    start: steps that the runs have behind them in the order of their data.
    **options: more arguments of loop.fit.

  Returns:
    The stacked final states.
  """
  train_arrays, validation = jax.device_put((splits.train, splits.validation))
  mapped_advance = jax.jit(
    lambda state, arrays, indices: lanes_lib.map_lanes(
      lambda s, i: advance(s, arrays, i), at_once
    )(state, indices),
    donate_argnums=0,
  )
  mapped_evaluate = jax.jit(
    lambda state, arrays: lanes_lib.map_lanes(
      lambda s: evaluate(s, arrays), at_once
    )(state)
  )
  to_records = score_records if records is None else records
  return loop.fit(
    state,
    advance=lambda state, indices: mapped_advance(state, train_arrays, indices),
    evaluate=lambda state: mapped_evaluate(state, validation),
    indices=lambda first, count: lanes_lib.batch_indices(
      lanes, start + first, count, config.batch_size, len(splits.train.labels)
    ),
    records=lambda *found: to_records(lanes, *found),
    config=config,
    folder=folder,
    **options,
  )


def initial_states(
  net: hk.TransformedWithState,
  make_tx: Callable[[Any], optax.GradientTransformation],
  lanes: Lanes,
  splits: data.Splits,
) -> TrainState:
  """The stacked states of all lanes before their first step."""
  images = data.to_float(splits.train.images[:1])
  return lanes_lib.create(net, make_tx, lanes, images)


def prune(
  net: hk.TransformedWithState,
  state: TrainState,
  lanes: Lanes,
  arrays: Arrays,
  sparsities: Sequence[float],
  *,
  scope: str = 'layer',
  overrides: Callable[[float], Mapping[str, float]] | None = None,
  select: Select = select_lib.is_weight,
) -> list[Row]:
  """Accuracy of every lane after one-shot pruning at every sparsity.

  Args:
    net: the network.
    state: stacked states of the lanes.
    lanes: the runs.
    arrays: examples to score on.
    sparsities: shares of weights to remove, each in [0, 1).
    scope: 'layer' or 'global'; see prune.one_shot.
    overrides: from a sparsity to the sparsities of leaves by pattern.
    select: which leaves are pruned.

  Returns:
    One record for each lane and sparsity, with alpha, key, scope, sparsity,
    density, accuracy and loss; density is the share of selected weights that is
    left, leaves with a sparsity of their own included.
  """
  densities = [
    _density(state, sparsity, scope, overrides, select)
    for sparsity in sparsities
  ]
  evaluate = step_lib.make_evaluate(net)
  on_device = jax.device_put(arrays)

  @jax.jit
  def score(state: TrainState, arrays: Arrays) -> dict[str, jax.Array]:
    return lanes_lib.map_lanes(
      lambda s: one_shot.sweep(
        lambda theta: evaluate(theta, s.net_state, arrays),
        s.theta,
        sparsities,
        scope=scope,
        overrides=overrides,
        select=select,
      ),
      1,
    )(state)

  found = jax.device_get(score(state, on_device))
  return [
    {
      'alpha': float(alpha),
      'key': int(key),
      'scope': scope,
      'sparsity': float(sparsity),
      'density': densities[i],
      'accuracy': float(found['accuracy'][lane, i]),
      'loss': float(found['loss'][lane, i]),
    }
    for lane, (alpha, key) in enumerate(zip(*lanes, strict=True))
    for i, sparsity in enumerate(sparsities)
  ]


def kept_to_sparsity(kept: float) -> float:
  """Sparsity for a share of weights to keep, as the notebook states it.

  Args:
    kept: the share, in (0, 1].

  Returns:
    1 - kept as people write it: 0.9, not 0.09999999999999998, for 0.1.

  Raises:
    UserError: if kept is outside (0, 1].

  Example:
    >>> kept_to_sparsity(0.07)
    0.93
  """
  if not 0 <= round(1 - kept, 12) < 1:
    raise UserError(
      f'--kept are shares of weights to keep, in (0, 1], got {kept:g}. A '
      'sparsity of 0.9 keeps 0.1.'
    )
  return round(1 - kept, 12)


def keep_more_outputs(factor: float) -> Callable[[float], dict[str, float]]:
  """The rule by which the output layer keeps a multiple of the others' share.

  Args:
    factor: the multiple, positive; the authors' notebook has 2.

  Returns:
    Overrides for prune: sparsity -> {pattern of the output layer: sparsity}.

  Raises:
    UserError: if factor is not positive and finite.

  Example:
    >>> keep_more_outputs(2.0)(0.9)
    {'logits/w$': 0.8}

  Source:
    The authors' notebook: the last layer keeps min(1, 2p).
  """
  if not 0 < factor < float('inf'):
    raise UserError(
      f'--output-factor must be positive and finite, got {factor:g}.'
    )
  return lambda sparsity: {
    'logits/w$': max(0.0, round(1 - factor * (1 - sparsity), 12))
  }


def _density(
  state: TrainState,
  sparsity: float,
  scope: str,
  overrides: Callable[[float], Mapping[str, float]] | None,
  select: Select,
) -> float:
  """Share of the selected weights of a lane that pruning leaves."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.phi
  )
  counts = one_shot.kept_counts(
    shapes,
    sparsity,
    scope=scope,
    select=select,
    overrides=overrides(sparsity) if overrides else None,
  )
  sizes = [
    leaf.value.size for leaf in trees.named_leaves(shapes) if select(*leaf)
  ]
  return sum(counts.values()) / sum(sizes)


def score_records(
  lanes: Lanes, train_metrics: Any, validation_metrics: Any
) -> list[Row]:
  """One flat record per lane of what a look at the run found.

  Args:
    lanes: the runs.
    train_metrics: stacked loss and accuracy, means since the last look.
    validation_metrics: stacked loss and accuracy of the validation split.

  Returns:
    Records with alpha, key, loss, accuracy, validation_loss and
    validation_accuracy.
  """
  trained, validated = jax.device_get((train_metrics, validation_metrics))
  return [
    {
      'alpha': float(alpha),
      'key': int(key),
      **{name: float(value[lane]) for name, value in trained.items()},
      **{
        f'validation_{name}': float(value[lane])
        for name, value in validated.items()
      },
    }
    for lane, (alpha, key) in enumerate(zip(*lanes, strict=True))
  ]


def diverged(state: TrainState) -> np.ndarray:
  """Which lanes hold a weight that is not finite, bool[lanes]."""
  finite = [
    jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    for leaf in jax.tree.leaves(state.phi)
  ]
  return ~np.asarray(jnp.all(jnp.stack(finite), axis=0))


def say_diverged(
  lanes: Lanes, state: TrainState, folder: RunFolder
) -> list[bool]:
  """Which lanes diverged, by their weights or by what was logged last.

  A line is printed about each lane of which the loop could not say it, as its
  losses did not show it.

  Args:
    lanes: the runs.
    state: stacked final states.
    folder: that of their loop.

  Returns:
    One for each lane.
  """
  logged = divergence.lost(metrics.read_metrics(folder.metrics_path))
  found = []
  for network, leaf in lost_leaves(lanes, state).items():
    is_seen = logged.get(network, False)
    if leaf is not None and not is_seen:
      step = int(np.max(state.step))
      divergence.say_weights(folder.path, network, leaf, step)
    found.append(is_seen or leaf is not None)
  return found


def lost_leaves(
  lanes: Lanes, state: TrainState
) -> dict[divergence.Network, str | None]:
  """Of each lane the first leaf of θ that is not finite, or None."""
  theta = jax.device_get(jax.jit(jax.vmap(lambda s: s.theta))(state))
  return {
    (float(alpha), int(key)): divergence.lost_leaf(
      jax.tree.map(lambda x, i=lane: x[i], theta)
    )
    for lane, (alpha, key) in enumerate(zip(*lanes, strict=True))
  }
