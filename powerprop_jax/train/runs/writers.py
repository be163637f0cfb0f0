"""Where people watch a run: TensorBoard, Weights & Biases, or what you write.

loop.fit and stream_loop.fit take any list of writers, beside metrics.jsonl,
which every run has (metrics.MetricsWriter, a writer too). Your own loop may use
them as it likes:

    writers = [TensorBoardWriter('runs/mine'), WandbWriter('runs/mine')]
    for writer in writers:
      writer.write(step, {'loss': loss})
    ...
    for writer in writers:
      writer.close()
"""

from collections.abc import Mapping
import hashlib
import importlib.util
import os
import pathlib
import sys
from typing import Any, Protocol

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Record
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs.errors import UserError


class Writer(Protocol):
  """Takes numbers while a run goes on.

  Steps do not fall, but may come more than once, with other names.
  """

  def write(self, step: int, values: Mapping[str, float], /) -> None:
    """Takes what was measured after so many training steps, by name."""

  def close(self) -> None:
    """Ends the record; nothing is written after it."""


class TensorBoardWriter:
  """Writes for TensorBoard, into the folder `tensorboard` of a run.

  The files begin with the first write. TensorBoard hides what a run that was
  interrupted wrote from that step on.

  Raises:
    UserError: without the package tensorboardX.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    _check('tensorboard')
    self._path = pathlib.Path(folder) / 'tensorboard'
    self._summary: Any = None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    if self._summary is None:
      import tensorboardX

      self._summary = tensorboardX.SummaryWriter(
        os.fspath(self._path), purge_step=step
      )
    for name, value in values.items():
      self._summary.add_scalar(name, float(value), step)

  def close(self) -> None:
    """Writes what is left."""
    if self._summary is not None:
      self._summary.close()


class WandbWriter:
  """Writes for Weights & Biases; its files lie in the folder `wandb` of a run.

  The run there begins with the first write. Where nobody is logged in, or the
  server is not reached, it is kept on disk, which is said in a line; `wandb
  sync` sends it later. WANDB_MODE and the other variables of wandb hold.

  Args:
    folder: the folder of the run.
    **options: of wandb.init, such as project, name, config and id; runs of one
      id are one run.

  Raises:
    UserError: without the package wandb.
  """

  def __init__(self, folder: str | os.PathLike[str], **options: Any):
    _check('wandb')
    self._folder = pathlib.Path(folder)
    self._options = options
    self._run: Any = None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    if self._run is None:
      self._run = self._start()
    self._run.log({n: float(v) for n, v in values.items()}, step=step)

  def _start(self) -> Any:
    import wandb

    # It prints nothing, and leaves the standard output alone.
    quiet = wandb.Settings(silent=True, console='off')
    wandb.setup(quiet)
    options = {
      'dir': self._folder,
      # wandb itself looks only once in a process.
      'mode': os.environ.get('WANDB_MODE'),
      'resume': 'allow',
      'settings': quiet,
      **self._options,
    }
    why = ''
    try:
      if not options['mode'] and not wandb.login(prompt=False, verify=False):
        options['mode'], why = 'offline', 'nobody is logged in'
      run = wandb.init(**options)
    except wandb.errors.Error as error:
      why = ' '.join(str(error).split())
      run = wandb.init(**{**options, 'mode': 'offline'})
    if run.offline:
      print(
        f'note: Weights & Biases is offline{f" ({why})" if why else ""}; send '
        f'the run later with: wandb sync {pathlib.Path(run.dir).parent}',
        file=sys.stderr,
      )
    return run

  def close(self) -> None:
    """Ends the run, and waits until what is left is sent."""
    if self._run is not None:
      self._run.finish()


def check(config: Any) -> None:
  """Refuses settings that ask for a writer whose package is missing."""
  for extra in _PACKAGES:
    if getattr(config, extra, False):
      _check(extra)


_PACKAGES = {
  'tensorboard': ('tensorboardX', 'TensorBoard'),
  'wandb': ('wandb', 'Weights & Biases'),
}


def _check(extra: str) -> None:
  package, name = _PACKAGES[extra]
  if importlib.util.find_spec(package) is None:
    raise UserError(
      f'{name} needs the package {package}; install it with: pip install '
      f"'powerprop_jax[{extra}]', or leave --{extra} out."
    )


def of_run(
  folder: run_folder.RunFolder, config: run_folder.RunConfig
) -> list[Writer]:
  """Those that the settings of a program ask for.

  The run at Weights & Biases has the settings of config.json, and goes on when
  the folder's does.
  """
  found: list[Writer] = []
  if config.tensorboard:
    found.append(TensorBoardWriter(folder.path))
  if config.wandb:
    # Written once, with date and command: no other folder has the same.
    described = (folder.path / 'config.json').read_bytes()
    stored = run_folder.read_config(folder.path)
    found.append(
      WandbWriter(
        folder.path,
        project=os.environ.get('WANDB_PROJECT', 'powerprop_jax'),
        name=folder.path.resolve().name,
        id=hashlib.sha256(described).hexdigest()[:16],
        group=stored['program'],
        config=stored['config'],
      )
    )
  return found


def numbers(record: Record) -> dict[str, float]:
  """What writers get of a record: its numbers, by their names.

  Those of one of several networks are told apart by its 'alpha' and 'key', and
  those of a layer or a leaf by its name. What is no number, or not finite, is
  left out.

  Example:
    >>> numbers({'alpha': 2.0, 'key': 0, 'loss': 0.5, 'split': 'test'})
    {'loss/alpha_2_key_0': 0.5}
    >>> numbers({'loss': 0.5, 'accuracy': float('nan')})
    {'loss': 0.5}
  """
  values = dict(json_files.to_json(record))
  names = [name for name in ('alpha', 'key') if values.get(name) is not None]
  network = '_'.join(f'{name}_{values.pop(name):g}' for name in names)
  parts = network, values.pop('layer', ''), values.pop('leaf', '')
  of = [part for part in parts if part]
  return {
    '/'.join([name, *of]): value
    for name, value in values.items()
    if isinstance(value, (int, float))
  }
