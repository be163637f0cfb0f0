r"""Products with sparse matrices on a GPU, in the forms that may be fast there.

    python -m experiments.benchmarks.sparse_gpu --out runs/sparse_gpu
    python -m experiments.benchmarks.sparse_networks --nets resnet_50 gpt_mini \
        --batch 64 --out runs/sparse_networks_gpu

The first takes about three minutes on one GPU, the second six. Without a GPU
both measure small shapes on the CPU, which says that they run, not how fast a
GPU is.

Vectors [N, width] times a square matrix of each width, bfloat16 and float32:

dense    jnp.matmul.
masked   the same with the weight multiplied by its mask in every call, as in
         masked training.
blocks   square blocks of --block entries that exist or do not, as many for each
         block of outputs: their inputs are gathered and multiplied in batches.
BCSR     jax.experimental.sparse, which calls cuSPARSE on a GPU; float32 alone.
pairs    two of four entries exist (2:4), held as values and positions and
         multiplied as a transient dense weight: JAX has no product that uses
         the sparse tensor cores; this is what the form costs without them.

Ratios are medians of neighbouring runs, dense over the other, so that more is
faster.
"""

from collections.abc import Iterator
import dataclasses
import statistics
from typing import Any

import jax
from jax.experimental import sparse as jax_sparse
import jax.numpy as jnp
import numpy as np

import experiments
from experiments.benchmarks import figures_speed
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

# Seconds of a run, and the shapes of who has no GPU.
_SECONDS_PER_RUN = 0.02
_SMALL_WIDTH, _SMALL_BATCH = 256, 64


@dataclasses.dataclass(frozen=True)
class Config:
  """Products with sparse matrices on a GPU, form by form."""

  # Folder for the table as data and the figure; made if missing. Default: no
  # folder, only a table in the terminal.
  out: str | None = None
  # Widths of the square matrices. Default: 4096 on a GPU, else 256.
  width: int | None = None
  # Vectors that are multiplied at once. Default: 8192 on a GPU, else 64.
  batch: int | None = None
  # Rows and columns of a block.
  block: int = 64
  # Shares of zeros; 'pairs' always has a half.
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
  # Timed runs of each program.
  repeats: int = 15


def main(config: Config) -> None:
  """Prints the table."""
  errors.check_several(config, 'sparsities')
  errors.check_positive(config, 'width', 'batch', 'block', 'repeats')
  for sparsity in config.sparsities:
    masks_lib.check_sparsity(sparsity, '--sparsities')
  has_gpu = jax.default_backend() == 'gpu'
  width = config.width or (4096 if has_gpu else _SMALL_WIDTH)
  batch = config.batch or (8192 if has_gpu else _SMALL_BATCH)
  if width % config.block or width % 4:
    raise UserError(
      f'--width must be a multiple of 4 and of --block {config.block}, got '
      f'{width}.'
    )
  folder = None
  if config.out is not None:
    folder = RunFolder(config.out, config, program='sparse_gpu')
  print(timing.environment())
  if not has_gpu:
    print(
      'There is no GPU here: small shapes on this backend, to see that every '
      'form runs. On a GPU: 8192 vectors, 4096 × 4096.'
    )
  found = [
    row
    for dtype in ('bfloat16', 'float32')
    for sparsity in config.sparsities
    for row in _measured(config, width, batch, dtype, sparsity)
  ]
  print(tables.text_table(found))
  if folder is not None:
    figures_speed.save(found, folder)


def _measured(
  config: Config, width: int, batch: int, dtype: str, sparsity: float
) -> Iterator[Row]:
  programs = _programs(width, batch, config.block, dtype, sparsity)
  seconds = timing.seconds_of_calls(programs, config.repeats, _SECONDS_PER_RUN)
  for way, times in seconds.items():
    yield {
      'what': f'{batch:,} vectors, width {width:,}, {dtype}',
      'sparsity': 0.5 if way == 'pairs' else sparsity,
      'way': way,
      'ms': round(1e3 * statistics.median(times), 4),
      'speed_up': round(timing.median_ratio(seconds['dense'], times), 3),
    }


def _programs(
  width: int, batch: int, block: int, dtype: str, sparsity: float
) -> dict[str, timing.Program]:
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)
  x, weight = draw(batch, width), draw(width, width)
  mask = jnp.asarray(random.random((width, width)) >= sparsity)
  found: dict[str, timing.Program] = {}

  def add(name: str, fn: Any, *args: Any) -> None:
    compiled = jax.jit(fn)
    found[name] = lambda: compiled(*args)

  add('dense', jnp.matmul, x, weight)
  add('masked', lambda x, w, m: x @ jnp.where(m, w, 0), x, weight, mask)
  count = width // block
  kept = max(round(count * (1 - sparsity)), 1)
  inputs = np.stack(
    [np.sort(random.permutation(count)[:kept]) for _ in range(count)]
  )
  add('blocks', block_product, x, draw(count, kept, block, block), inputs)
  if dtype == 'float32':
    rows = np.where(np.asarray(mask), np.asarray(weight), 0).T
    matrix = jax_sparse.BCSR.fromdense(rows)
    add('BCSR', lambda a, x: a @ x, matrix, x.T)
  if sparsity == 0.5:
    places = jnp.asarray(
      np.argsort(random.random((width // 4, width, 4)))[..., :2]
    )
    add('pairs', pair_product, x, draw(width // 4, width, 2), places)
  return found


def block_product(
  x: jax.Array, blocks: jax.Array, inputs: jax.Array
) -> jax.Array:
  """x [N, width] times blocks [outputs, kept, block, block] of a matrix.

  inputs [outputs, kept] are the blocks of inputs that each block of outputs
  has.
  """
  block = blocks.shape[-1]
  parts = x.reshape(x.shape[0], -1, block)[:, inputs]
  y = jnp.einsum('nokb,okbc->noc', parts, blocks)
  return y.reshape(x.shape[0], -1)


def pair_product(
  x: jax.Array, values: jax.Array, places: jax.Array
) -> jax.Array:
  """x [N, width] times a matrix of which two of four inputs exist.

  values and places [width / 4, outputs, 2] are those of each four inputs.
  """
  hot = jax.nn.one_hot(places, 4, dtype=values.dtype)
  weight = jnp.einsum('fop,fopi->fio', values, hot)
  return x @ weight.reshape(-1, weight.shape[-1])


if __name__ == '__main__':
  experiments.start(main, {'default': Config()}, static_alpha=None)
