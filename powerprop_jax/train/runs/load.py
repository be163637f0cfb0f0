"""What a training run left behind, opened for reading.

config.json says which networks the checkpoints hold; what is needed of their
states is read by name, so that the optimiser that trained them does not matter.
Nothing in the folder of the run is written to.
"""

import pathlib
import re
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState, Static
from powerprop_jax.files.tables import Row
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topology import SparseState
from powerprop_jax.train import ensemble
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.runs import contents, divergence, folder
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import TrainState


class Trained(NamedTuple):
  """The networks of a run.

  Attributes:
    settings: the settings of the run, as config.json has them.
    net_name: what nets.make calls the network.
    dct: whether it has the transform of nets.make.
    net: the network.
    splits: the data; test images as the network sees them.
    members: α and key of each network; one for a run of a single network.
    state: states stacked along a leading axis over the networks. Of the
      optimiser they have what views need: α and the masks.
    step: training steps done.
    num_steps: training steps that the run was to make.
  """

  settings: Row
  net_name: str
  dct: bool
  net: hk.TransformedWithState
  splits: data.Splits
  members: Members
  state: TrainState
  step: int
  num_steps: int


def load(
  path: str | pathlib.Path,
  alpha: float | None = None,
  key: int | None = None,
) -> Trained:
  """Reads the networks in the latest checkpoint of a run.

  If that is damaged, the one before it is read, with a warning on the standard
  error. Where the networks of a run lie in its parts, alpha and key choose one.

  Raises:
    UserError: if the folder holds no run, a run without networks to read, no
      checkpoint yet, or only damaged ones; or if its data are gone.
  """
  path = pathlib.Path(path).expanduser()
  stored = folder.read_config(path)
  described = contents.read(path, stored)
  found = described.networks
  if described.instead:
    raise UserError(
      f'{path} holds a run of {stored["program"]}: {described.instead}'
    )
  if found is None:
    return load(_part(path, stored['program'], alpha, key))
  with checkpoint.Checkpoints(path / 'checkpoints') as checkpoints:
    restored = checkpoints.restore_latest(None)
  if restored is None:
    raise UserError(
      f'{path} has no checkpoint yet. Continue its run with --resume: '
      f'{stored["command"]}'
    )
  members = ensemble.product(found.alphas, found.keys)
  if found.are_paired:
    members = Members(np.array(found.alphas), np.array(found.keys))
  splits = data.load(found.data, show_progress=True)
  prepare: data.Prepare = data.to_float
  if found.normalise:
    prepare = data.normalise(splits.train.images)
  images, labels = (part[: found.num_test] for part in splits.test)
  test = Arrays(np.asarray(prepare(images)), labels)
  state = _state(*restored.state)
  if not found.is_stacked:
    state = jax.tree.map(lambda x: x[None], state)
  trained = Trained(
    stored['config'],
    found.net,
    found.dct,
    nets.make(found.net, splits.num_classes, dct=found.dct),
    splits._replace(test=test),
    members,
    state,
    restored.step,
    found.num_steps,
  )
  _check_fits(path, trained)
  return trained


def _part(
  path: pathlib.Path, program: str, alpha: float | None, key: int | None
) -> pathlib.Path:
  """The one part of a run that has networks of that α and key."""
  parts = []
  for file in sorted(path.glob('*/**/config.json')):
    part = file.parent
    stored = folder.read_config(part)
    networks = 'contents' in stored and contents.read(part, stored).networks
    if networks and (
      (alpha is None or alpha in networks.alphas)
      and (key is None or key in networks.keys)
    ):
      parts.append(part)
  if len(parts) == 1:
    return parts[0]
  names = ', '.join(map(str, parts[:4]))
  more = f' and {len(parts) - 4} more' if len(parts) > 4 else ''
  where = f' Give one of its parts: {names}{more}.' if parts else ''
  raise UserError(
    f'{path} holds a run of {program}, which has no networks of its own to '
    f'read.{where}'
  )


def _check_fits(path: pathlib.Path, found: Trained) -> None:
  """Refuses a checkpoint of other networks than config.json says."""
  count, saved_count = len(found.members.key), len(found.state.step)
  if saved_count != count:
    raise UserError(
      f'{path / "config.json"} is of {count} networks, its latest checkpoint '
      f'of {saved_count}.'
    )
  theta = step_lib.shapes(found.net, found.splits.example)
  shapes = {leaf.path: leaf.value.shape for leaf in trees.named_leaves(theta)}
  saved = trees.named_leaves(found.state.phi)
  if shapes != {leaf.path: leaf.value.shape[1:] for leaf in saved}:
    raise UserError(
      f'the latest checkpoint of {path} holds no network {found.net_name} for '
      f'{found.splits.name}: its weights have other names or shapes.'
    )


def _state(leaves: Row, static: Row) -> TrainState:
  """What the networks of a saved TrainState need, found by name.

  Args:
    leaves: arrays by their names in the state, such as ".phi['linear']['w']".
    static: what is no array, likewise.
  """
  starts = [name.partition('.phi[')[0] for name in leaves if '.phi[' in name]
  start = min(starts, key=len)
  of = lambda name: _node(leaves, static, name)
  # Whatever trained them: a PowerState and a SparseState at most.
  opt_state: OptState = ()
  for power in _states_with(static, '.form'):
    chosen = static[f'{power}.select']

    def is_selected(
      module: str, name: str, value: Any, chosen: list[str] = chosen
    ) -> bool:
      del value
      return f"{start}.phi['{module}']['{name}']" in chosen

    opt_state = PowerState(
      of(f'{power}.alpha'), (), Static(is_selected), of(f'{power}.form')
    )
  for sparse in _states_with(static, '.regrow'):
    opt_state = SparseState(
      step=of(f'{sparse}.step'),
      key=of(f'{sparse}.key'),
      masks=of(f'{sparse}.masks'),
      memory=(),
      initial_scale=(),
      inner_state=opt_state,
      regrow=of(f'{sparse}.regrow'),
    )
  return TrainState(
    step=of(f'{start}.step'),
    phi=of(f'{start}.phi'),
    net_state=of(f'{start}.net_state'),
    opt_state=opt_state,
    key=of(f'{start}.key'),
  )


def _states_with(static: Row, field: str) -> list[str]:
  """Names of the states within a state that have a static field."""
  return [name.removesuffix(field) for name in static if name.endswith(field)]


def _node(leaves: Row, static: Row, name: str) -> Any:
  """An array, a Static or nested dicts of them; {} where there is none."""
  found: Row = {}
  for known, wrap in ((leaves, jnp.asarray), (static, Static)):
    if name in known:
      return wrap(known[name])
    for path in known:
      if path.startswith(f'{name}['):
        *outer, last = re.findall(r"\['(.*?)'\]", path.removeprefix(name))
        inner = found
        for key in outer:
          inner = inner.setdefault(key, {})
        inner[last] = wrap(known[path])
  return found


def check_any_finite(path: str | pathlib.Path, found: Trained) -> None:
  """Refuses a run that has no network to work with.

  A line is printed about each network that diverged, where others did not.
  """
  leaves = ensemble.lost_leaves(found.members, found.state)
  if all(leaves.values()):
    divergence.refuse(path, *next(iter(leaves.items())))
  divergence.say_weights(path, leaves, found.step)
