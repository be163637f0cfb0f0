"""Networks trained sparse, from the settings of a program.

What programs that compare methods of sparse training have in common: which
combinations there are, whether they can be trained at all, and their training.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import haiku as hk
import jax
import numpy as np

from experiments.common import sparse_sweep
from experiments.common.combinations import Named
from powerprop_jax import nets
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import views
from powerprop_jax.train import (
  ensemble as lanes,
)
from powerprop_jax.train import (
  methods as sparse_methods,
)
from powerprop_jax.train import (
  optimizers,
  sweep,
)
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.condensed import Execution, MakeNet
from powerprop_jax.train.data import augment
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Lanes
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import Lengths, Method, SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import checks, divergence
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import fusing
from powerprop_jax.train.state import TrainState


class Settings(Protocol):
  """What the settings of a program must have, at least."""

  @property
  def data(self) -> DataConfig:
    """The data set."""

  @property
  def num_test(self) -> int | None:
    """Test examples to use, the first ones; None is all."""

  @property
  def normalise(self) -> bool:
    """Whether each channel gets mean 0 and deviation 1."""

  @property
  def augment(self) -> bool:
    """Whether to shift and mirror images in training."""

  @property
  def net(self) -> str:
    """Name of the network."""

  @property
  def keys(self) -> tuple[int, ...]:
    """Seeds."""

  @property
  def optimizer(self) -> OptimizerConfig:
    """The optimiser."""

  @property
  def loop(self) -> LoopConfig:
    """Lengths."""

  @property
  def sparse(self) -> SparseConfig:
    """How connections move."""

  @property
  def lanes_at_once(self) -> int | None:
    """Keys computed side by side; None is all of them."""


class Combination(NamedTuple):
  """What one compiled program trains, for all keys.

  Attributes:
    method: the method.
    density: share of the weights that are connections; 1 for 'dense'.
    alpha: the power.
  """

  method: Method
  density: float
  alpha: float

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f'{self.method}_density_{self.density:g}_alpha_{self.alpha:g}'


def full_name(method: str) -> str:
  """What figures call a method: its name in optim/aliases.

  Example:
    >>> full_name('set'), full_name('rigl')
    ('sparse_evolution', 'rigl')
  """
  return _FULL_NAMES.get(method, method)


_FULL_NAMES = {'set': 'sparse_evolution', 'pruning': 'gradual_pruning'}


class Trained(NamedTuple):
  """The networks of one combination, one lane for each key.

  Attributes:
    net: the network.
    state: the stacked final states.
    lanes: the runs.
    splits: the data.
    prepare: turns images into what the network sees.
  """

  net: hk.TransformedWithState
  state: TrainState
  lanes: Lanes
  splits: data.Splits
  prepare: step_lib.Prepare


def combinations(
  methods: Iterable[Method],
  densities: Sequence[float],
  alphas: Iterable[float],
) -> list[Combination]:
  """All of them; the dense network is there once for each α.

  Example:
    >>> [c.name for c in combinations(['dense', 'set'], [0.1], [1.0])]
    ['dense_density_1_alpha_1', 'set_density_0.1_alpha_1']
  """
  return [
    Combination(method, density, alpha)
    for alpha in alphas
    for method in methods
    for density in ((1.0,) if method == 'dense' else densities)
  ]


def check_settings(settings: Settings, *several: str) -> None:
  """Refuses settings that can be judged without the data.

  Args:
    settings: the settings.
    *several: names of those which are tuples of different values.

  Raises:
    UserError: naming the setting.
  """
  lanes.check_at_once(settings.lanes_at_once)
  checks.several(settings, *several)
  checks.positive(settings, 'num_test')
  lanes.product([1.0], settings.keys)


def check_combinations(
  settings: Settings, chosen: Iterable[Combination]
) -> None:
  """Refuses what a method or a network cannot do, before any training.

  Args:
    settings: the settings.
    chosen: what is to be trained.

  Raises:
    UserError: naming the method and the density.
    ValueError: if the data or the network is unknown, or they do not fit.
  """
  splits = load(settings)
  divergence.say_scale(splits, preparation(settings, splits))
  net = nets.make(settings.net, splits.num_classes)
  images = data.to_float(splits.train.images[:1])
  if settings.augment:
    augment.crop_and_flip(jax.random.key(0), images)
  data.check_batch_size(settings.loop.batch_size, len(splits.train.labels))
  theta = shapes(net, splits)
  for combination in chosen:
    tx = _maker(settings, combination, theta, len(splits.train.labels))(
      jax.random.key(0)
    )
    try:
      jax.eval_shape(functools.partial(views.init, tx), theta)
    except ValueError as error:
      raise UserError(
        f'{combination.method} at density {combination.density:g}: {error}'
      ) from error


def load(settings: Settings, show_progress: bool = True) -> data.Splits:
  """The data, of the test split as much as is asked for.

  A process loads it once, for all the combinations that it trains.
  """
  return _splits(settings.data, settings.num_test, show_progress)


@functools.lru_cache(maxsize=1)
def _splits(
  config: DataConfig, num_test: int | None, show_progress: bool
) -> data.Splits:
  splits = data.load(config, show_progress=show_progress)
  test = Arrays(*(part[:num_test] for part in splits.test))
  return splits._replace(test=test)


def train(
  settings: Settings,
  combination: Combination,
  folder: RunFolder,
  *,
  execution: Execution = 'masked',
  description: str = '',
) -> Trained:
  """Trains a combination for every key, or goes on where the folder stopped.

  Args:
    settings: the settings.
    combination: what to train.
    folder: where metrics and checkpoints go.
    execution: how training computes with weights that do not exist; see
      condensed.layout.
    description: what is being trained, for the progress; '' for no progress.

  Returns:
    What came out. A line is printed about each key that diverged.
  """
  splits = load(settings, show_progress=bool(description))
  net = nets.make(settings.net, splits.num_classes)
  theta = shapes(net, splits)
  return train_net(
    settings,
    net,
    _maker(settings, combination, theta, len(splits.train.labels)),
    combination,
    folder,
    execution=execution if combination.method != 'dense' else 'masked',
    make_net=lambda supports: nets.make(
      settings.net, splits.num_classes, supports=supports
    ),
    description=description,
  )


class Place(Protocol):
  """What tells one training from the others, apart from its key."""

  @property
  def name(self) -> str:
    """The name of its folder."""

  @property
  def alpha(self) -> float:
    """The power."""


def train_net(
  settings: Settings,
  net: hk.TransformedWithState,
  make_tx: Callable[[jax.Array], Any],
  place: Place,
  folder: RunFolder,
  *,
  state: TrainState | None = None,
  execution: Execution = 'masked',
  make_net: MakeNet | None = None,
  description: str = '',
) -> Trained:
  """Trains any network for every key, or goes on where the folder stopped.

  Args:
    settings: the data, the keys and the lengths.
    net: the network.
    make_tx: from a PRNG key to a gradient transformation over φ.
    place: its name, for people, and its α.
    folder: where metrics and checkpoints go.
    state: the stacked states to start from, donated; see sparse_sweep.train.
    execution: see sparse_sweep.train.
    make_net: see sparse_sweep.train.
    description: what is being trained, for the progress; '' for no progress.

  Returns:
    What came out. A line is printed about each key that diverged.
  """
  splits = load(settings, show_progress=bool(description))
  prepare = preparation(settings, splits)
  runs = lanes.product([place.alpha], settings.keys)
  state = sparse_sweep.train(
    net,
    make_tx,
    runs,
    splits,
    settings.loop,
    folder,
    state=state,
    prepare=prepare,
    augment=augment.crop_and_flip if settings.augment else None,
    execution=execution,
    make_net=make_net,
    at_once=settings.lanes_at_once,
    description=description,
    show_progress=bool(description),
  )
  sweep.say_diverged(runs, state, folder)
  return Trained(net, state, runs, splits, prepare)


def preparation(settings: Settings, splits: data.Splits) -> step_lib.Prepare:
  """What turns images into what the network sees."""
  if settings.normalise:
    return data.normalise(splits.train.images)
  return data.to_float


def results(combination: Combination, trained: Trained) -> list[Row]:
  """One record for each key: those of sparse_sweep.results, and the method.

  Args:
    combination: what was trained.
    trained: what came out.

  Returns:
    Records with method and density before the fields of sparse_sweep.results.
  """
  net, state, runs, splits, prepare = trained
  found = sparse_sweep.results(net, state, runs, splits, prepare=prepare)
  place = {'method': combination.method, 'density': combination.density}
  return [{**place, **record} for record in found]


def print_accuracy(combination: Named, records: list[Row]) -> None:
  """A line for people, if networks were trained."""
  accuracies = [r['accuracy'] for r in records if 'accuracy' in r]
  if accuracies:
    print(f'{combination.name}: test accuracy {np.mean(accuracies):.4f}')


def shapes(net: hk.TransformedWithState, splits: data.Splits) -> Any:
  """Shapes of the parameters of a network for the images of a data set."""
  init = functools.partial(net.init, is_training=True)
  images = data.to_float(splits.train.images[:1])
  theta, _ = jax.eval_shape(init, jax.random.key(0), images)
  return theta


def _maker(
  settings: Settings, combination: Combination, theta: Params, num_examples: int
) -> Callable[[jax.Array], Any]:
  """From a PRNG key to the gradient transformation of a combination."""
  method, density, alpha = combination
  num_steps = settings.loop.num_steps
  inner = optimizers.make_tx(settings.optimizer, alpha, num_steps)
  lengths = lengths_of(settings.loop, theta, num_examples)

  def make_tx(key: jax.Array) -> Any:
    tx = sparse_methods.make_tx(
      inner, method, density, settings.sparse, lengths, key
    )
    is_fast = method == 'dense' or fusing.fuses_loops()
    fuses = settings.optimizer.is_elementwise and is_fast
    return fusing.fused(tx) if fuses else tx

  return make_tx


def lengths_of(loop: LoopConfig, theta: Params, num_examples: int) -> Lengths:
  """What the settings of a method are shares of.

  Args:
    loop: lengths.
    theta: parameters, or their shapes.
    num_examples: examples in the training split.

  Returns:
    The lengths.
  """
  sizes = [
    leaf.value.size
    for leaf in trees.named_leaves(theta)
    if select_lib.is_weight(*leaf)
  ]
  steps_per_epoch = -(-num_examples // loop.batch_size)
  return Lengths(loop.num_steps, steps_per_epoch, sum(sizes))
