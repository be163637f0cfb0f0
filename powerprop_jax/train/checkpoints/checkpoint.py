"""Saving the state of a run so that a killed run loses little and no data.

A checkpoint is a folder named after its step, written by orbax in the
background under a temporary name and renamed when it is complete. The arrays
lie in it by name (see leaf_format); their structure comes from a template when
they are restored, and what is no array in it, such as an α that is compiled in,
is compared. With the arrays go the checksums of the files: a damaged checkpoint
is noticed before it is read, and the one before it is used instead. What could
not be saved, because the disk is full, touches none of those before it.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
from types import TracebackType
from typing import NamedTuple
import zlib

import numpy as np
from orbax import checkpoint as ocp

from powerprop_jax.core.trees import Tree
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.train.checkpoints import leaf_format
from powerprop_jax.train.runs.errors import UserError

_DETAILS = 'powerprop_jax.json'
_TEMPORARY = '.orbax-checkpoint-tmp'
# One more deletes the oldest; with one alone there is nothing to fall back to.
_MAX_TO_KEEP = 3


class SaveError(UserError):
  """A checkpoint could not be written; those before it are as they were."""

  def __init__(
    self, step: int, folder: pathlib.Path, reason: str, latest: int | None
  ):
    before = (
      'There is none before it.'
      if latest is None
      else f'The one of step {latest} is complete.'
    )
    super().__init__(
      f'cannot save the checkpoint of step {step} in {folder}: {reason}. '
      f'{before} Make room for {folder}, then continue with --resume.'
    )
    self.step = step
    self.reason = reason


class Restored(NamedTuple):
  """What a checkpoint held, in the structure of the template."""

  state: Tree
  step: int
  metadata: Row


class Named(NamedTuple):
  """A state without its structure.

  Attributes:
    leaves: arrays on the host by name; of typed keys their data.
    static: what is no array, by name; see leaf_format.describe_static.
  """

  leaves: Row
  static: Row


def _warn(message: str) -> None:
  print(f'warning: {message}', file=sys.stderr)


class Checkpoints:
  """The checkpoints of one run.

  Use it as a context manager, or call close: saving goes on in the background,
  and leaving waits for it.

      with checkpoint.Checkpoints(run.checkpoints_path) as checkpoints:
        restored = checkpoints.restore_latest(jax.eval_shape(init, key))
        ...
        checkpoints.save(step, state, {'alphas': [1.0, 2.0]})
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Looks at a folder; writes nothing before the first save."""
    self._folder = pathlib.Path(folder).absolute()
    self._manager: ocp.CheckpointManager | None = None
    self._saving: tuple[int, Row] = 0, {}
    self._damaged: list[int] = []
    _quieten_orbax()

  def steps(self) -> list[int]:
    """Steps of the checkpoints on disk, ascending; unfinished ones excluded."""
    if not self._folder.is_dir():
      return []
    names = [path.name for path in self._folder.iterdir()]
    return sorted(int(name) for name in names if name.isdigit())

  def save(self, step: int, state: Tree, metadata: Row | None = None) -> None:
    """Saves a state in the background.

    Returns once the arrays are copied: they may be donated at once. The
    checkpoint is on disk after wait, close or the next save. A checkpoint of
    this step that exists already is left as it is; an earlier step is refused.

    Args:
      metadata: what else to keep, made of what JSON holds.

    Raises:
      SaveError: if this save, or the one before it in the background, fails.
        After it, this step can be saved.
    """
    if self._damaged:
      self.close()
      self._set_damaged_aside()
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=_MAX_TO_KEEP,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_details
        ),
      )
      try:
        self._manager = ocp.CheckpointManager(self._folder, options=options)
      except OSError as error:
        raise self._failure(step, error) from error
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      if step == latest:
        return
      raise ValueError(
        f'cannot save step {step} in {self._folder}: it has a checkpoint of '
        f'the later step {latest}.'
      )
    # The callback of the save before, if it goes on, still needs _saving.
    self.wait()
    details = {
      'leaves': leaf_format.describe(state),
      'static': leaf_format.describe_static(state),
      'packs_booleans': True,
      'metadata': metadata or {},
    }
    self._saving = step, details
    arrays = ocp.args.PyTreeSave(leaf_format.to_stored(state))
    try:
      self._manager.save(step, args=ocp.args.Composite(state=arrays))
    except Exception as error:
      raise self._failure(step, error) from error

  def _failure(self, step: int, error: Exception) -> SaveError:
    """Clears what a failed save left, so that another can be tried."""
    manager, self._manager = self._manager, None
    if manager is not None:
      # Whatever else goes wrong follows from the error.
      with contextlib.suppress(Exception):
        manager.close()
    for remains in self._folder.glob(f'{step}{_TEMPORARY}*'):
      shutil.rmtree(remains, ignore_errors=True)
    latest = self.steps()[-1] if self.steps() else None
    return SaveError(step, self._folder, _reason(error), latest)

  def restore_latest(self, template: Tree | None) -> Restored | None:
    """Restores the latest checkpoint that is not damaged.

    A damaged one is reported and passed over. It stays where it is; should the
    run reach its step again, it is moved into the folder 'damaged' first.

    Args:
      template: the state, or its shapes from jax.eval_shape. Leaves that come
        with a sharding are restored to it, others to the default device. None
        restores any state, as a Named.

    Returns:
      The state, bit by bit what was saved; None if there is no checkpoint.

    Raises:
      UserError: if every checkpoint is damaged, or what was saved does not fit
        the template.
    """
    self.wait()
    self._damaged = []
    reason = ''
    for step in reversed(self.steps()):
      try:
        restored = self._restore(step, template)
      except leaf_format.MismatchError as error:
        raise UserError(
          f'the checkpoint of step {step} in {self._folder} is of another '
          f'state: {error}. Use the settings it was made with.'
        ) from error
      except Exception as error:
        reason = _reason(error)
        self._damaged.append(step)
        _warn(
          f'the checkpoint of step {step} in {self._folder} is damaged '
          f'({reason}); trying the one before it.'
        )
        continue
      if self._damaged:
        _warn(f'continuing from the checkpoint of step {step}.')
      return restored
    if self._damaged:
      raise UserError(
        f'no checkpoint in {self._folder} can be read (the last reason: '
        f'{reason}). Nothing was deleted: bring one back from a copy, or '
        'choose another --out to start anew.'
      )
    return None

  def _restore(self, step: int, template: Tree | None) -> Restored:
    folder = self._folder / str(step)
    details = _checked_details(folder)
    leaves, static = details['leaves'], details['static']
    if template is not None:
      leaf_format.check_same(leaves, static, template)
    to_host = ocp.RestoreArgs(restore_type=np.ndarray)
    names = {
      name: to_host for name, leaf in leaves.items() if 0 not in leaf['shape']
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      arrays = checkpointer.restore(
        folder / 'state', args=ocp.args.PyTreeRestore(restore_args=names)
      )
    state: Tree = Named(leaf_format.unpacked(arrays, leaves), static)
    if template is not None:
      state = leaf_format.placed(state.leaves, template)
    return Restored(state, step, details['metadata'])

  def check(self) -> None:
    """Raises SaveError if a save has failed; does not wait for it to end."""
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until what was saved is on disk; raises SaveError if it is not."""
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failure(self._saving[0], error) from error

  def close(self) -> None:
    """Waits as wait does, and ends what works in the background."""
    self.wait()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    try:
      self.close()
    except SaveError as failure:
      if error is None:
        raise
      _warn(str(failure))

  def _write_details(self) -> None:
    # orbax calls this when the arrays are written and before the rename that
    # makes them a checkpoint, so that no checkpoint lacks its checksums.
    step, details = self._saving
    (folder,) = self._folder.glob(f'{step}{_TEMPORARY}*')
    details = {**details, 'checksums': _checksums(folder)}
    text = json.dumps(json_files.to_json(details))
    own_checksum = zlib.crc32(text.encode())
    json_files.write_json(folder / _DETAILS, [own_checksum, text])

  def _set_damaged_aside(self) -> None:
    """Makes room for new checkpoints of the steps that are damaged."""
    aside = self._folder / 'damaged'
    for step in self._damaged:
      aside.mkdir(exist_ok=True)
      taken = {path.name for path in aside.iterdir()}
      name = str(step)
      while name in taken:
        name += '_again'
      os.replace(self._folder / str(step), aside / name)
    self._damaged = []


def _reason(error: Exception) -> str:
  """What went wrong; orbax, tensorstore and the file system raise anything."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  first_line = str(error).strip().splitlines()[:1]
  return first_line[0][:200] if first_line else type(error).__name__


def _checked_details(folder: pathlib.Path) -> Row:
  """What lies beside a state, after checking the state's files against it."""
  own_checksum, text = json.loads((folder / _DETAILS).read_bytes())
  if zlib.crc32(text.encode()) != own_checksum:
    raise ValueError(f'{_DETAILS} has changed')
  details: Row = json.loads(text)
  for name, (size, crc32) in details['checksums'].items():
    path = folder / name
    if not path.is_file():
      raise ValueError(f'{name} is missing')
    if path.stat().st_size != size:
      raise ValueError(f'{name} has {path.stat().st_size} of {size} bytes')
    if _crc32(path) != crc32:
      raise ValueError(f'{name} has changed')
  if not details.keys() >= {'static', 'packs_booleans'}:
    raise leaf_format.MismatchError(
      'it is of an early version, which did not write down how a state was made'
    )
  return details


def _checksums(folder: pathlib.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of each file that restoring needs."""
  return {
    path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)]
    for path in sorted((folder / 'state').rglob('*'))
    if path.is_file()
  }


def _crc32(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 20):
      checksum = zlib.crc32(block, checksum)
  return checksum


def _quieten_orbax() -> None:
  """Failures that matter are raised; what else is said of them is noise."""
  # orbax reports each of its steps through absl's logger. Adding a filter twice
  # has no effect.
  logging.getLogger('absl').addFilter(_is_not_from_orbax)
  # When one file cannot be written, the loop that waits for all of them ends,
  # and those that come later complain about that.
  logging.getLogger('asyncio').addFilter(_is_not_of_checkpoint)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _report_unraisable


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname


def _is_not_of_checkpoint(record: logging.LogRecord) -> bool:
  return _TEMPORARY not in record.getMessage()


def _report_unraisable(unraisable: 'sys.UnraisableHookArgs') -> None:
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)
