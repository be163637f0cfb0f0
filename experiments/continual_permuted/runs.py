"""One run of a method, α and key: it goes through the stream, or is read.

After each task a checkpoint is saved: what the method needs to go on, as arrays
by name (of the two PackNets what continual.to_arrays gives), and what was
measured so far. Wherever a run is stopped, it continues after the last task
that it learned.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from experiments.common import combinations as combination_runs
from experiments.continual_permuted import (
  baselines,
  methods,
  packing,
  streams,
  training,
)
from experiments.continual_permuted.config import Config
from experiments.continual_permuted.methods import Approach, MethodName, Problem
from powerprop_jax.continual import metrics as continual_metrics
from powerprop_jax.files.tables import Row
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.checkpoints.checkpoint import Checkpoints
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import metrics, writers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.runs.writers import Writer

Records = list[Row]
PROGRAM = 'continual_permuted'
# What commands that export a network are told.
NO_NETWORK = (
  'several tasks share a network there, each with weights of its own. In '
  'Python, approach.params of experiments/continual_permuted/runs.py gives '
  'those of a task, and export.write writes them.'
)


class Combination(NamedTuple):
  """One run.

  Attributes:
    method: the method.
    alpha: the power; 1 for dense methods.
    key: seed of the initial weights and of the order of the data.
  """

  method: MethodName
  alpha: float
  key: int

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f'{self.method}_alpha_{self.alpha:g}_key_{self.key}'


def make_problem(config: Config, combination: Combination) -> Problem:
  """What a combination has to learn."""
  optimizer = config.optimizer
  if config.rates and combination.method in methods.SPARSE:
    rate = config.rates[config.alphas.index(combination.alpha)]
    optimizer = dataclasses.replace(optimizer, learning_rate=rate)
  stream = streams.load(config.stream, config.data)
  return Problem(
    stream=stream,
    num_classes=max(task.num_classes for task in stream),
    is_multi_head=config.stream.own_heads,
    key=combination.key,
    net=config.net,
    optimizer=optimizer,
    ewc=config.ewc,
  )


def make_approach(config: Config, combination: Combination) -> Approach:
  """How it learns that."""
  method, alpha, _ = combination
  problem = make_problem(config, combination)
  # Spelled out for the type checker.
  if method == 'efficient_packnet' or method == 'packnet':
    return packing.make(method, problem, config.packing, alpha)
  return baselines.make(method, problem)


def learn_or_read(
  config: Config, description: str, combination: Combination
) -> Records:
  """Results of a combination: learned, or read where that is done."""
  folder = combination_runs.folder(
    config, combination, PROGRAM, instead=NO_NETWORK
  )
  if folder.is_complete:
    return combination_runs.read(folder)
  results = run(
    make_approach(config, combination),
    make_problem(config, combination),
    folder,
    measure_every=config.measure_every,
    description=description,
    log=writers.of_run(folder, config),
  )
  return combination_runs.write(folder, results)


def run(
  approach: Approach,
  problem: Problem,
  folder: RunFolder,
  *,
  measure_every: int = 1,
  description: str = '',
  log: Sequence[Writer] = (),
) -> Records:
  """Learns the tasks that are not learned yet, and scores the network on them.

  Args:
    measure_every: number of tasks between two evaluations of all earlier ones;
      each task is scored right after it was learned, and all after the last.
    description: what is being done, for the progress; '' for no progress.
    log: what gets the numbers of each task beside metrics.jsonl, and the
      accuracies after it; closed at the end.

  Returns:
    Flat records: with tasks_learned (0 before any), task and accuracy, both
    counted from 1, for entries of the accuracy matrix; with tasks_learned and
    what the method says, for each task; and a last one with the metrics of the
    whole stream. If a task could not be learned, because the network was full
    or training diverged, a record has the reason as 'stopped', and the metrics
    that need its accuracy are NaN.
  """
  num_tasks, epochs = len(problem.stream), approach.epochs
  with (
    checkpoint.Checkpoints(folder.checkpoints_path) as checkpoints,
    contextlib.ExitStack() as stack,
  ):
    for other in log:
      stack.callback(other.close)
    restored = _restore(checkpoints, folder.path, approach)
    if restored is None:
      state, done = approach.init(), 0
      records = _entries(approach, problem, state, 0, range(1, num_tasks))
    else:
      state, records, done = restored
    learns = [number for number in approach.learns if number >= done]
    with (
      metrics.MetricsWriter(folder.metrics_path, start=done) as writer,
      progress_lib.Progress(
        description,
        epochs * len(approach.learns),
        unit='epochs',
        start=epochs * (len(approach.learns) - len(learns)),
      ) as progress,
    ):
      for number in learns:
        began = time.monotonic()
        task = training.prepare(problem.stream[number], number, problem.sizes)
        report = _counter(progress, epochs * approach.learns.index(number))
        try:
          state, said = approach.learn(state, task, report)
        except training.StoppedError as error:
          records.append({'tasks_learned': number, 'stopped': str(error)})
          break
        learned = number + 1
        said = {'tasks_learned': learned, **said}
        logged = {**said, 'seconds': time.monotonic() - began}
        writer.write(learned, logged)
        records.append(said)
        is_last = learned == num_tasks
        scores_all = is_last or learned % measure_every == 0
        # Earlier tasks, this one and, for the transfer, the next.
        others = range(0 if scores_all else number, learned + (not is_last))
        row = _entries(approach, problem, state, learned, others, records)
        records += row
        accuracies = {f'accuracy/task_{r["task"]}': r['accuracy'] for r in row}
        for other in log:
          other.write(learned, writers.numbers(logged) | accuracies)
        arrays = approach.to_arrays(state)
        # A copy: it is written in the background.
        checkpoints.save(learned, arrays, {'records': [*records]})
  return [*records, _summary(records, num_tasks)]


def _counter(progress: progress_lib.Progress, done: int) -> methods.Report:
  """Tells the progress about each epoch."""

  def report(loss: float) -> None:
    nonlocal done
    done += 1
    progress.update(done, {'loss': loss})

  return report


def _entries(
  approach: Approach,
  problem: Problem,
  state: Any,
  learned: int,
  others: range,
  known: Records | None = None,
) -> Records:
  """Entries of a row of the accuracy matrix, where there are weights for them.

  A task whose network nothing changes any more has its last known accuracy.
  """
  before = {r['task']: r['accuracy'] for r in known or [] if 'task' in r}
  row = []
  for number in others:
    network, accuracy = approach.params(state, number), None
    if network is not None:
      images, labels = problem.stream[number].test
      arrays = Arrays(images, labels + approach.labels_apart * number)
      arrays = training.scored(arrays, problem.sizes)
      accuracy = approach.program.accuracy(*network, arrays)
    elif number + 1 < learned:
      accuracy = before.get(number + 1)
    if accuracy is not None:
      place = {'tasks_learned': learned, 'task': number + 1}
      row.append({**place, 'accuracy': accuracy})
  return row


def _summary(records: Records, num_tasks: int) -> Row:
  """The metrics of the stream, and how far it came."""
  untrained = np.full(num_tasks, np.nan)
  learned = []
  for record in records:
    if record['tasks_learned'] == 0 and 'task' in record:
      untrained[record['task'] - 1] = record['accuracy']
    else:
      learned.append(record)
  # The first task has no score before it: it takes no part in the transfer.
  matrix = continual_metrics.accuracy_matrix(learned, num_tasks)
  return {
    'num_tasks': num_tasks,
    'tasks_fitted': max(
      (r['tasks_learned'] for r in learned if 'task' in r), default=0
    ),
    **continual_metrics.summary(matrix, untrained),
  }


def _restore(
  checkpoints: Checkpoints, path: pathlib.Path, approach: Approach
) -> tuple[Any, Records, int] | None:
  """State, records and number of tasks learned; None before any."""
  restored = checkpoints.restore_latest(None)
  if restored is None:
    if (path / 'state.npz').exists():
      raise UserError(
        f'{path} is a run of version 0.1.0, which kept its state in state.npz. '
        'Remove it to learn this stream again, or choose another --out.'
      )
    return None
  named, done, metadata = restored
  # A checkpoint calls the leaf 'a' of a dictionary "['a']".
  arrays = {name[2:-2]: array for name, array in named.leaves.items()}
  state = approach.from_arrays(arrays, approach.init())
  return state, metadata['records'], done


def read_state(path: pathlib.Path, approach: Approach) -> Any:
  """The state of a run, in its folder, after the last task that it learned."""
  with checkpoint.Checkpoints(path / 'checkpoints') as checkpoints:
    restored = _restore(checkpoints, path, approach)
  return approach.init() if restored is None else restored[0]
