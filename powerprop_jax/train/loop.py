"""The training loop: dispatch, evaluate, log, save.

For data that fit in memory: they lie on the device, and a batch is a row of
indices. It knows nothing of the network or of the number of runs in the state;
an ensemble goes through the same page as a single network, see ensemble.mapped.
scale/stream_loop.py is for data that are read while training goes on.

    state = loop.fit(
      state.create(net, tx, key, splits.example), step.make_advance(net, tx),
      evaluate.on_state(net), splits, LoopConfig(), folder,
      indices=functools.partial(splits.batch_indices, 0))
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import statistics
from typing import TypeVar

import jax
import numpy as np

from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Splits
from powerprop_jax.train.runs import divergence, errors, metrics
from powerprop_jax.train.runs import writers as writers_lib
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.runs.writers import Writer
from powerprop_jax.train.scale import preemption

Records = Sequence[Row]
# The state of one network, or of many.
S = TypeVar('S')


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long to train and how often to evaluate."""

  # Training steps in all.
  num_steps: int = 10_000
  # Examples in a batch.
  batch_size: int = 60
  # Steps between two evaluations on the validation split, each of which is also
  # logged and saved; an interrupted run continues from the last one.
  eval_every: int = 1_000
  # Steps compiled into one dispatch to the device.
  steps_per_dispatch: int = 250

  def __post_init__(self) -> None:
    names = (field.name for field in dataclasses.fields(self))
    errors.check_positive(self, *names, prefix='')


def record(trained: Tree, scores: Tree, **name: float) -> Row:
  """What an evaluation of one network found, flat.

  These are means over the steps before it, and scores of the validation split;
  the name tells the network from others, such as alpha and key.

  Example:
    >>> record({'loss': 2.0}, {'accuracy': 0.5}, key=0)
    {'key': 0, 'loss': 2.0, 'validation_accuracy': 0.5}
  """
  found = {**trained, **{f'validation_{key}': scores[key] for key in scores}}
  return {**name, **{key: float(value) for key, value in found.items()}}


def fit(
  state: S,
  advance: Callable[[S, Arrays, jax.Array], tuple[S, Tree]],
  evaluate: Callable[[S, Arrays], Tree],
  splits: Splits,
  config: LoopConfig,
  folder: RunFolder,
  *,
  indices: Callable[[int, int, int, int], np.ndarray],
  records: Callable[[Tree, Tree], Records] = lambda *found: [record(*found)],
  begin: Callable[[S], None] | None = None,
  description: str = 'training',
  writers: Sequence[Writer] = (),
) -> S:
  """Trains from the state, or from the folder's last checkpoint, to the end.

  A line is printed, once, about each network of which a logged loss is not
  finite; training goes on.

  Args:
    state: the state at step 0, of one network or stacked; it is donated.
    advance: (state, training split, rows of it) -> (state, train_metrics), a
      pure function; see step.make_advance.
    evaluate: (state, validation split) -> what an evaluation finds, likewise.
    splits: the data; train and validation are moved to the device.
    indices: (start, num_steps, batch_size, num_examples) -> rows of the
      training split; a pure function, which is what makes resuming exact.
    records: (train_metrics, what was found) -> flat records to log.
    begin: called once with the state from which training starts or continues.
    description: what is being trained, for the progress; '' for no progress.
    writers: what gets the numbers of each record beside metrics.jsonl, see
      runs/writers.py; closed at the end.

  Raises:
    Preempted: after SIGTERM or SIGUSR1, when the dispatch under way is done
      and saved, or, with begin, which must see the state of an evaluation, the
      next one; folder.run_main makes exit status 75 of it.
  """
  train, validation = jax.device_put((splits.train, splits.validation))
  num_examples = len(splits.train.labels)
  advance = jax.jit(advance, donate_argnums=0)
  evaluate = jax.jit(evaluate)
  with (
    preemption.SignalWatch() as signals,
    checkpoint.Checkpoints(folder.checkpoints_path) as checkpoints,
    contextlib.ExitStack() as stack,
  ):
    for writer in writers:
      stack.callback(writer.close)
    step = 0
    if folder.is_resumed:
      # The state itself, for its leaves know where they lie.
      restored = checkpoints.restore_latest(state)
      if restored is not None:
        state, step, _ = restored
    if begin is not None:
      begin(state)
    with (
      metrics.MetricsWriter(folder.metrics_path, start=step) as log,
      progress_lib.Progress(
        description, config.num_steps, start=step
      ) as progress,
    ):
      watch = divergence.Watch(folder.path)
      watch.look(metrics.read_metrics(folder.metrics_path))
      while step < config.num_steps:
        count = _steps_until_evaluation(step, config)
        rows = indices(step, count, config.batch_size, num_examples)
        state, train_metrics = advance(state, train, rows)
        step += count
        is_due = not step % config.eval_every or step == config.num_steps
        if is_due:
          logged = records(train_metrics, evaluate(state, validation))
          for found in logged:
            log.write(step, found)
            for writer in writers:
              writer.write(step, writers_lib.numbers(found))
          watch.look([{'step': step, **found} for found in logged])
          checkpoints.save(step, state, {})
          progress.update(step, _mean(logged))
        else:
          progress.update(step)
        if signals.is_due(step) and (is_due or begin is None):
          if not is_due:
            checkpoints.save(step, state, {})
          checkpoints.wait()
          raise preemption.Preempted(step, config.num_steps)
  return state


def _steps_until_evaluation(step: int, config: LoopConfig) -> int:
  """Steps in the next dispatch, none of which crosses an evaluation."""
  left = config.eval_every - step % config.eval_every
  return min(config.steps_per_dispatch, left, config.num_steps - step)


def _mean(records: Records) -> dict[str, float]:
  """Means over the records, for the eye."""
  names = ('loss', 'validation_accuracy')
  return {
    name: statistics.fmean(float(r[name]) for r in records if name in r)
    for name in names
  }
