"""Time of an exact global top-k mask against sorting and NumPy.

  python -m experiments.benchmarks.topk

keeps a tenth of normally distributed scores, once as one array and once as a
tree of the shapes of ResNet-50's kernels, with four programs: top_k_masks,
jax.lax.top_k with a scatter of its indices, jax.numpy.sort with a comparison,
and numpy.partition with a comparison. The last two keep all ties and thus may
keep more than k. Only ours accepts a tree; the others get the
concatenated scores. The programs take turns, and medians and their ratios
are printed. Takes about two minutes on two CPU cores, most of it in the sort.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import experiments
from powerprop_jax.core.top_k import topk
from powerprop_jax.files import json_files, tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of an exact global top-k mask against sorting and NumPy."""

  # Entries of the flat arrays.
  sizes: tuple[int, ...] = (25_600_000,)
  # Also measure a tree of ResNet-50's kernels.
  resnet: bool = True
  # Share of the scores to keep.
  density: float = 0.1
  # Runs of each program, after one that is not counted.
  repeats: int = 5
  # Seed of the scores.
  key: int = 0
  # File for the results, as JSON; must not exist.
  out: pathlib.Path | None = None


def main(config: Config) -> None:
  """Measures, prints and perhaps saves."""
  if config.out is not None and config.out.exists():
    raise UserError(f'{config.out} exists already; choose another --out.')
  _check(config)
  print(timing.environment())
  generator = np.random.default_rng(config.key)
  trees = {
    f'one array of {size:,}': [_scores(generator, (size,))]
    for size in config.sizes
  }
  if config.resnet:
    shapes = resnet50_kernel_shapes()
    trees['ResNet-50 kernels'] = [_scores(generator, s) for s in shapes]
  records = []
  for name, leaves in trees.items():
    records += _measure(name, leaves, config)
  if config.out is not None:
    environment = {'environment': timing.environment()}
    json_files.write_json(
      config.out, [environment | record for record in records]
    )


def _check(config: Config) -> None:
  errors.check_positive(config, 'sizes', 'repeats')
  if not config.resnet:
    errors.check_several(config, 'sizes')
  if not 0 < config.density <= 1:
    raise UserError(f'--density must be in (0, 1], got {config.density:g}.')
  errors.check_key(config.key)


def resnet50_kernel_shapes() -> list[tuple[int, ...]]:
  """Shapes of the 54 kernels of ResNet-50, 25,502,912 weights."""
  shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
  channels = 64
  for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
    shapes.append((1, 1, channels, 4 * width))
    for _ in range(blocks):
      shapes += [
        (1, 1, channels, width),
        (3, 3, width, width),
        (1, 1, width, 4 * width),
      ]
      channels = 4 * width
  return [*shapes, (2048, 1000)]


def _scores(
  generator: np.random.Generator, shape: tuple[int, ...]
) -> jax.Array:
  return jnp.asarray(generator.standard_normal(shape, dtype=np.float32))


def _measure(name: str, leaves: list[jax.Array], config: Config) -> list[Row]:
  flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
  k = round(config.density * flat.size)
  numpy_flat = np.asarray(flat)

  @jax.jit
  def with_top_k(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, bool).at[jax.lax.top_k(x, k)[1]].set(True)

  @jax.jit
  def with_sort(x: jax.Array) -> jax.Array:
    return x >= jnp.sort(x)[x.size - k]

  def with_partition() -> np.ndarray[Any, Any]:
    cut = numpy_flat.size - k
    return numpy_flat >= np.partition(numpy_flat, cut)[cut]

  programs: dict[str, Callable[[], Any]] = {
    'top_k_masks': lambda: topk.top_k_masks(leaves, k),
    'numpy.partition': with_partition,
    'jax.lax.top_k': lambda: with_top_k(flat),
    'jax.numpy.sort': lambda: with_sort(flat),
  }
  times = timing.take_turns(programs, config.repeats)
  medians = {name: statistics.median(t.wall) for name, t in times.items()}
  ours = medians['top_k_masks']
  records: list[Row] = [
    {
      'scores': name,
      'size': flat.size,
      'k': k,
      'program': program,
      'median_seconds': median,
      'ratio_to_ours': median / ours,
      'first_seconds': times[program].first,  # compilation included
      'seconds': times[program].wall,
    }
    for program, median in medians.items()
  ]
  print(f'\n{name}: {flat.size:,} scores, {k:,} kept')
  rows = [
    {
      'program': record['program'],
      'median_ms': round(1e3 * record['median_seconds'], 1),
      '/ ours': round(record['ratio_to_ours'], 2),
      'first_ms': round(1e3 * record['first_seconds']),
    }
    for record in records
  ]
  print(tables.text_table(rows))
  partition = ours / medians['numpy.partition']
  print(f'top_k_masks takes {partition:.2f} times as long as numpy.partition.')
  return records


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
