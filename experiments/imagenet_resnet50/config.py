"""Settings of experiments/imagenet_resnet50, and its presets.

A preset is METHOD_SPARSITY_ALLOCATION, with _powerprop behind it for α > 1:
dense, dense_powerprop, rigl_90_erk, top_kast_95_uniform_powerprop, …
"""

from collections.abc import Iterator
import dataclasses

from experiments.imagenet_resnet50.setup import (
  METHODS,
  Allocation,
  Method,
  NetConfig,
  RecipeConfig,
)
from powerprop_jax.files.tables import Row
from powerprop_jax.train.images.sources import ImagesConfig
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.runs import json_files
from powerprop_jax.train.scale.distributed import HostsConfig
from powerprop_jax.train.scale.sharding import Mode
from powerprop_jax.train.schedules import ScheduleConfig

SPARSITIES = (80, 90, 95)
# The α of the paper's runs on ImageNet is not known to us; 1.25 to 1.5 is what
# others use for networks of this depth.
POWER = 1.5
# T_end of the recipe.
_STOP = 25_000 / 32_000
# Where images lie and how they are read, which changes no training.
_PLACE = ('dir', 'workers', 'test_batch')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Which devices do what."""

  # Devices to use, the first ones. Default: all of all hosts.
  devices: int | None = None
  # Devices among which a batch is shared out. Default: all there are for model.
  data: int | None = None
  # Devices among which the outputs of a layer are shared out.
  model: int = 1
  # 'replicated': each device holds the whole state; 'sharded': its part of φ,
  # masks and momenta.
  mode: Mode = 'replicated'


@dataclasses.dataclass(frozen=True)
class Config:
  """ResNet-50 on ImageNet, trained dense or sparse."""

  # Folder for the results; made if missing.
  out: str = 'runs/imagenet_resnet50'
  # Continue the interrupted run in that folder.
  resume: bool = False
  # Train nothing: evaluate the latest checkpoint of the run in this folder, or
  # an exported network (best.npz). Settings of the run are read from there.
  evaluate: str = ''
  # How connections come about; 'one_shot' prunes the trained dense network.
  method: Method = 'dense'
  # Share of zeros in the end; 0 for 'dense'.
  sparsity: float = 0.0
  # How it is shared out: 'uniform' but for a dense first layer, or 'erk'.
  allocation: Allocation = 'uniform'
  # The power; 1 is training without powerprop.
  alpha: float = 1.0
  # Seed of weights, masks, and the order and crops of the images.
  key: int = 0
  # The images.
  data: ImagesConfig = ImagesConfig()
  # The network.
  net: NetConfig = NetConfig()
  # The recipe.
  recipe: RecipeConfig = RecipeConfig()
  # How connections move; its distribution is that of allocation.
  sparse: SparseConfig = SparseConfig(stop=_STOP)
  # Steps between two lines of measurements.
  log_every: int = 100
  # Steps between two evaluations.
  eval_every: int = 1_565
  # Steps between two checkpoints.
  save_every: int = 1_000
  # Steps in a row that may be skipped, as their numbers are not finite.
  max_skipped: int = 10
  # Which devices do what.
  mesh: MeshConfig = MeshConfig()
  # Which processes train together.
  hosts: HostsConfig = HostsConfig()


def identity(config: Config) -> Row:
  """The settings on which the results depend.

  The same run may go on with other devices, hosts and workers, and with the
  data in another folder.

  Args:
    config: the settings.

  Returns:
    A nested dict of what JSON holds.

  Example:
    >>> 'mesh' in identity(Config())
    False
  """
  settings: Row = json_files.to_json(config)
  for name in ('out', 'resume', 'evaluate', 'mesh', 'hosts'):
    del settings[name]
  for name in _PLACE:
    del settings['data'][name]
  return settings


def from_identity(settings: Row, like: Config) -> Config:
  """Settings of a run that was stored, on the devices and data given here.

  Args:
    settings: what identity gave.
    like: settings of what identity leaves out.

  Returns:
    The settings.

  Raises:
    UserError: if these are not settings of this program.

  Example:
    >>> config = Config(method='rigl', sparsity=0.9)
    >>> from_identity(identity(config), Config()) == config
    True
  """
  given = json_files.to_json(like)
  data = {name: given['data'][name] for name in _PLACE}
  stored = {**settings, 'data': {**settings.get('data', {}), **data}}
  found = json_files.from_json(Config, stored)
  return dataclasses.replace(found, mesh=like.mesh, hosts=like.hosts)


def _sparse(method: Method, allocation: Allocation) -> SparseConfig:
  """Settings of a method as published with this allocation."""
  if method == 'snfs' and allocation == 'uniform':
    # As its own paper has it: all through the run, once an epoch.
    return SparseConfig()
  if method == 'snfs':
    # As RigL compares with it.
    return SparseConfig(
      stop=_STOP, period=100, drop_fraction=0.3, redistribute=False
    )
  if method == 'top_kast':
    return SparseConfig(period=100)
  return SparseConfig(stop=_STOP)


def _presets() -> Iterator[tuple[str, Config]]:
  for method in METHODS:
    for sparsity in (0,) if method == 'dense' else SPARSITIES:
      for allocation in ('uniform',) if method == 'dense' else _ALLOCATIONS:
        place = () if method == 'dense' else (str(sparsity), allocation)
        for suffix, alpha in ((), 1.0), (('powerprop',), POWER):
          yield (
            '_'.join((method, *place, *suffix)),
            Config(
              method=method,
              sparsity=sparsity / 100,
              allocation=allocation,
              alpha=alpha,
              sparse=_sparse(method, allocation),
            ),
          )


_ALLOCATIONS: tuple[Allocation, ...] = ('uniform', 'erk')

# Eight steps of a small network on small images, to see that it works.
_TINY = Config(
  method='rigl',
  sparsity=0.8,
  allocation='uniform',
  alpha=POWER,
  data=ImagesConfig(image_size=32, workers=0, synthetic_examples=1_000),
  net=NetConfig(depth=10, width=1 / 16),
  recipe=RecipeConfig(
    batch_size=16,
    num_steps=8,
    schedule=ScheduleConfig(
      learning_rate=0.05, warmup=0.03, drops=(0.08, 0.1, 0.12)
    ),
    ema=0.9,
  ),
  sparse=SparseConfig(period=2, stop=0.75),
  log_every=1,
  eval_every=4,
  save_every=2,
)
PRESETS = {**dict(_presets()), 'tiny': _TINY}
