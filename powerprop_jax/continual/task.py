"""One task of a stream, and what a source of examples must be.

A task is a view of a data set: its images are made when they are asked for, so
that many tasks take the memory of one.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

PARTS = ('train', 'validation', 'test')


class Examples(NamedTuple):
  """Labelled images.

  Attributes:
    images: uint8 [N, H, W, C] in 0..255, or floating of the same shape.
    labels: integers [N], from 0.
  """

  images: np.ndarray
  labels: np.ndarray


class Source(Protocol):
  """Where examples come from; anything with these."""

  @property
  def train(self) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels to train on."""

  @property
  def validation(self) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels to choose masks by."""

  @property
  def test(self) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels to report."""

  @property
  def num_classes(self) -> int:
    """Labels are below it."""


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a stream; a source of examples itself.

  Attributes:
    id: its name, different from those of the other tasks.
    source: where its examples come from.
    num_classes: its labels are below it.
    change: what is done to its images, [N, H, W, C] to [N, H', W', C']; None
      leaves them as they are.
    classes: labels of the source that belong to it; None is all of them.
    relabels: whether classes[i] is called i here.
  """

  id: str
  source: Source
  num_classes: int
  change: Callable[[np.ndarray], np.ndarray] | None = None
  classes: tuple[int, ...] | None = None
  relabels: bool = False

  @property
  def train(self) -> Examples:
    """Examples to train on, made when asked for."""
    return self._examples('train')

  @property
  def validation(self) -> Examples:
    """Examples to choose masks by, made when asked for."""
    return self._examples('validation')

  @property
  def test(self) -> Examples:
    """Examples to report, made when asked for."""
    return self._examples('test')

  @property
  def shape(self) -> tuple[int, ...]:
    """(H, W, C) of its images."""
    return self._one_image().shape[1:]

  @property
  def dtype(self) -> np.dtype:
    """Type of its images."""
    return self._one_image().dtype

  def size(self, part: str) -> int:
    """Number of examples of 'train', 'validation' or 'test'; makes no image."""
    return len(self.labels(part))

  def labels(self, part: str) -> np.ndarray:
    """Labels of 'train', 'validation' or 'test'; makes no image."""
    labels = _labels_of(self.source, part)[self._rows(part)]
    if not self.relabels or self.classes is None:
      return labels
    new = np.zeros(max(self.classes) + 1, labels.dtype)
    new[list(self.classes)] = np.arange(len(self.classes))
    return new[labels]

  def _examples(self, part: str) -> Examples:
    images = part_of(self.source, part).images[self._rows(part)]
    return Examples(self._changed(images), self.labels(part))

  def _rows(self, part: str) -> np.ndarray | slice:
    if self.classes is None:
      return slice(None)
    return np.isin(_labels_of(self.source, part), self.classes)

  def _changed(self, images: np.ndarray) -> np.ndarray:
    return images if self.change is None else self.change(images)

  def _one_image(self) -> np.ndarray:
    source = self.source
    if isinstance(source, Task):
      return self._changed(source._one_image())
    return self._changed(source.train[0][:1])


def _labels_of(source: Source, part: str) -> np.ndarray:
  if isinstance(source, Task):
    return source.labels(part)
  return part_of(source, part).labels


def part_of(source: Source, name: str) -> Examples:
  """The examples of 'train', 'validation' or 'test'."""
  return Examples(*getattr(source, name))


def check_source(source: Source, name: str) -> None:
  """Refuses a source whose parts do not fit each other.

  Example:
    >>> bad = np.zeros((2, 8, 8, 1)), np.array([0, 7])
    >>> class Bad(NamedTuple):
    ...   train = validation = test = bad
    ...   num_classes = 7
    >>> check_source(Bad(), 'mine')
    Traceback (most recent call last):
      ...
    ValueError: train of mine has labels from 0 to 7; those of 7 classes are 0
    to 6.
  """
  train = part_of(source, 'train')
  for part_name in PARTS:
    part = part_of(source, part_name)
    what = f'{part_name} of {name}'
    check_part(part, what, train)
    check_labels(part.labels, source.num_classes, what)


def check_part(part: Examples, what: str, train: Examples) -> None:
  """Refuses arrays that are no labelled images, or unlike those to train on."""
  images, labels = part
  if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels):
    raise ValueError(
      f'{what} has images of shape {images.shape} and labels of shape '
      f'{labels.shape}; expected are [N, H, W, C] and [N].'
    )
  if (images.shape[1:], images.dtype) != (train[0].shape[1:], train[0].dtype):
    raise ValueError(
      f'{what} has images of shape {images.shape[1:]} and type {images.dtype}, '
      f'but those to train on {train[0].shape[1:]} and {train[0].dtype}.'
    )
  if len(labels) == 0:
    raise ValueError(f'{what} is empty.')
  if images.dtype != np.uint8 and images.dtype.kind != 'f':
    raise ValueError(
      f'{what} has images of type {images.dtype}; they must be uint8 (0 to '
      '255) or floating.'
    )


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
  """Refuses labels that are not those of so many classes, or none at all."""
  if len(labels) == 0:
    raise ValueError(f'{what} is empty: no example has one of its classes.')
  if labels.dtype.kind not in 'iu':
    raise ValueError(f'{what} has labels of type {labels.dtype}, not integers.')
  lowest, highest = int(labels.min()), int(labels.max())
  if lowest < 0 or highest >= num_classes:
    raise ValueError(
      f'{what} has labels from {lowest} to {highest}; those of {num_classes} '
      f'classes are 0 to {num_classes - 1}.'
    )
