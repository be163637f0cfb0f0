"""Streams of tasks from settings."""

import dataclasses
import functools
from typing import Literal

from powerprop_jax.continual import task_streams
from powerprop_jax.continual.task_streams import Task
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """Which tasks, one after another."""

  # 'permuted' and 'rotated' images of the data set, 'split' into groups of its
  # classes, or a 'sequence' of the data sets below.
  kind: Literal['permuted', 'rotated', 'split', 'sequence'] = 'permuted'
  # How many tasks; a sequence has those of its data sets.
  num_tasks: int = 3
  # Seed of the permutations.
  key: int = 0
  # Whether the pixels of the first task are permuted too.
  permutes_first: bool = False
  # Degrees between two tasks that are rotated.
  angle: float = 15.0
  # Data sets of a sequence, named like data.name, all in the folder data.dir.
  sequence: tuple[str, ...] = ()
  # Height, width and channels of the images of a sequence: enlarged by a whole
  # number, then cut or filled up; colours become brightness.
  shape: tuple[int, ...] = (28, 28, 1)
  # Whether each task has a head of its own; a sequence and a split want it.
  own_heads: bool = False


def load(config: StreamConfig, data_config: DataConfig) -> list[Task]:
  """Reads the data, once in a process, and makes the stream.

  Raises:
    UserError: if data are missing or a setting does not fit.
    ValueError: if a stream cannot be made of the data.

  Example:
    >>> stream = load(StreamConfig('split', num_tasks=5), DataConfig('digits'))
    >>> [task.id for task in stream][:2], stream[0].shape
    (['classes_0_1', 'classes_2_3'], (8, 8, 1))
  """
  return list(_load(config, data_config))


@functools.lru_cache(maxsize=1)
def _load(config: StreamConfig, data_config: DataConfig) -> tuple[Task, ...]:
  if config.num_tasks < 1:
    raise UserError(
      f'--stream.num-tasks must be at least 1, got {config.num_tasks}.'
    )
  if config.kind == 'sequence':
    stream = _sequence(config, data_config)
  else:
    if config.sequence:
      raise UserError(
        f'--stream.sequence is for kind=sequence, which is {config.kind!r}. '
        'Leave it out, or set the kind.'
      )
    splits = data.load(data_config)
    if config.kind == 'permuted':
      stream = task_streams.permuted(
        splits,
        config.num_tasks,
        key=config.key,
        permutes_first=config.permutes_first,
      )
    elif config.kind == 'rotated':
      angles = [config.angle * number for number in range(config.num_tasks)]
      stream = task_streams.rotated(splits, angles)
    else:
      stream = task_streams.split(splits, config.num_tasks)
  task_streams.check(stream)
  return tuple(stream)


def _sequence(config: StreamConfig, data_config: DataConfig) -> list[Task]:
  names = config.sequence
  if not names or len(set(names)) < len(names):
    raise UserError(
      '--stream.sequence needs the names of data sets, all different, got '
      f'{" ".join(names) or "none"}.'
    )
  sources = {
    name: data.load(dataclasses.replace(data_config, name=name))
    for name in names
  }
  return task_streams.sequence(sources, config.shape)
