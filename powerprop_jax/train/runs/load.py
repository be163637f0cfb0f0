"""What a training run left behind, opened for reading.

config.json says which network, data and optimiser the run had; from them comes
the structure of its state, and from its latest checkpoint the numbers. Nothing
in the folder of the run is written to.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np

from powerprop_jax import nets
from powerprop_jax.files.tables import Row
from powerprop_jax.train import ensemble as lanes_lib
from powerprop_jax.train import optimizers
from powerprop_jax.train import state as state_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import divergence, folder, json_files
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.state import TrainState

# Programs whose folder holds one network, and many as stacked lanes.
SINGLE, STACKED = 'train', 'one_shot_pruning'


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What both programs have among their settings."""

  data: DataConfig
  net: str
  optimizer: OptimizerConfig
  loop: LoopConfig


@dataclasses.dataclass(frozen=True)
class _Single(_Settings):
  alpha: float
  key: int


@dataclasses.dataclass(frozen=True)
class _Stacked(_Settings):
  alphas: tuple[float, ...]
  keys: tuple[int, ...]


class Trained(NamedTuple):
  """The networks of a run.

  Attributes:
    settings: the settings of the run, as config.json has them.
    net: the network.
    splits: the data.
    lanes: α and key of each network; one for a run of a single network.
    state: states stacked along a leading axis over the lanes.
    step: training steps done.
    num_steps: training steps that the run was to make.
  """

  settings: Row
  net: hk.TransformedWithState
  splits: data.Splits
  lanes: Members
  state: TrainState
  step: int
  num_steps: int


def load(path: str | pathlib.Path) -> Trained:
  """Reads the latest checkpoint of a run of `powerprop train` or of a sweep.

  Args:
    path: the folder of the run. If its latest checkpoint is damaged, the one
      before it is read, with a warning on the standard error.

  Returns:
    The networks and what they were trained on.

  Raises:
    UserError: if the folder holds no run, a run of a program without networks
      to read, no checkpoint yet, or only damaged ones; or if its data are gone.
  """
  path = pathlib.Path(path).expanduser()
  stored = folder.read_config(path)
  program, settings = stored['program'], stored['config']
  if program not in (SINGLE, STACKED):
    raise UserError(
      f'{path} holds a run of {program}; networks are read from runs of '
      "'powerprop train' and of experiments.one_shot_pruning."
    )
  run = _read_settings(path, program, settings)
  with checkpoint.Checkpoints(path / 'checkpoints') as checkpoints:
    if not checkpoints.steps():
      raise UserError(
        f'{path} has no checkpoint yet. Continue its run with --resume: '
        f'{stored["command"]}'
      )
    splits = data.load(run.data, show_progress=True)
    net = nets.make(run.net, splits.num_classes)
    num_steps = run.loop.num_steps
    make_tx = lambda alpha: optimizers.make_tx(run.optimizer, alpha, num_steps)
    if isinstance(run, _Stacked):
      lanes = lanes_lib.product(run.alphas, run.keys)
      create = lambda: lanes_lib.create(net, make_tx, lanes, splits.example)
    else:
      lanes = Members(np.array([run.alpha]), np.array([run.key], np.int64))
      create = lambda: initial_state(net, make_tx(run.alpha), run.key, splits)
    restored = checkpoints.restore_latest(jax.eval_shape(create))
  assert restored is not None
  state = restored.state
  if program == SINGLE:
    state = jax.tree.map(lambda x: x[None], state)
  return Trained(settings, net, splits, lanes, state, restored.step, num_steps)


def check_any_finite(path: str | pathlib.Path, found: Trained) -> None:
  """Refuses a run that has no network to work with.

  A line is printed about each network that diverged, where others did not.

  Args:
    path: the folder of the run, for the message.
    found: its networks.

  Raises:
    UserError: if a weight of every network is not finite; names one.
  """
  leaves = lanes_lib.lost_leaves(found.lanes, found.state)
  for network, leaf in leaves.items():
    if all(leaves.values()):
      divergence.refuse(path, network, leaf)
    if leaf is not None:
      divergence.say_weights(path, network, leaf, found.step)


def _read_settings(
  path: pathlib.Path, program: str, settings: Row
) -> _Single | _Stacked:
  try:
    if program == STACKED:
      return json_files.part_from_json(_Stacked, settings)
    return json_files.part_from_json(_Single, settings)
  except UserError as error:
    raise UserError(f'{path / "config.json"}: {error}') from error


def initial_state(
  net: hk.TransformedWithState, tx: Any, key: int, splits: data.Splits
) -> TrainState:
  """The state of a single network before its first step.

  Args:
    net: a network from nets.make.
    tx: gradient transformation over φ.
    key: seed of the initial weights.
    splits: the data, for the shape of the images.

  Returns:
    The state.

  Raises:
    UserError: if the key is out of range.
    ValueError: if powerprop refuses the weights.
  """
  state_lib.check_key(key)
  return state_lib.create(net, tx, jax.random.key(key), splits.example)
