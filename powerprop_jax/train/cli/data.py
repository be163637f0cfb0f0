"""`powerprop data`: which data sets are there, and how to get the others."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated

import tyro

from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.data import downloads, sources
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Lists the data sets that are there; data get NAME downloads one."""

  # Nothing, to list them, or: get NAME, of one or more data sets.
  words: Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar='[get NAME …]', help_behavior_hint=''),
  ] = ()
  # Their folder. Default: $POWERPROP_TFDS_DIR, or ~/tensorflow_datasets.
  dir: str | None = None


def main(config: DataConfig) -> None:
  """Prints the table, or downloads."""
  folder = sources.folder_of(config.dir)
  if not config.words:
    print(f'Data sets in {folder}, for --data.name:\n')
    print(tables.text_table(listed(folder)))
    print(
      '\nAlso any FILE.npz with x_train, y_train, x_test and y_test, and any '
      f'other image set of TFDS: {sources.how_to_get("NAME", folder)}'
    )
    return
  command, *chosen = config.words
  if command != 'get' or not chosen:
    raise UserError(
      f'cannot {" ".join(config.words)!r} with data sets. Give nothing to list '
      'them, or: powerprop data get NAME.'
    )
  for name in chosen:
    downloads.check_known(name)
  try:
    for name in chosen:
      path = downloads.get(name, folder, show_progress=True)
      print(f'{path}: train with --data.name {name}{_option(config)}')
  except KeyboardInterrupt:
    print('interrupted; the same command goes on from there.', file=sys.stderr)
    sys.exit(130)


def _option(config: DataConfig) -> str:
  return f' --data.dir {shlex.quote(config.dir)}' if config.dir else ''


def listed(folder: pathlib.Path) -> list[Row]:
  """A row for each data set that is known or there.

  Returns:
    Rows with name, megabytes (on disk, or to download) and where it is, or the
    command that gets it.
  """
  rows: list[Row] = [
    {'name': 'digits', 'megabytes': None, 'where': 'comes with scikit-learn'}
  ]
  names = (*sources.DOWNLOADABLE, *sources.prepared(folder))
  for name in dict.fromkeys((*names, *sources.LARGE_NAMES)):
    file = folder / f'{name}.npz'
    size, where = _of_tfds(name, folder)
    if name in sources.DOWNLOADABLE and file.is_file():
      size, where = file.stat().st_size, str(file)
    megabytes = None if size is None else round(size / 1e6, 1)
    rows.append({'name': name, 'megabytes': megabytes, 'where': where})
  return rows


def _of_tfds(name: str, folder: pathlib.Path) -> tuple[int | None, str]:
  """Bytes of a set that TFDS has prepared, and where; or how to get it."""
  try:
    path = sources.find_prepared(name, str(folder))
  except UserError:
    there = 'not in ArrayRecord form' if (folder / name).exists() else 'missing'
    size = None
    if name in downloads.PUBLISHED:
      size = downloads.PUBLISHED[name].size
    return size, f'{there}; {sources.how_to_get(name, folder)}'
  return sum(file.stat().st_size for file in path.iterdir()), str(path)
