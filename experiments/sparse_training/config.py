"""Settings of experiments/sparse_training, and its presets."""

import dataclasses

from experiments.common.sparse_runs import Settings
from powerprop_jax.train import methods as sparse_methods
from powerprop_jax.train.condensed import Execution
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import Method, SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Config(Settings):
  """Accuracy of sparse training against density."""

  # Folder for the results; made if missing.
  out: str = 'runs/sparse_training'
  # Combinations trained at the same time, each in a process with one thread;
  # with 1, one after another in this process, with all threads.
  workers: int = 1
  # Methods to compare; 'dense' is trained once for each α.
  methods: tuple[Method, ...] = tuple(
    method for method in sparse_methods.METHODS if method != 'one_shot'
  )
  # Shares of the weights that are connections, in (0, 1].
  densities: tuple[float, ...] = (0.1, 0.02)
  # Powers to compare; 1 is training without powerprop.
  alphas: tuple[float, ...] = (1.0,)
  # masked: weights that do not exist are multiplied too. condensed: they are
  # left out, with the same numbers but for rounding; for static, SET and RigL.
  # auto: left out where the method allows it, of layers with so few connections
  # that they are faster so.
  execution: Execution = 'masked'
  # Variance of the first weights of networks that are sparse from the start, as
  # a multiple of the usual one; with few inputs a neuron wants larger weights.
  variance: float = 1.0


# SNFS: 54,000 images to train on, so that 540 steps are an epoch.
_MNIST = Config(
  data=DataConfig('mnist', num_validation=6_000),
  normalise=True,
  densities=(0.01, 0.02, 0.03, 0.04, 0.05, 0.1),
  optimizer=OptimizerConfig(
    learning_rate=0.1,
    schedule='staircase',
    stair_steps=25_000,
    stair_factor=0.1,
    momentum=0.9,
    nesterov=True,
    decay_theta=5e-4,
  ),
  loop=LoopConfig(
    num_steps=54_000, batch_size=100, eval_every=5_400, steps_per_dispatch=540
  ),
)
# RigL: T_end is 75,000, and pruning starts at 20,000 of 97,656 steps.
_CIFAR10 = Config(
  data=DataConfig('cifar10', num_validation=5_000),
  normalise=True,
  augment=True,
  net='wrn_22_2',
  methods=('dense', 'static', 'pruning', 'set', 'rigl', 'snfs'),
  densities=(0.5, 0.2, 0.1, 0.05),
  optimizer=OptimizerConfig(
    learning_rate=0.1,
    schedule='staircase',
    stair_steps=30_000,
    stair_factor=0.2,
    momentum=0.9,
    decay_theta=5e-4,
  ),
  loop=LoopConfig(
    num_steps=97_656, batch_size=128, eval_every=3_510, steps_per_dispatch=351
  ),
  sparse=SparseConfig(
    distribution='erk', stop=75_000 / 97_656, pruning_start=20_000 / 97_656
  ),
)
PRESETS = {
  'digits': Config(),
  'mnist_lenet_300_100': _MNIST,
  # Ten epochs are too few for the stairs: the rate falls along half a cosine,
  # and connections move three times in an epoch. See
  # docs/results/sparse_training.md.
  'mnist_lenet_5': dataclasses.replace(
    _MNIST,
    net='lenet_5_relu',
    densities=(0.01, 0.02, 0.05),
    optimizer=dataclasses.replace(
      _MNIST.optimizer, schedule='cosine', nesterov=False
    ),
    loop=LoopConfig(
      num_steps=5_400, batch_size=100, eval_every=540, steps_per_dispatch=54
    ),
    sparse=SparseConfig(distribution='erk', period=180),
  ),
  # L2 on θ, twenty epochs: a recipe in which powerprop does not help.
  'mnist_powerprop': dataclasses.replace(
    _MNIST,
    methods=('static', 'pruning', 'set', 'rigl', 'snfs'),
    densities=(0.05, 0.01),
    alphas=(1.0, 1.25, 1.5, 2.0),
    optimizer=dataclasses.replace(
      _MNIST.optimizer, schedule='cosine', learning_rate=0.2
    ),
    loop=LoopConfig(
      num_steps=10_800, batch_size=100, eval_every=2_160, steps_per_dispatch=540
    ),
  ),
  # Where it helps most: φ decays, all layers are pruned together, 22 epochs.
  'mnist_global_pruning': dataclasses.replace(
    _MNIST,
    methods=('pruning',),
    densities=(0.01, 0.005),
    alphas=(1.5, 2.0),
    optimizer=OptimizerConfig(
      learning_rate=0.2, schedule='cosine', momentum=0.9, decay_phi=8e-3
    ),
    loop=LoopConfig(
      num_steps=12_000, batch_size=100, eval_every=2_400, steps_per_dispatch=400
    ),
    sparse=SparseConfig(scope='global', pruning_start=0.25),
  ),
  'cifar10_wrn_22_2': _CIFAR10,
  # Two thirds of an epoch, which two CPU cores do for all fourteen networks in
  # less than two hours. See docs/results/sparse_training.md.
  'cifar10_two_cores': dataclasses.replace(
    _CIFAR10,
    data=DataConfig('cifar10', num_validation=1_000),
    methods=('dense', 'pruning', 'rigl', 'top_kast'),
    densities=(0.1, 0.05),
    alphas=(1.0, 1.5),
    keys=(0,),
    optimizer=dataclasses.replace(
      _CIFAR10.optimizer, schedule='cosine', learning_rate=0.05
    ),
    loop=LoopConfig(
      num_steps=1_000, batch_size=32, eval_every=250, steps_per_dispatch=50
    ),
    sparse=SparseConfig(distribution='erk', period=50),
  ),
  # Thirty epochs, which two CPU cores can do: connections move every epoch's
  # quarter, and pruning takes the second and third quarter.
  'cifar10_resnet_8': dataclasses.replace(
    _CIFAR10,
    net='resnet_8',
    methods=('dense', 'static', 'pruning', 'rigl', 'top_kast'),
    densities=(0.05,),
    keys=(0,),
    optimizer=dataclasses.replace(
      _CIFAR10.optimizer, schedule='cosine', nesterov=True
    ),
    loop=LoopConfig(
      num_steps=10_560, batch_size=128, eval_every=1_760, steps_per_dispatch=88
    ),
    sparse=SparseConfig(
      distribution='erk', period=88, stop=0.75, pruning_start=0.25
    ),
  ),
  # A few steps, to see that it works where there is no accelerator.
  'cifar10_short': dataclasses.replace(
    _CIFAR10,
    data=DataConfig('cifar10', num_validation=100),
    num_test=100,
    methods=('rigl',),
    densities=(0.2,),
    keys=(0,),
    loop=LoopConfig(
      num_steps=4, batch_size=8, eval_every=2, steps_per_dispatch=2
    ),
    sparse=SparseConfig(distribution='erk', period=2, stop=1.0),
  ),
}
