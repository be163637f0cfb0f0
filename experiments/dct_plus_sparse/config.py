"""Settings of experiments/dct_plus_sparse, and its presets."""

import dataclasses
from typing import Literal

from experiments.common.sparse_runs import Settings
from experiments.dct_plus_sparse.patterns import ScoreConfig, SupportName
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig

Network = Literal['standard', 'dct']

# On MNIST at densities 0.01 and 0.001 better than 1e-3 for most networks and
# supports; see docs/results/dct_plus_sparse.md for what was tried.
_ADAM = OptimizerConfig(name='adam', learning_rate=5e-3)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
  """Sparse networks with and without a fixed cosine transform."""

  # Folder for the results; made if missing.
  out: str = 'runs/dct_plus_sparse'
  # Combinations trained at the same time, each in a process with one thread;
  # with 1, one after another in this process, with all threads.
  workers: int = 1
  # 'standard', and 'dct', where every layer adds the fixed cosine transform.
  networks: tuple[Network, ...] = ('standard', 'dct')
  # Where the connections are. Random, with a budget for each layer: uniform,
  # epf, epl, er, erk. Scored at initialisation: magnitude, snip,
  # iterative_snip, force, grasp, synflow, for the standard network alone, for
  # the weights of 'dct' start at zero. Moving: set, rigl.
  supports: tuple[SupportName, ...] = (
    'uniform',
    'epl',
    'erk',
    'snip',
    'synflow',
    'rigl',
  )
  # Shares of the weights that are connections, in (0, 1].
  densities: tuple[float, ...] = (0.01, 0.001)
  # Powers to compare; 1 is training without powerprop.
  alphas: tuple[float, ...] = (1.0,)
  # Variance of the first weights of 'dct' times the fan-in of the layer, where
  # α is not 1; with α = 1 they start at zero, where powerprop could not move
  # them. 10 was as good as any of 1 to 1000 on MNIST.
  dct_init_scale: float = 10.0
  # The optimiser of 'standard'.
  optimizer: OptimizerConfig = _ADAM
  # The optimiser of 'dct'.
  dct_optimizer: OptimizerConfig = _ADAM
  # Lengths.
  loop: LoopConfig = LoopConfig(
    num_steps=1_000, batch_size=60, eval_every=500, steps_per_dispatch=250
  )
  # What pruning at initialisation looks at.
  score: ScoreConfig = ScoreConfig()
  # Steps in each of seven runs that are timed in the end; 0 is no timing.
  timed_steps: int = 20


# 55,000 images to train on: five epochs of 430 steps.
_MNIST = Config(
  data=DataConfig('mnist'),
  normalise=True,
  supports=(
    *('uniform', 'epf', 'epl', 'er', 'erk'),
    *('magnitude', 'snip', 'iterative_snip', 'force', 'grasp', 'synflow'),
    *('set', 'rigl'),
  ),
  loop=LoopConfig(
    num_steps=2_150, batch_size=128, eval_every=430, steps_per_dispatch=215
  ),
)
# 45,000 images to train on: 200 epochs of 351 steps. Half a cosine for the
# standard network, whose authors' code divides the rate twice or not at all.
# Uniform and EPF would leave less than one weight in a layer of ResNet-50.
_CIFAR = Config(
  data=DataConfig('cifar10', num_validation=5_000),
  normalise=True,
  augment=True,
  net='resnet_50_cifar',
  supports=('epl', 'erk', 'snip', 'force', 'grasp', 'synflow', 'rigl'),
  densities=(0.01, 0.001, 0.0001),
  optimizer=OptimizerConfig(
    learning_rate=0.1, schedule='cosine', momentum=0.9, decay_theta=5e-4
  ),
  dct_optimizer=OptimizerConfig(
    name='adam', learning_rate=1e-3, decay_theta=5e-4
  ),
  loop=LoopConfig(
    num_steps=70_200, batch_size=128, eval_every=3_510, steps_per_dispatch=351
  ),
)
PRESETS = {
  'digits': Config(),
  'mnist_lenet_300_100': _MNIST,
  # Uniform would leave less than one weight in the first layer.
  'mnist_lenet_5': dataclasses.replace(
    _MNIST, net='lenet_5_small', supports=_MNIST.supports[1:]
  ),
  'cifar10_resnet_50': _CIFAR,
  'cifar10_vgg_19': dataclasses.replace(_CIFAR, net='vgg_19'),
  # Ten batches for the gradient, as the authors of FORCE take there.
  'cifar100_resnet_50': dataclasses.replace(
    _CIFAR,
    data=DataConfig('cifar100', num_validation=5_000),
    score=ScoreConfig(num_batches=10),
  ),
  'cifar100_vgg_19': dataclasses.replace(
    _CIFAR,
    data=DataConfig('cifar100', num_validation=5_000),
    net='vgg_19',
    score=ScoreConfig(num_batches=10),
  ),
  # A few steps, to see that it works where there is no accelerator.
  'cifar10_short': dataclasses.replace(
    _CIFAR,
    data=DataConfig('cifar10', num_validation=100),
    num_test=100,
    net='resnet_18_cifar',
    supports=('erk', 'snip'),
    densities=(0.01,),
    keys=(0,),
    loop=LoopConfig(
      num_steps=4, batch_size=8, eval_every=2, steps_per_dispatch=2
    ),
    score=ScoreConfig(batch_size=8),
    timed_steps=0,
  ),
}
