"""The training loop: dispatch, evaluate, log, save.

It knows nothing of the network or the number of runs in the state; a sweep of
many lanes goes through the same page as a single run.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import statistics
from typing import Any

import numpy as np

from powerprop_jax.core.trees import Tree
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.runs import checks, divergence, metrics
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import preemption

Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long to train and how often to look."""

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
    checks.positive(self, *names, prefix='')


def fit(
  state: Tree,
  *,
  advance: Callable[[Any, np.ndarray], tuple[Any, Any]],
  evaluate: Callable[[Any], Any],
  indices: Callable[[int, int], np.ndarray],
  records: Callable[[Any, Any], Records],
  config: LoopConfig,
  folder: RunFolder,
  begin: Callable[[Any], None] | None = None,
  description: str = 'training',
  show_progress: bool = True,
  tensorboard: bool = False,
) -> Any:
  """Trains from the state, or from the folder's last checkpoint, to the end.

  A line is printed, once, about each network of which a logged loss is not
  finite; training goes on.

  Args:
    state: the state at step 0, one run or stacked lanes; it is donated.
    advance: jitted, (state, indices) -> (state, train_metrics).
    evaluate: jitted, state -> validation_metrics.
    indices: (start, num_steps) -> rows of the training data for these steps; a
      pure function, which is what makes resuming exact.
    records: (train_metrics, validation_metrics) -> flat records to log.
    config: lengths.
    folder: where metrics and checkpoints go.
    begin: called once with the state from which training starts or continues.
    description: what is being trained, for the progress.
    show_progress: whether to report on the standard error.
    tensorboard: whether to write TensorBoard files too.

  Returns:
    The state after config.num_steps steps.

  Raises:
    Preempted: after SIGTERM or SIGUSR1, when the dispatch under way is done
      and saved, or, with begin, which must see the state of a look, the next
      look; run_folder.run_main makes exit status 75 of it.
  """
  with (
    preemption.SignalWatch() as signals,
    checkpoint.Checkpoints(folder.checkpoints_path) as checkpoints,
  ):
    step = 0
    if folder.is_resumed:
      # The state itself, for its leaves know where they lie.
      restored = checkpoints.restore_latest(state)
      if restored is not None:
        state, step, _ = restored
    if begin is not None:
      begin(state)
    with (
      metrics.MetricsWriter(folder.metrics_path, start=step) as writer,
      metrics.Progress(
        description, config.num_steps, start=step, enabled=show_progress
      ) as progress,
      metrics.tensorboard_writer(folder.path, step, tensorboard) as board,
    ):
      watch = divergence.Watch(folder.path)
      for earlier in metrics.read_metrics(folder.metrics_path):
        watch.look(earlier['step'], [earlier])
      while step < config.num_steps:
        count = _steps_until_look(step, config)
        state, train_metrics = advance(state, indices(step, count))
        step += count
        is_look = not step % config.eval_every or step == config.num_steps
        if is_look:
          logged = records(train_metrics, evaluate(state))
          for record in logged:
            writer.write(step, record)
            board.write(step, record)
          watch.look(step, logged)
          checkpoints.save(step, state, {})
          progress.update(step, _mean(logged))
        else:
          progress.update(step)
        if signals.is_due(step) and (is_look or begin is None):
          if not is_look:
            checkpoints.save(step, state, {})
          checkpoints.wait()
          raise preemption.Preempted(step, config.num_steps)
  return state


def _steps_until_look(step: int, config: LoopConfig) -> int:
  """Steps in the next dispatch, none of which crosses an evaluation."""
  to_look = config.eval_every - step % config.eval_every
  return min(config.steps_per_dispatch, to_look, config.num_steps - step)


def _mean(records: Records) -> dict[str, float]:
  """Means over the records, for the eye."""
  names = ('loss', 'validation_accuracy')
  return {
    name: statistics.fmean(float(r[name]) for r in records if name in r)
    for name in names
  }
