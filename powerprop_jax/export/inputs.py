"""The arrays that an exported function takes: shapes, dtypes, ranges."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.export.exported import Array


class Input(NamedTuple):
  """One of the arrays that a function takes.

  Attributes:
    shape: None is the axis of the batch, of any length, the same in all.
    dtype: its name.
    range: lowest and highest number of an example, if there was one.

  Example:
    >>> str(of(jnp.ones((2, 3)))), str(Input((None, 3), 'int32', (0, 9)))
    ('float32[2, 3]', 'int32[batch, 3]')
  """

  shape: tuple[int | None, ...]
  dtype: str
  range: tuple[float, float] | None = None

  def __str__(self) -> str:
    sizes = ['batch' if size is None else str(size) for size in self.shape]
    return f'{self.dtype}[{", ".join(sizes)}]'

  def takes(self, other: 'Input') -> bool:
    """Whether another one is of this shape and dtype."""
    return (
      self.dtype == other.dtype
      and len(self.shape) == len(other.shape)
      and all(
        a in (None, b) for a, b in zip(self.shape, other.shape, strict=True)
      )
    )

  def draw(self, rows: int, random: np.random.Generator) -> Array:
    """Random numbers in the range of the example, so many rows of them.

    Raises:
      ValueError: for integers without a range, and for what is no number.
    """
    shape = [rows if size is None else size for size in self.shape]
    dtype = self.dtype
    if dtype == 'bool':
      return random.random(shape) < 0.5
    if dtype.startswith(('int', 'uint')):
      if self.range is None:
        raise ValueError(
          f'the file does not say in which range the integers of its input '
          f'{self} lie, so that none can be drawn. Write it with an array as '
          'the example, not with a shape.'
        )
      low, high = map(int, self.range)
      return random.integers(low, high, shape, dtype, endpoint=True)
    if not dtype.startswith(('float', 'bfloat', 'complex')):
      raise ValueError(f'no input {self} can be drawn at random.')
    drawn: Array = random.uniform(*(self.range or (0.0, 1.0)), shape)
    return drawn.astype(jnp.dtype(dtype))


def of(shape: Any, example: Any = None) -> Input:
  """The input of an array or a shape, whose batch axis is a symbol."""
  sizes = tuple(n if isinstance(n, int) else None for n in shape.shape)
  return Input(sizes, str(shape.dtype), _range(example))


def _range(example: Any) -> tuple[float, float] | None:
  """The lowest and highest number of an array, None if not known or finite."""
  is_shape = example is None or isinstance(example, jax.ShapeDtypeStruct)
  if is_shape or not np.size(example):
    return None
  dtype = jnp.result_type(example)
  if not jnp.issubdtype(dtype, jnp.number) or jnp.iscomplexobj(example):
    return None
  values = np.asarray(example)
  if values.dtype.kind not in 'iu':
    values = values.astype(np.float64)
  low, high = values.min().item(), values.max().item()
  return (low, high) if np.isfinite([low, high]).all() else None
