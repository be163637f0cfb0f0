"""`powerprop export`: a network of a run, pruned, in a single file."""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from powerprop_jax.export import export as export_lib
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export import program
from powerprop_jax.export.exported import Exported
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import pruned_model
from powerprop_jax.train.cli.pruned_model import PruneOnce
from powerprop_jax.train.runs.errors import UserError

FORMATS = (*export_lib.FORMATS, 'jax')


@dataclasses.dataclass(frozen=True)
class ExportConfig(PruneOnce):
  """Writes a network of a run, pruned, into one file."""

  # Folder of a run, whose latest checkpoint is read; nothing in it is changed.
  run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')] = (
    tyro.MISSING
  )
  # The file. Default: RUN.safetensors, RUN.npz, RUN_scipy.npz or RUN_jax.npz.
  out: str | None = None
  # safetensors (smallest), npz (NumPy), scipy (CSR matrices), jax (a program).
  format: str = 'safetensors'
  # Replace the file if it exists.
  overwrite: bool = False
  # For 'jax': images in a call. Default: any number.
  batch: int | None = None


def main(config: ExportConfig) -> None:
  """Writes the file and says what is in it."""
  path = _checked(config)
  exported = pruned_model.from_run(config.run, config)
  if config.format == 'jax':
    model = pruned_model.model_of(exported.about)
    program.write(
      path,
      model.function(exported.net_state),
      exported,
      model.inputs(config.batch or 1),
      batch_axes=0 if config.batch is None else None,
      overwrite=config.overwrite,
    )
  else:
    export_lib.write(
      path, exported, format=config.format, overwrite=config.overwrite
    )
  about = exported.about
  if about['step'] < about['num_steps']:
    print(
      f'note: the latest checkpoint of {config.run} is of step '
      f'{about["step"]:,} of {about["num_steps"]:,}.'
    )
  print(tables.text_table([_row(config, path, exported)]))
  print(f'\nFile: {path}')


def _checked(config: ExportConfig) -> pathlib.Path:
  """The path of the file, after every check that needs no network."""
  export_lib.check_format(config.format, FORMATS)
  config.check()
  if config.batch is not None and config.format != 'jax':
    raise UserError(
      f'--batch is for --format jax; {config.format} files have no batch.'
    )
  if config.batch is not None and config.batch < 1:
    raise UserError(f'--batch must be at least 1, got {config.batch}.')
  run = pathlib.Path(config.run).expanduser()
  suffix = (
    program.SUFFIX
    if config.format == 'jax'
    else export_lib.suffix(config.format)
  )
  default = run.with_name(f'{run.resolve().name}{suffix}')
  path = pathlib.Path(config.out).expanduser() if config.out else default
  export_lib.check_free(path, overwrite=config.overwrite)
  return path


def _row(config: ExportConfig, path: pathlib.Path, exported: Exported) -> Row:
  size, whole = path.stat().st_size, exported_lib.dense_bytes(exported.theta)
  return {
    'format': config.format,
    'density': exported.about['density'],
    'test_accuracy': exported.about['test']['accuracy'],
    'bytes': size,
    'dense_bytes': whole,
    'share': size / whole,
  }
