"""`powerprop bench`: what the zeros of a network save, measured here and now.

Every form of the network computes the same images in turns, and is checked
against the dense one before anything is timed.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
import statistics
from typing import Annotated

import jax
import numpy as np
import tyro

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.export import export as export_lib
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import inference, sparse_mlp
from powerprop_jax.export.exported import Exported
from powerprop_jax.files import json_files, tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import pruned_model, timing
from powerprop_jax.train.cli.pruned_model import PruneOnce
from powerprop_jax.train.runs import errors

# Calls are repeated within a run for about this long.
_RUN_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class BenchConfig(PruneOnce):
  """Times a network dense, masked and without its zeros."""

  # A file of 'powerprop export', or the folder of a run to prune first.
  model: Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar='MODEL')
  ] = tyro.MISSING
  # A file for the table, JSON. Default: none.
  out: str | None = None
  # Replace that file if it exists.
  overwrite: bool = False
  # Images in a call.
  batches: tuple[int, ...] = (1, 128)
  # Timed runs of each form.
  repeats: int = 21


def main(config: BenchConfig) -> None:
  """Prints the table."""
  _check(config)
  exported = pruned_model.load(config.model, config)
  description = _describe(config, exported)
  environment = timing.environment()
  print(f'{environment}\n')
  for name, value in description.items():
    text = f'{value:,}' if isinstance(value, int) else value
    print(f'{name.replace("_", " ")}: {text}')
  print(f'\nMedians of {config.repeats} runs in turns:\n')
  rows = measure(exported, config.batches, config.repeats)
  print(tables.text_table(rows))
  if config.out:
    found = {
      'environment': environment,
      'model': description,
      'repeats': config.repeats,
      'rows': rows,
    }
    path = pathlib.Path(config.out).expanduser()
    print(f'\nTable: {json_files.write_json(path, found)}')


def _check(config: BenchConfig) -> None:
  errors.check_several(config, 'batches')
  errors.check_positive(config, 'repeats', 'batches')
  if config.out:
    path = pathlib.Path(config.out).expanduser()
    export_lib.check_free(path, overwrite=config.overwrite)


def _describe(config: BenchConfig, exported: Exported) -> Row:
  """What is timed: the network, its weights, its size on disk."""
  masks = exported.masks
  density = float(masks_lib.density(masks, select=select_lib.is_weight))
  path = pathlib.Path(config.model).expanduser()
  size = path.stat().st_size if path.is_file() else None
  whole = exported_lib.dense_bytes(exported.theta)
  found = {
    'network': pruned_model.model_of(exported.about).net,
    'sparsity': round(1 - density, 6),
    'dense_bytes': whole,
  }
  if size is not None:
    found |= {'file_bytes': size, 'file_share': round(size / whole, 4)}
  return found


def measure(
  exported: Exported, batches: tuple[int, ...], repeats: int
) -> list[Row]:
  """Times of every form of a network, in turns.

  Returns:
    One row for each batch and form: batch, form, ms of a call (median) and
    speed_up, the median of the ratios to neighbouring dense calls.
  """
  model = pruned_model.model_of(exported.about)
  fn, shape = model.function(exported.net_state), model.image_shape
  forms = {
    'dense': inference.dense(fn, exported),
    'masked': inference.masked(fn, exported),
    'condensed': inference.condensed(
      fn, exported, np.zeros((1, *shape), np.float32)
    ),
  }
  mlp = None
  if sparse_mlp.is_mlp(exported.theta, exported.net_state):
    mlp = sparse_mlp.from_params(exported.theta, exported.masks)
  rows = []
  for batch in batches:
    images = np.random.default_rng(0).random((batch, *shape), np.float32)
    on_device = jax.device_put(images)
    calls: dict[str, timing.Program] = {
      name: functools.partial(jax.jit(form.run), form.parameters, on_device)
      for name, form in forms.items()
    }
    if mlp is not None:
      calls['scipy CSR'] = functools.partial(mlp, images)
    _check_equal(calls)
    times = timing.seconds_of_calls(calls, repeats, _RUN_SECONDS)
    rows += [
      {
        'batch': batch,
        'form': name,
        'ms': 1e3 * statistics.median(seconds),
        'speed_up': timing.median_ratio(times['dense'], seconds),
      }
      for name, seconds in times.items()
    ]
  return rows


def _check_equal(calls: Mapping[str, timing.Program]) -> None:
  """Refuses to time forms that do not compute the same."""
  logits = {n: np.asarray(call(), np.float32) for n, call in calls.items()}
  # Half precision is computed with in other widths, and rounded.
  size = max(1.0, float(np.abs(logits['dense']).max()))
  for name, found in logits.items():
    error = float(np.abs(found - logits['dense']).max())
    if not error <= 0.01 * size:
      raise ValueError(
        f'the form {name!r} of this network computes logits that are up to '
        f'{error:.3g} away from the dense ones, which reach {size:.3g}. Is '
        'what the file says about its network true?'
      )
