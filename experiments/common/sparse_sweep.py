"""Training and scoring a network with one method of sparse training.

The lanes differ in their key alone: α is a Python number and compiled in.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import optax

from experiments.common import mask_watch
from experiments.common.mask_watch import MaskWatch
from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.train import condensed, sweep
from powerprop_jax.train import ensemble as lanes_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.ensemble import Lanes
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import fusing
from powerprop_jax.train.state import TrainState


def train(
  net: hk.TransformedWithState,
  make_tx: Callable[[jax.Array], optax.GradientTransformation],
  lanes: Lanes,
  splits: data.Splits,
  config: LoopConfig,
  folder: RunFolder,
  *,
  state: TrainState | None = None,
  prepare: step_lib.Prepare = data.to_float,
  augment: step_lib.Augment | None = None,
  at_once: int | None = 1,
  execution: condensed.Execution = 'masked',
  make_net: condensed.MakeNet | None = None,
  **options: Any,
) -> TrainState:
  """Trains a network once for every key.

  Args:
    net: a network from nets.make.
    make_tx: from a PRNG key to a gradient transformation over φ; α is in it.
    lanes: the runs, of that α.
    splits: the data.
    config: lengths.
    folder: where metrics and checkpoints go. At each look metrics.jsonl gets,
      beside the scores, what MaskWatch.records says.
    state: the stacked states to start from, which are donated; None is what
      initial_states gives.
    prepare: see step.make_step.
    augment: see step.make_step.
    at_once: keys computed side by side; None is all of them. Condensed, they
      are computed one by one.
    execution: see condensed.layout.
    make_net: the network with supports; needed unless execution is 'masked'.
    **options: more arguments of loop.fit.

  Returns:
    The stacked final states.
  """
  if state is None:
    state = initial_states(net, make_tx, lanes, splits)
  tx = make_tx(jax.random.key(0))  # the state has the key that counts
  layout = condensed.Layout({}, {})
  if execution != 'masked':
    assert make_net is not None
    batch = splits.train.images[: config.batch_size]
    layout = condensed.layout(
      state, tx=tx, make_net=make_net, images=batch, execution=execution
    )
  if layout.shapes:
    assert make_net is not None
    at_once = 1
    advance = condensed.make_advance(
      net, make_net, tx, layout, prepare=prepare, augment=augment
    )
  else:
    advance = fusing.make_advance(net, tx, prepare=prepare, augment=augment)
  score = step_lib.make_evaluate(net, prepare=prepare)
  watch = MaskWatch(state)

  def look(state: TrainState, arrays: Arrays) -> Any:
    scores = score(state.theta, state.net_state, arrays)
    return scores, mask_watch.masks_of(state)

  def records(lanes: Lanes, trained: Any, found: Tree) -> list[Row]:
    scores, masks = jax.device_get(found)
    scored = sweep.score_records(lanes, trained, scores)
    return [*scored, *watch.records(lanes, masks)]

  return sweep.fit(
    state,
    advance,
    look,
    lanes,
    splits,
    config,
    folder,
    at_once=at_once,
    records=records,
    begin=watch.begin,
    **options,
  )


def initial_states(
  net: hk.TransformedWithState,
  make_tx: Callable[[jax.Array], optax.GradientTransformation],
  lanes: Lanes,
  splits: data.Splits,
) -> TrainState:
  """The stacked states of all lanes before their first step."""
  images = data.to_float(splits.train.images[:1])
  return lanes_lib.create_by_key(net, make_tx, lanes, images)


def results(
  net: hk.TransformedWithState,
  state: TrainState,
  lanes: Lanes,
  splits: data.Splits,
  *,
  prepare: step_lib.Prepare = data.to_float,
) -> list[Row]:
  """What came out, one record for each lane.

  Args:
    net: the network.
    state: the stacked final states.
    lanes: the runs.
    splits: the data.
    prepare: as in training.

  Returns:
    Records with alpha, key, density_measured (the share of weights that are
    connections), accuracy and loss of the test split, and validation_accuracy.
  """
  score = step_lib.make_evaluate(net, prepare=prepare)
  mapped = jax.jit(
    lambda state, arrays: lanes_lib.map_lanes(
      lambda s: score(s.theta, s.net_state, arrays), 1
    )(state)
  )
  test, validation = (
    jax.device_get(mapped(state, jax.device_put(arrays)))
    for arrays in (splits.test, splits.validation)
  )
  masks = mask_watch.stacked_masks(state)
  return [
    {
      'alpha': float(alpha),
      'key': int(key),
      'density_measured': mask_watch.density(masks, lane),
      'accuracy': float(test['accuracy'][lane]),
      'loss': float(test['loss'][lane]),
      'validation_accuracy': float(validation['accuracy'][lane]),
    }
    for lane, (alpha, key) in enumerate(zip(*lanes, strict=True))
  ]
