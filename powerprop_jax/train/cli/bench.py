"""`powerprop bench`: what the zeros of a network save, measured here and now.

Every form of the network computes the same inputs in turns, and is checked
against the dense one before anything is timed. A file that holds programs is of
any network, and its programs are what is timed; another one, or a run, is of a
network of nets.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import pathlib
import statistics
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.export import export as export_lib
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import inference, program, sparse_mlp
from powerprop_jax.export.exported import Array, Exported
from powerprop_jax.export.inference import Form
from powerprop_jax.files import json_files, tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import pruned_model, timing
from powerprop_jax.train.cli.pruned_model import PruneOnce
from powerprop_jax.train.runs import errors

# Calls are repeated within a run for about this long.
_RUN_SECONDS = 0.01
# Half precision is computed with in other widths, and rounded.
_CLOSE = 0.01


@dataclasses.dataclass(frozen=True)
class BenchConfig(PruneOnce):
  """Times a network dense, masked and without its zeros."""

  # A file of 'powerprop export' or program.write, or a run to prune first.
  model: Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar='MODEL')
  ] = tyro.MISSING
  # A JSON file for the table. Default: none.
  out: str | None = None
  # Replace that file if it exists.
  overwrite: bool = False
  # Images in a call, or rows of whatever the network takes.
  batches: tuple[int, ...] = (1, 128)
  # Timed runs of each form.
  repeats: int = 21


class Subject(NamedTuple):
  """What is timed.

  Attributes:
    exported: the network.
    forms: by name; 'dense' is what the others are compared with.
    arguments: random ones, with so many rows.
    about: for people: the network, its inputs.
    is_open: whether it takes any number of rows.
    missing: why it has not all forms, by name.
  """

  exported: Exported
  forms: Mapping[str, Form]
  arguments: Callable[[int], tuple[Any, ...]]
  about: Row
  is_open: bool = True
  missing: Mapping[str, str] = {}


def main(config: BenchConfig) -> None:
  """Prints the table."""
  _check(config)
  subject = subject_of(config)
  description = _describe(config, subject)
  environment = timing.environment()
  print(f'{environment}\n')
  for name, value in description.items():
    text = f'{value:,}' if isinstance(value, int) else value
    print(f'{name.replace("_", " ")}: {text}')
  print(f'\nMedians of {config.repeats} runs in turns:\n')
  rows = measure(subject, config.batches, config.repeats)
  print(tables.text_table(rows))
  for name, reason in subject.missing.items():
    print(f'\nThe file has no form {name!r}: {reason}.')
  if config.out:
    found = {
      'environment': environment,
      'model': description,
      'repeats': config.repeats,
      'rows': rows,
      'missing': subject.missing,
    }
    path = pathlib.Path(config.out).expanduser()
    print(f'\nTable: {json_files.write_json(path, found)}')


def _check(config: BenchConfig) -> None:
  errors.check_several(config, 'batches')
  errors.check_positive(config, 'repeats', 'batches')
  if config.out:
    path = pathlib.Path(config.out).expanduser()
    export_lib.check_free(path, overwrite=config.overwrite)


def subject_of(config: BenchConfig) -> Subject:
  """The forms that a file holds, or those of a network of nets."""
  exported = pruned_model.load(config.model, config)
  path = pathlib.Path(config.model).expanduser()
  return of_program(path) if program.is_program(path) else of_network(exported)


def of_program(path: pathlib.Path) -> Subject:
  """The programs that are in a file."""
  found = program.read(path)
  is_open = any(None in known.shape for known in found.inputs)
  about = {'inputs': ', '.join(map(str, found.inputs))}
  missing = {'condensed': found.missing} if found.missing else {}
  return Subject(
    found.exported, found.forms, found.arguments, about, is_open, missing
  )


def of_network(exported: Exported) -> Subject:
  """A network of nets, by what the file says about it."""
  model = pruned_model.model_of(exported.about)
  fn = model.function(exported.net_state)
  arguments = lambda rows: (model.inputs(rows),)
  forms = {
    'dense': inference.dense(fn, exported),
    'masked': inference.masked(fn, exported),
    'condensed': inference.condensed(fn, exported, *arguments(1)),
  }
  return Subject(exported, forms, arguments, {'network': model.net})


def _describe(config: BenchConfig, subject: Subject) -> Row:
  """What is timed: the network, its weights, its size on disk."""
  exported = subject.exported
  path = pathlib.Path(config.model).expanduser()
  size = path.stat().st_size if path.is_file() else None
  whole = exported_lib.dense_bytes(exported.theta)
  found = {
    **subject.about,
    'sparsity': round(_sparsity(exported), 6),
    'dense_bytes': whole,
  }
  if size is not None:
    found |= {'file_bytes': size, 'file_share': round(size / whole, 4)}
  return found


def _sparsity(exported: Exported) -> float:
  """Share of zeros in the weights and whatever else lacks connections."""
  masks = [
    mask
    for leaf, mask in zip(
      trees.named_leaves(exported.theta),
      map(np.asarray, jax.tree.leaves(exported.masks)),
      strict=True,
    )
    if select_lib.is_weight(*leaf) or not mask.all()
  ]
  size = sum(mask.size for mask in masks)
  return 1 - sum(int(mask.sum()) for mask in masks) / max(size, 1)


def measure(
  subject: Subject, batches: tuple[int, ...], repeats: int
) -> list[Row]:
  """Times of every form of a network, in turns.

  Where there are inputs of one shape alone, the batches do not matter.

  Returns:
    One row for each batch and form: batch, form, ms of a call (median) and
    speed_up, the median of the ratios to neighbouring dense calls.
  """
  rows = []
  for batch in batches if subject.is_open else (1,):
    args = subject.arguments(batch)
    on_device = jax.device_put(args)
    calls: dict[str, timing.Program] = {
      name: functools.partial(jax.jit(form.run), form.parameters, *on_device)
      for name, form in subject.forms.items()
    }
    results = {name: _flat(call()) for name, call in calls.items()}
    _check_equal(results)
    scipy = _by_scipy(subject.exported, args)
    if scipy is not None and _error(_flat(scipy()), results['dense']) <= _CLOSE:
      calls['scipy CSR'] = scipy
    times = timing.seconds_of_calls(calls, repeats, _RUN_SECONDS)
    rows += [
      {
        'batch': batch if subject.is_open else 'fixed',
        'form': name,
        'ms': 1e3 * statistics.median(seconds),
        'speed_up': timing.median_ratio(times['dense'], seconds),
      }
      for name, seconds in times.items()
    ]
  return rows


def _by_scipy(
  exported: Exported, args: tuple[Any, ...]
) -> timing.Program | None:
  """What SciPy computes if it can; with ReLU, whatever lies between layers."""
  leaves = jax.tree.leaves(args)
  if len(leaves) > 1 or not sparse_mlp.is_mlp(
    exported.theta, exported.net_state
  ):
    return None
  mlp = sparse_mlp.from_params(exported.theta, exported.masks)
  num_in = mlp.layers[0].weight.shape[1]
  if not np.ndim(leaves[0]) or leaves[0].size != num_in * len(leaves[0]):
    return None
  return functools.partial(mlp, leaves[0])


def _flat(result: Any) -> Array:
  """All numbers of a result, in a row."""
  parts = [np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(result)]
  return np.concatenate([np.zeros(0, np.float32), *parts])


def _error(found: Array, dense: Array) -> float:
  """The largest difference, relative to the largest number, at least 1."""
  if found.shape != dense.shape:
    return math.inf
  size = float(np.abs(dense).max(initial=1.0))
  return float(np.abs(found - dense).max(initial=0.0)) / size


def _check_equal(results: Mapping[str, Array]) -> None:
  """Refuses to time forms that do not compute the same."""
  dense = results['dense']
  for name, found in results.items():
    error = _error(found, dense)
    if not error <= _CLOSE:
      size = float(np.abs(dense).max(initial=1.0))
      raise ValueError(
        f'the form {name!r} of this network computes results that are up to '
        f'{error * size:.3g} away from the dense ones, which reach {size:.3g}. '
        'Is what the file says about its network true?'
      )
