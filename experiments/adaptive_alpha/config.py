"""Settings of experiments/adaptive_alpha, and its presets."""

import dataclasses
from typing import Literal, get_args

from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.folder import RunConfig

MethodName = Literal[
  'fixed',
  'published_theta',
  'published_phi',
  'uncapped_theta',
  'uncapped_phi',
  'per_leaf',
  'race',
  'branch',
]


@dataclasses.dataclass(frozen=True)
class ControlConfig:
  """The published rule, and what it leaves open."""

  # α before the first control point, above 1.
  initial_alpha: float = 1.25
  # A weight within this distance of zero counts as near zero.
  epsilon: float = 0.01
  # Epochs between two control points; there is none after the last step.
  period: int = 3
  # Epochs before the first of these periods.
  warm_up: int = 0
  # By how much α - 1 is multiplied at first, and divided at a setback.
  growth: float = 1.5
  # What is added to α after the first setback.
  increment: float = 0.1
  # Largest α; the methods 'uncapped' have none but that of float32.
  alpha_max: float = 4.0


@dataclasses.dataclass(frozen=True)
class RaceConfig:
  """The race."""

  # Powers at the start.
  candidates: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
  # Share of weights to keep in the one-shot pruning that decides.
  kept: float = 0.05
  # Share of all training steps that the last power gets at least.
  final_share: float = 0.6


@dataclasses.dataclass(frozen=True)
class BranchConfig:
  """The race of branches; its target is that of the race."""

  # α before the branches.
  initial_alpha: float = 1.5
  # Share of all training steps before them, in (0, 1).
  trunk_share: float = 0.4
  # Powers of the branches.
  candidates: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
  # Share of the other steps that the last branch gets at least.
  final_share: float = 0.4


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  """The power α: fixed, steered by the weights near zero, or raced."""

  # Folder for the results; made if missing.
  out: str = 'runs/adaptive_alpha'
  # Runs at the same time, each in a process with one thread; with 1, one after
  # another in this process, with all threads.
  workers: int = 1
  # The data set.
  data: DataConfig = DataConfig()
  # The networks: mlp, lenet_300_100, mnist_cnn, lenet_5, …
  nets: tuple[str, ...] = ('mlp',)
  # Ways to choose α.
  methods: tuple[MethodName, ...] = get_args(MethodName)
  # Powers of 'fixed'; 1 is training without powerprop.
  alphas: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
  # Seeds of the initial weights and of the order of the data.
  keys: tuple[int, ...] = (0, 1, 2)
  # The optimiser, the same for all methods.
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=0.1)
  # Times that the training examples are gone through, by all networks of a race
  # together; the last one of an epoch may begin the next.
  epochs: int = 90
  # Epochs between two evaluations, each of which is logged and saved; an
  # interrupted run goes on from the last one.
  look_every: int = 3
  # Examples in a batch.
  batch_size: int = 60
  # The published rule.
  control: ControlConfig = ControlConfig()
  # The race.
  race: RaceConfig = RaceConfig()
  # The race of branches.
  branch: BranchConfig = BranchConfig()
  # Shares of weights to keep in one-shot pruning, all layers ranked together.
  kept: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
  # Distances from zero below which weights are counted after training.
  epsilons: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
  # Keys computed side by side; with 1, one after another in the same program.
  lanes_at_once: int | None = 1


# 55,000 images to train on, so that 917 steps are an epoch.
_MNIST = Config(data=DataConfig('mnist'), epochs=45, look_every=1)
PRESETS = {
  'digits': Config(),
  'mnist_mlp': _MNIST,
  'mnist_lenet_300_100': dataclasses.replace(_MNIST, nets=('lenet_300_100',)),
  # A step of the convolutions takes about 20 ms on a CPU.
  'mnist_cnn': dataclasses.replace(
    _MNIST,
    nets=('mnist_cnn',),
    epochs=6,
    control=ControlConfig(period=1),
  ),
  # A few steps, to see that it works.
  'tiny': Config(
    data=DataConfig(num_validation=1_197),
    alphas=(1.0, 2.0),
    keys=(0,),
    epochs=4,
    look_every=1,
    control=ControlConfig(period=1),
    race=RaceConfig(candidates=(1.0, 2.0)),
    branch=BranchConfig(candidates=(1.5, 3.0)),
    kept=(1.0, 0.05),
  ),
}
