"""A method goes through a stream of tasks, and is saved after each.

The file state.npz of a run holds what the method needs to go on and what was
measured so far, and is replaced in one step: wherever a run is stopped, it
continues after the last task that it learned.
"""

from collections.abc import Callable
import io
import json
import pathlib
import time
from typing import Any
import zipfile
import zlib

import numpy as np

from experiments.continual_permuted import training
from experiments.continual_permuted.methods import Method, Problem
from powerprop_jax.continual import metrics as continual_metrics
from powerprop_jax.core.trees import Tree
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import json_files, metrics
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

Records = list[Row]
STATE = 'state.npz'


def run(
  method: Method,
  problem: Problem,
  folder: RunFolder,
  *,
  measure_every: int = 1,
  description: str = '',
) -> Records:
  """Learns the tasks that are not learned yet, and scores the network on them.

  Args:
    method: how.
    problem: the stream.
    folder: where state and metrics go, and where to continue from.
    measure_every: number of tasks between two looks at all earlier ones; each
      task is scored right after it was learned, and all after the last.
    description: what is being done, for the progress; '' for no progress.

  Returns:
    Flat records: with tasks_learned (0 before any), task and accuracy, both
    counted from 1, for entries of the accuracy matrix; with tasks_learned and
    what the method says, for each task; and a last one with the metrics of the
    whole stream. If a task could not be learned, because the network was full
    or training diverged, a record has the reason as 'stopped', and the metrics
    that need its accuracy are NaN.
  """
  path = folder.path / STATE
  state, records, done = _start(method, problem, path)
  stopped = any('stopped' in record for record in records)
  learns = [n for n in method.learns if n >= done and not stopped]
  with (
    metrics.MetricsWriter(folder.metrics_path, start=done) as writer,
    metrics.Progress(
      description,
      method.epochs * len(method.learns),
      unit='epochs',
      start=method.epochs * (len(method.learns) - len(learns)),
      enabled=bool(description),
    ) as progress,
  ):
    for number in learns:
      began = time.monotonic()
      task = training.prepare(problem.stream[number], number, problem.sizes)
      so_far = method.epochs * method.learns.index(number)
      try:
        state, said = method.learn(state, task, _counter(progress, so_far))
      except training.StoppedError as error:
        records.append({'tasks_learned': number, 'stopped': str(error)})
        _save(path, method, state, records, number)
        break
      said = {'tasks_learned': number + 1, **said}
      seconds = time.monotonic() - began
      writer.write(number + 1, {**said, 'seconds': seconds})
      records.append(said)
      looks_back = (number + 1) % measure_every == 0
      records += _scores(method, problem, state, number, looks_back, records)
      _save(path, method, state, records, number + 1)
  return [*records, _summary(records, len(problem.stream))]


def _counter(progress: metrics.Progress, start: int) -> Callable[[float], None]:
  """Tells the progress about each epoch."""
  done = start

  def report(loss: float) -> None:
    nonlocal done
    done += 1
    progress.update(done, {'loss': loss})

  return report


def _start(
  method: Method, problem: Problem, path: pathlib.Path
) -> tuple[Any, Records, int]:
  """State, records and number of tasks learned: stored ones, or new ones."""
  if path.exists():
    return _restore(path, method)
  state = method.init()
  records = []
  for number in range(1, len(problem.stream)):
    accuracy = _score(method, problem, state, number)
    if accuracy is not None:
      records.append(_entry(0, number, accuracy))
  return state, records, 0


def _entry(learned: int, number: int, accuracy: float) -> Row:
  return {'tasks_learned': learned, 'task': number + 1, 'accuracy': accuracy}


def _scores(
  method: Method,
  problem: Problem,
  state: Tree,
  number: int,
  looks_back: bool,
  records: Records,
) -> Records:
  """Entries of a row of the accuracy matrix: this task, earlier, the next."""
  num_tasks = len(problem.stream)
  looks_back |= number == num_tasks - 1
  first = 0 if looks_back else number
  known = {r['task']: r['accuracy'] for r in records if 'task' in r}
  row = []
  for other in range(first, min(number + 2, num_tasks)):
    accuracy = _score(method, problem, state, other)
    if accuracy is None and other < number:
      # Of a network of its own, which nothing changes.
      accuracy = known.get(other + 1)
    if accuracy is not None:
      row.append(_entry(number + 1, other, accuracy))
  return row


def _score(
  method: Method, problem: Problem, state: Tree, number: int
) -> float | None:
  """Test accuracy on a task, if there are weights for it."""
  weights = method.params(state, number)
  if weights is None:
    return None
  images, labels = problem.stream[number].test
  arrays = Arrays(images, labels + method.labels_apart * number)
  arrays = training.scored(arrays, problem.sizes)
  return method.program.accuracy(*weights, arrays)


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


def _save(
  path: pathlib.Path,
  method: Method,
  state: Tree,
  records: Records,
  done: int,
) -> None:
  details = {'records': json_files.to_json(records), 'done': done}
  whole.write_bytes(path, pack(method.to_arrays(state), details))


def read_state(path: pathlib.Path, method: Method) -> Tree:
  """The state of a finished run.

  Args:
    path: its folder.
    method: what it was made with.

  Returns:
    The state after the last task.

  Raises:
    UserError: if it cannot be read.
  """
  return _restore(path / STATE, method)[0]


def _restore(path: pathlib.Path, method: Method) -> tuple[Any, Records, int]:
  try:
    arrays, details = unpack(path.read_bytes())
  except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
    raise UserError(
      f'cannot read {path}: {error}. Remove it to learn this stream again, or '
      'choose another --out.'
    ) from error
  return method.from_arrays(arrays), details['records'], details['done']


def pack(tree: Tree, details: Row) -> bytes:
  """Nested dicts of arrays, and what JSON holds, as the bytes of a .npz file.

  Args:
    tree: dicts with strings as keys, and arrays or numbers.
    details: what JSON can hold.

  Returns:
    The bytes; unpack is the inverse.

  Raises:
    TypeError: if a key is not a string.

  Example:
    >>> unpack(pack({'a': {'b': np.arange(2)}, 'c': {}}, {'done': 1}))
    ({'a': {'b': array([0, 1])}, 'c': {}}, {'done': 1})
  """
  arrays: dict[str, np.ndarray] = {}
  empty: list[list[str]] = []

  def visit(node: Any, place: list[str]) -> None:
    if not isinstance(node, dict):
      arrays[json.dumps(place)] = np.asarray(node)
      return
    if not node:
      empty.append(place)
    for key, child in node.items():
      if not isinstance(key, str):
        raise TypeError(f'keys must be strings, got {key!r} in {place}.')
      visit(child, [*place, key])

  visit(tree, [])
  names = list(arrays)
  index = {'names': names, 'empty': empty, 'details': details}
  stored: Row = {str(i): arrays[n] for i, n in enumerate(names)}
  stored['index'] = np.array(json.dumps(index))
  buffer = io.BytesIO()
  np.savez(buffer, **stored)
  return buffer.getvalue()


def unpack(content: bytes) -> tuple[Any, Row]:
  """The tree and the details that pack was given.

  Args:
    content: the bytes.

  Returns:
    (tree, details); numbers come back as arrays.

  Raises:
    ValueError, LookupError, zipfile.BadZipFile: if the bytes are damaged.
  """
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
      index = json.loads(str(archive['index']))
      found = [archive[str(i)] for i in range(len(index['names']))]
  except (EOFError, zlib.error) as error:
    raise ValueError(str(error)) from error
  tree: Row = {}
  places = [json.loads(name) for name in index['names']]
  for place, leaf in [
    *zip(places, found, strict=True),
    *((place, {}) for place in index['empty']),
  ]:
    if not place:
      return leaf, index['details']
    node = tree
    for key in place[:-1]:
      node = node.setdefault(key, {})
    node[place[-1]] = leaf
  return tree, index['details']
