"""Settings of experiments/continual_permuted, and its presets."""

import dataclasses

from experiments.continual_permuted import methods as methods_lib
from experiments.continual_permuted.methods import (
  EwcConfig,
  MethodName,
  NetConfig,
)
from experiments.continual_permuted.packing import PackingConfig
from experiments.continual_permuted.streams import StreamConfig
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.folder import RunConfig


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  """Many tasks in one network, by EfficientPackNet and by other methods."""

  # Folder for the results; made if missing.
  out: str = 'runs/continual_permuted'
  # Runs at the same time, each in a process with one thread; with 1, one after
  # another in this process, with all threads.
  workers: int = 1
  # The data set; a sequence has those of its own.
  data: DataConfig = DataConfig()
  # The tasks.
  stream: StreamConfig = StreamConfig()
  # Methods to compare. All but the two PackNets are dense, and have α = 1.
  methods: tuple[MethodName, ...] = methods_lib.NAMES
  # Powers of the two PackNets; 1 is without powerprop.
  alphas: tuple[float, ...] = (1.0, 1.5, 2.0)
  # Learning rate for each of them. Default: that of the optimiser for all.
  rates: tuple[float, ...] = ()
  # Seeds of the initial weights and of the order of the data.
  keys: tuple[int, ...] = (0, 1, 2)
  # The network and how long it is trained on a task.
  net: NetConfig = NetConfig(hidden=(200, 200), epochs=30, batch_size=60)
  # The optimiser; its schedule starts anew with each task.
  optimizer: OptimizerConfig = OptimizerConfig(
    learning_rate=0.05, schedule='cosine', momentum=0.9
  )
  # The two PackNets.
  packing: PackingConfig = PackingConfig(scope='global', retrain=True)
  # Elastic weight consolidation.
  ewc: EwcConfig = EwcConfig(strength=300.0)
  # Tasks between two evaluations of all earlier ones.
  measure_every: int = 1


# 55,000 images to train on, so that 550 steps are an epoch. Rates and decay are
# the best of those tried for each power; see
# docs/results/continual_permuted.md.
_MNIST = Config(
  data=DataConfig('mnist'),
  alphas=(1.0, 1.5, 2.0, 3.0),
  rates=(0.1, 0.3, 0.2, 0.02),
  net=NetConfig(hidden=(400, 400), epochs=5, batch_size=100),
  optimizer=OptimizerConfig(
    learning_rate=0.1, schedule='cosine', momentum=0.9, decay_phi=1e-3
  ),
  packing=PackingConfig(
    densities=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
    scope='global',
    retrain=True,
  ),
  # At λ = 1,000 the penalty makes training diverge.
  ewc=EwcConfig(strength=100.0),
)
PRESETS = {
  'digits': Config(),
  'permuted_mnist_3': _MNIST,
  'permuted_mnist_10': dataclasses.replace(
    _MNIST, stream=StreamConfig(num_tasks=10)
  ),
  # Training on all at once would need the memory of all hundred tasks. The
  # settings are the best of those tried; see
  # docs/results/continual_permuted.md.
  'permuted_mnist_100': dataclasses.replace(
    _MNIST,
    stream=StreamConfig(num_tasks=100),
    methods=('packnet', 'fine_tuning', 'ewc'),
    alphas=(1.0,),
    rates=(0.1,),
    keys=(0,),
    net=NetConfig(hidden=(600, 600), epochs=2, batch_size=100),
    optimizer=dataclasses.replace(_MNIST.optimizer, decay_phi=0.01),
    packing=dataclasses.replace(
      _MNIST.packing,
      densities=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05),
      share=0.85,
      scope='layer',
      restart='redraw',
      private='per_task',
    ),
    measure_every=10,
  ),
  # MNIST, digits of another source, then photographs; a head each.
  'sequence': dataclasses.replace(
    _MNIST,
    stream=StreamConfig(
      'sequence', sequence=('mnist', 'digits', 'cifar10'), own_heads=True
    ),
  ),
  # For those who have these on disk.
  'sequence_mnists': dataclasses.replace(
    _MNIST,
    stream=StreamConfig(
      'sequence',
      sequence=('mnist', 'fashion_mnist', 'kmnist'),
      own_heads=True,
    ),
  ),
}
