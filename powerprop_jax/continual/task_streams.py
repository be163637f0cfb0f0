"""Streams of tasks for one network: permuted, rotated, split, different data.

A task is a data set with a name. Those of a stream that is made of one data set
share its arrays: pixels are permuted or rotated, and classes chosen, when the
examples are asked for, so that a hundred permuted tasks take the memory of one.

A source of examples is anything with `train`, `validation` and `test`, each a
pair (images, labels), and `num_classes`. A task is one, so that streams can be
made of tasks: rotated digits, then permuted. A source whose parts do not fit
each other, or an argument out of its range, is refused with a ValueError.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import NamedTuple

import numpy as np

from powerprop_jax.continual import pixels
from powerprop_jax.continual import task as task_lib
from powerprop_jax.continual.task import Examples, Source, Task


def permuted(
  source: Source, num_tasks: int, *, key: int = 0, permutes_first: bool = False
) -> list[Task]:
  """The same images with their pixels in another order for each task.

  The order of task t depends on key and t alone, and is the same for training,
  validation and test images. The channels of a pixel stay together.

  Tasks are called 'permuted_1', 'permuted_2', …; with permutes_first the first
  is permuted too.

  Note:
    NumPy may change its shuffling in a new release; within one version of
    NumPy the orders are fixed.

  Example:
    >>> images = np.arange(4.).reshape(1, 2, 2, 1)
    >>> one = images, np.array([0])
    >>> stream = permuted(from_arrays('squares', one, one, one), 2)
    >>> stream[0].train.images.ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    >>> sorted(stream[1].train.images.ravel().tolist())
    [0.0, 1.0, 2.0, 3.0]

  Source:
    Goodfellow et al., An empirical investigation of catastrophic forgetting,
    2013; Kirkpatrick et al., Overcoming catastrophic forgetting, 2017.
  """
  task_lib.check_source(source, 'source')
  if num_tasks < 1:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}.')
  if key < 0:
    raise ValueError(f'key must be at least 0, got {key}.')
  height, width = source.train[0].shape[1:3]
  stream = []
  for number in range(num_tasks):
    change = None
    if number > 0 or permutes_first:
      generator = np.random.default_rng((key, number))
      order = generator.permutation(height * width)
      change = functools.partial(pixels.reorder, order=order)
    stream.append(
      Task(f'permuted_{number + 1}', source, source.num_classes, change)
    )
  return stream


def rotated(source: Source, angles: Sequence[float]) -> list[Task]:
  """The same images turned by another angle for each task.

  Angles are degrees, anticlockwise, all different. Images are turned about
  their centre and keep their shape; see pixels.rotate. Tasks are called
  'rotated_ANGLE'.

  Example:
    >>> images = np.arange(4.).reshape(1, 2, 2, 1)
    >>> one = images, np.array([0])
    >>> stream = rotated(from_arrays('squares', one, one, one), [0, 90])
    >>> [task.train.images.ravel().tolist() for task in stream]
    [[0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 0.0, 2.0]]

  Source:
    Lopez-Paz & Ranzato, Gradient episodic memory, 2017, section 5.
  """
  task_lib.check_source(source, 'source')
  turns = [float(angle) % 360 for angle in angles]
  if not turns or len(set(turns)) < len(turns) or not np.isfinite(turns).all():
    raise ValueError(
      'angles must be at least one finite number of degrees, all different, '
      f'got {list(angles)}.'
    )
  return [
    Task(
      f'rotated_{angle:g}',
      source,
      source.num_classes,
      functools.partial(pixels.rotate, degrees=turn) if turn else None,
    )
    for angle, turn in zip(angles, turns, strict=True)
  ]


def split(
  source: Source,
  groups: int | Sequence[Sequence[int]],
  *,
  relabels: bool = True,
) -> list[Task]:
  """A group of the classes for each task.

  Tasks are called 'classes_0_1', 'classes_2_3', …

  Args:
    groups: the labels of each task, no label twice; or the number of tasks,
      which then get consecutive labels, as many each as possible.
    relabels: whether the labels of each task start from 0. Otherwise they stay
      as they are, and every task has the classes of the source.

  Example:
    >>> images, labels = np.zeros((4, 1, 1, 1)), np.array([0, 3, 2, 1])
    >>> part = images, labels
    >>> first, second = split(from_arrays('four', part, part, part), 2)
    >>> second.id, second.train.labels.tolist(), second.num_classes
    ('classes_2_3', [1, 0], 2)

  Source:
    Zenke et al., Continual learning through synaptic intelligence, 2017.
  """
  task_lib.check_source(source, 'source')
  if isinstance(groups, int):
    if not 1 <= groups <= source.num_classes:
      raise ValueError(
        f'groups must be between 1 and the {source.num_classes} classes of the '
        f'source, got {groups}.'
      )
    parts = np.array_split(np.arange(source.num_classes), groups)
    groups = [part.tolist() for part in parts]
  chosen = [label for group in groups for label in group]
  known = set(range(source.num_classes))
  if not chosen or not all(groups) or len(set(chosen)) < len(chosen):
    raise ValueError(
      f'groups must be lists of labels, none empty and no label twice, got '
      f'{[list(group) for group in groups]}.'
    )
  if not set(chosen) <= known:
    raise ValueError(
      f'groups have the labels {sorted(set(chosen) - known)}, but those of the '
      f'source are 0 to {source.num_classes - 1}.'
    )
  return [
    Task(
      'classes_' + '_'.join(map(str, group)),
      source,
      len(group) if relabels else source.num_classes,
      classes=tuple(group),
      relabels=relabels,
    )
    for group in groups
  ]


def sequence(
  sources: Mapping[str, Source], shape: tuple[int, ...] | None = None
) -> list[Task]:
  """Different data sets, one after another, in one shape.

  Args:
    sources: data sets by name, in their order.
    shape: (H, W, C) of all images, with C of 1 or 3; see pixels.fit. None
      leaves them as they are, and they must agree.

  Returns:
    A task for each, with its name. Images are uint8 if those of all sources
    are, otherwise float32, where uint8 is divided by 255.

  Example:
    >>> small = np.ones((1, 2, 2, 1), np.float32), np.array([0])
    >>> large = np.ones((1, 6, 6, 3), np.float32), np.array([2])
    >>> stream = sequence({'small': from_arrays('s', small, small, small),
    ...                    'large': from_arrays('l', large, large, large)},
    ...                   shape=(4, 4, 1))
    >>> [(task.id, task.shape, task.num_classes) for task in stream]
    [('small', (4, 4, 1), 1), ('large', (4, 4, 1), 3)]
  """
  for name, source in sources.items():
    task_lib.check_source(source, name)
  types = {source.train[0].dtype for source in sources.values()}
  is_float = types != {np.dtype(np.uint8)}
  change = functools.partial(pixels.fit, shape=shape, is_float=is_float)
  stream = [
    Task(name, source, source.num_classes, change)
    for name, source in sources.items()
  ]
  check(stream)
  return stream


def from_arrays(
  id: str,
  train: tuple[np.ndarray, np.ndarray],
  validation: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  num_classes: int | None = None,
) -> Task:
  """A task made of arrays, for a stream of one's own: a list of such tasks.

  Each part is images [N, H, W, C], uint8 or floating, and integer labels [N],
  below num_classes: None is one more than the largest.

  Example:
    >>> part = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])
    >>> from_arrays('mine', part, part, part).num_classes
    2
  """
  parts = tuple(
    Examples(*map(np.asarray, part)) for part in (train, validation, test)
  )
  for name, part in zip(task_lib.PARTS, parts, strict=True):
    task_lib.check_part(part, f'{name} of {id}', parts[0])
  if num_classes is None:
    num_classes = 1 + max(int(part.labels.max()) for part in parts)
  source = _Source(parts[0], parts[1], parts[2], num_classes)
  task = Task(id, source, num_classes)
  task_lib.check_source(task, id)
  return task


class _Source(NamedTuple):
  """Examples in memory, and how many classes they have."""

  train: Examples
  validation: Examples
  test: Examples
  num_classes: int


def check(tasks: Sequence[Task], num_outputs: int | None = None) -> None:
  """Refuses a stream that one network cannot learn.

  No task, two of the same name, one that is empty, that has images of another
  shape or type than the first, or more classes than the num_outputs that the
  head of the network tells apart (None does not ask).

  Example:
    >>> part = np.zeros((2, 8, 8, 1)), np.array([0, 4])
    >>> check([from_arrays('mine', part, part, part)], num_outputs=3)
    Traceback (most recent call last):
      ...
    ValueError: task 'mine' has 5 classes, but the head of the network tells 3
    apart. Give the head as many outputs as the largest task has classes.
  """
  if not tasks:
    raise ValueError('a stream needs at least one task, got none.')
  names = [task.id for task in tasks]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f'tasks must have different names, but {", ".join(twice)} is there twice.'
    )
  first = tasks[0]
  for task in tasks:
    for part in task_lib.PARTS:
      task_lib.check_labels(
        task.labels(part), task.num_classes, f'{part} of {task.id}'
      )
    if (task.shape, task.dtype) != (first.shape, first.dtype):
      raise ValueError(
        f'task {task.id!r} has images of shape {task.shape} and type '
        f'{task.dtype}, but task {first.id!r} has {first.shape} and '
        f'{first.dtype}. Bring them to one shape, e.g. with '
        'task_streams.sequence.'
      )
    if num_outputs is not None and task.num_classes > num_outputs:
      raise ValueError(
        f'task {task.id!r} has {task.num_classes} classes, but the head of the '
        f'network tells {num_outputs} apart. Give the head as many outputs as '
        'the largest task has classes.'
      )
