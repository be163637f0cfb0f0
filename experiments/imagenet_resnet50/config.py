"""Settings of experiments/imagenet_resnet50, and its presets.

A preset is METHOD_SPARSITY_ALLOCATION, with _powerprop behind it for α > 1:
dense, dense_powerprop, rigl_90_erk, top_kast_95_uniform_powerprop, …
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Literal, get_args

from powerprop_jax.core import reparam
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.train.images.sources import ImagesConfig
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunConfig
from powerprop_jax.train.scale.distributed import HostsConfig
from powerprop_jax.train.scale.precision import Half
from powerprop_jax.train.scale.sharding import Mode

Method = Literal[
  'dense', 'one_shot', 'static', 'pruning', 'set', 'rigl', 'snfs', 'top_kast'
]
METHODS = get_args(Method)
Allocation = Literal['uniform', 'erk']
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
PROGRAM = 'imagenet_resnet50'
SPARSITIES = (80, 90, 95)
# The α of the paper's runs on ImageNet is not known to us; 1.25 to 1.5 is what
# others use for networks of this depth.
POWER = 1.5
# T_end of the recipe.
_STOP = 25_000 / 32_000
# Where images lie and how they are read, which changes no training.
_PLACE = ('dir', 'workers', 'test_batch')


@dataclasses.dataclass(frozen=True)
class NetConfig:
  """The network."""

  # Layers: 50, 18, or 10 to try things out.
  depth: Literal[10, 18, 50] = 50
  # Channels, as a multiple of the usual number.
  width: float = 1.0
  # What layers compute with: 'bfloat16', or 'none' for float32.
  half: Half = 'none'
  # Compute activations inside blocks twice instead of keeping them.
  remat: bool = False


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """How the learning rate of a long run rises and falls, in epochs."""

  # Step size after the warm-up.
  learning_rate: float = 1.6
  # Epochs in which it rises from zero along a line.
  warmup: float = 5.0
  # 'stairs' falls by the factor below at given epochs; 'cosine' falls along
  # half a cosine from the end of the warm-up to zero at the last step.
  kind: Literal['stairs', 'cosine'] = 'stairs'
  # Epochs at which the stairs fall.
  drops: tuple[float, ...] = (30.0, 70.0, 90.0)
  # By how much, in (0, 1).
  factor: float = 0.1


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """How it is trained: the recipe of RigL on ImageNet."""

  # Examples in a batch, on all devices together.
  batch_size: int = 4096
  # Training steps of the plain recipe.
  num_steps: int = 32_000
  # By how much training is longer than that: steps, epochs of the schedule and
  # the end of rewiring are stretched by it.
  length: float = 1.0
  # The learning rate, for the batch above.
  schedule: ScheduleConfig = ScheduleConfig()
  # Momentum, in [0, 1).
  momentum: float = 0.9
  # Whether it looks ahead. The paper does not say; its code does.
  nesterov: bool = True
  # L2 penalty on θ, not on norms and biases.
  decay_theta: float = 1e-4
  # Share of each label that is spread over all classes.
  label_smoothing: float = 0.1
  # Decay of a running mean of θ that is evaluated too; 0 keeps none.
  ema: float = 0.0

  @property
  def total_steps(self) -> int:
    """Training steps in all, of the stretched recipe."""
    return round(self.num_steps * self.length)


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
class Config(RunConfig):
  """ResNet-50 on ImageNet, trained dense or sparse."""

  # Folder for the results; made if missing.
  out: str = 'runs/imagenet_resnet50'
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


def check(config: Config) -> None:
  """Refuses settings that cannot be, naming one."""
  errors.check_key(config.key)
  errors.check_positive(
    config, 'log_every', 'eval_every', 'save_every', 'max_skipped'
  )
  for name, value, known in (
    ('method', config.method, METHODS),
    ('allocation', config.allocation, ALLOCATIONS),
  ):
    if value not in known:
      raise UserError(
        f'unknown {name} {value!r}; there are: {", ".join(known)}.'
      )
  if config.sparse.distribution is not None:
    raise UserError(
      f'--sparse.distribution {config.sparse.distribution} has no effect here; '
      'choose --allocation uniform or erk.'
    )
  if not 0 <= config.sparsity < 1:
    raise UserError(f'sparsity must be in [0, 1), got {config.sparsity:g}.')
  if config.method == 'dense' and config.sparsity:
    raise UserError(
      f'the dense network has sparsity 0, got {config.sparsity:g}.'
    )
  if not 1 <= config.alpha < math.inf:
    raise UserError(
      f'alpha must be at least 1 and finite, got {config.alpha:g}.'
    )
  reparam.check_invertible(config.alpha)
  recipe = config.recipe
  if recipe.batch_size < 1:
    raise UserError(
      f'recipe.batch_size must be at least 1, got {recipe.batch_size}.'
    )
  for name in ('momentum', 'label_smoothing', 'ema'):
    value = getattr(recipe, name)
    if not 0 <= value < 1:
      raise UserError(f'recipe.{name} must be in [0, 1), got {value:g}.')
  if not 0 <= recipe.decay_theta < math.inf:
    raise UserError(
      'recipe.decay_theta must be at least 0 and finite, got '
      f'{recipe.decay_theta:g}.'
    )
  if not 0 < recipe.length < math.inf:
    raise UserError(
      f'recipe.length must be positive and finite, got {recipe.length:g}.'
    )
  if min(recipe.num_steps, recipe.total_steps) < 1:
    raise UserError(
      f'recipe.num_steps must be at least 1, got {recipe.num_steps} × '
      f'{recipe.length:g}.'
    )


_NOT_RESULTS = (
  *('out', 'resume', 'evaluate', 'mesh', 'hosts', 'tensorboard', 'wandb'),
)


def identity(config: Config) -> Row:
  """The settings on which the results depend.

  The same run may go on with other devices, hosts and workers, and with the
  data in another folder.

  Example:
    >>> 'mesh' in identity(Config())
    False
  """
  settings: Row = json_files.to_json(config)
  for name in _NOT_RESULTS:
    del settings[name]
  for name in _PLACE:
    del settings['data'][name]
  return settings


def from_identity(settings: Row, like: Config) -> Config:
  """Settings that identity gave, with those of like where it leaves them out.

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
      for allocation in ('uniform',) if method == 'dense' else ALLOCATIONS:
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
