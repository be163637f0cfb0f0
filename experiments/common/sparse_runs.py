"""Networks trained sparse, from the settings of a program.

What programs that compare methods of sparse training have in common: their
settings, which combinations there are, whether they can be trained at all, and
their training. The members of an ensemble differ in their key alone: α is a
Python number and compiled in.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import haiku as hk
import jax
import numpy as np
import optax

from experiments.common.combinations import Named
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.train import condensed, ensemble, loop, methods
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli.arguments import Net
from powerprop_jax.train.condensed import Execution
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import Method, SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import divergence, errors, mask_watch, writers
from powerprop_jax.train.runs.contents import Networks
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunConfig, RunFolder
from powerprop_jax.train.scale import fusing
from powerprop_jax.train.step import TrainState

# From a PRNG key to a gradient transformation over φ; α is in it.
MakeTx = Callable[[jax.Array], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Settings(RunConfig):
  """What all of these programs are told."""

  # The data set.
  data: DataConfig = DataConfig()
  # Test examples to use, the first ones. Default: all.
  num_test: int | None = None
  # Subtract the mean of each channel and divide by its standard deviation.
  normalise: bool = False
  # Shift by up to 4 pixels and mirror at random in training.
  augment: bool = False
  net: Net = 'lenet_300_100'
  # Seeds of the initial weights, of masks, and of the order of the data.
  keys: tuple[int, ...] = (0, 1, 2)
  # The optimiser.
  optimizer: OptimizerConfig = OptimizerConfig(
    learning_rate=0.05,
    schedule='cosine',
    momentum=0.9,
    nesterov=True,
    decay_theta=5e-4,
  )
  # Lengths.
  loop: LoopConfig = LoopConfig(
    num_steps=1_500, batch_size=60, eval_every=150, steps_per_dispatch=150
  )
  # How connections move.
  sparse: SparseConfig = SparseConfig()
  # Keys computed side by side; with 1, one after another in the same program.
  lanes_at_once: int | None = 1


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


def networks(
  settings: Settings, alpha: float, *, dct: bool = False
) -> Networks:
  """What to say of the networks that are trained for every key."""
  return Networks(
    settings.net,
    settings.data,
    settings.loop.num_steps,
    (alpha,),
    settings.keys,
    num_test=settings.num_test,
    normalise=settings.normalise,
    dct=dct,
  )


class Trained(NamedTuple):
  """The networks of one combination, one for each key.

  Attributes:
    net: the network.
    state: the stacked final states.
    members: the runs.
    splits: the data.
    prepare: turns images into what the network sees.
  """

  net: hk.TransformedWithState
  state: TrainState
  members: Members
  splits: data.Splits
  prepare: data.Prepare


def combinations(
  methods: Iterable[Method], densities: Sequence[float], alphas: Iterable[float]
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


def check_settings(settings: Settings, *several: str) -> data.Splits:
  """Refuses settings that do not fit, of which several are tuples.

  Returns:
    The data.
  """
  errors.check_positive(settings, 'lanes_at_once', prefix='')
  errors.check_several(settings, *several)
  errors.check_positive(settings, 'num_test')
  ensemble.product([1.0], settings.keys)
  splits = load(settings)
  for option in ('normalise', 'augment'):
    if getattr(settings, option):
      data.check_images(splits, f'--{option}')
  divergence.say_scale(splits, preparation(settings, splits))
  if settings.augment:
    data.crop_and_flip(jax.random.key(0), splits.example)
  data.check_batch_size(settings.loop.batch_size, len(splits.train.labels))
  return splits


def check_combinations(
  settings: Settings, chosen: Iterable[Combination], splits: data.Splits
) -> None:
  """Refuses what a method or a network cannot do, before any training."""
  net = nets.make(settings.net, splits.num_classes)
  theta = step_lib.shapes(net, splits.example)
  for combination in chosen:
    make_tx = tx_maker(settings, combination, theta, splits)
    what = f'{combination.method} at density {combination.density:g}'
    check_starts(make_tx, theta, what)


def check_starts(make_tx: MakeTx, theta: Params, what: str) -> None:
  """Refuses a transformation that cannot start with parameters of a shape."""
  try:
    init = functools.partial(pp.init, make_tx(jax.random.key(0)))
    jax.eval_shape(init, theta)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{what}: {error}') from error


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
  net: hk.TransformedWithState,
  make_tx: MakeTx,
  alpha: float,
  folder: RunFolder,
  *,
  state: TrainState | None = None,
  execution: Execution = 'masked',
  description: str = '',
) -> Trained:
  """Trains a network for every key, or goes on where the folder stopped.

  At each evaluation metrics.jsonl gets, beside the scores, what
  MaskWatch.records says. A line is printed about each key that diverged.

  Args:
    alpha: the one that make_tx has.
    state: the stacked states to start from, donated; None makes them.
    execution: how training computes with weights that do not exist, see
      condensed.layout; condensed, keys are computed one by one.
    description: what is being trained, for the progress; '' for no progress.
  """
  splits = load(settings, show_progress=bool(description))
  prepare = preparation(settings, splits)
  members = ensemble.product([alpha], settings.keys)
  if state is None:
    state = ensemble.create_by_key(net, make_tx, members, splits.example)
  tx = make_tx(jax.random.key(0))  # the state has the key that counts
  options: Row = {
    'prepare': prepare,
    'augment': data.crop_and_flip if settings.augment else None,
  }
  thin = condensed.advance_of(
    state,
    net=net,
    tx=tx,
    images=splits.train.images[: settings.loop.batch_size],
    execution=execution,
    **options,
  )
  advance = thin or fusing.make_advance(net, tx, **options)
  at_once = 1 if thin else settings.lanes_at_once
  score = evaluate_lib.on_state(net, prepare=prepare)
  watch = mask_watch.MaskWatch(state)

  def records(trained: Tree, found: Tree) -> list[Row]:
    scores, masks = jax.device_get(found)
    scored = ensemble.score_records(members, trained, scores)
    return [*scored, *watch.records(members, masks)]

  state = loop.fit(
    state,
    ensemble.mapped(advance, at_once),
    ensemble.mapped(
      lambda state, arrays: (score(state, arrays), mask_watch.masks_of(state)),
      at_once,
    ),
    splits,
    settings.loop,
    folder,
    indices=functools.partial(ensemble.batch_indices, members),
    records=records,
    begin=watch.begin,
    description=description,
    writers=writers.of_run(folder, settings),
  )
  ensemble.say_diverged(members, state, folder)
  return Trained(net, state, members, splits, prepare)


def preparation(settings: Settings, splits: data.Splits) -> data.Prepare:
  """What turns images into what the network sees."""
  if settings.normalise:
    return data.normalise(splits.train.images)
  return data.to_float


def results(trained: Trained) -> list[Row]:
  """What came out, one record for each key.

  Returns:
    Records with alpha, key, density_measured (the share of weights that are
    connections), accuracy and loss of the test split, and validation_accuracy.
  """
  net, state, members, splits, prepare = trained
  score = evaluate_lib.on_state(net, prepare=prepare)
  mapped = jax.jit(ensemble.mapped(score, 1))
  test, validation = (
    jax.device_get(mapped(state, jax.device_put(arrays)))
    for arrays in (splits.test, splits.validation)
  )
  masks = mask_watch.stacked_masks(state)
  return [
    {
      **name,
      'density_measured': mask_watch.density(ensemble.take(masks, index)),
      'accuracy': float(test['accuracy'][index]),
      'loss': float(test['loss'][index]),
      'validation_accuracy': float(validation['accuracy'][index]),
    }
    for index, name in enumerate(ensemble.names(members))
  ]


def print_accuracy(combination: Named, records: list[Row]) -> None:
  """A line for people, if networks were trained."""
  accuracies = [r['accuracy'] for r in records if 'accuracy' in r]
  if accuracies:
    print(f'{combination.name}: test accuracy {np.mean(accuracies):.4f}')


def tx_maker(
  settings: Settings,
  combination: Combination,
  theta: Params,
  splits: data.Splits,
) -> MakeTx:
  """What trains a combination, for the shapes of its network."""
  method, density, alpha = combination
  lengths = methods.lengths_of(settings.loop, theta, len(splits.train.labels))
  return functools.partial(
    methods.for_settings,
    settings.optimizer,
    alpha,
    method,
    density,
    settings.sparse,
    lengths,
  )
