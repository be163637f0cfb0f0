"""What experiments/dct_plus_sparse trains, and what it measures of it."""

from typing import Any, NamedTuple
import warnings

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import combinations as combination_runs
from experiments.common import sparse_runs
from experiments.common.sparse_runs import MakeTx, Trained
from experiments.dct_plus_sparse import patterns, propagation, state_sizes
from experiments.dct_plus_sparse.config import Config, Network
from experiments.dct_plus_sparse.patterns import SupportName
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.prune import at_init
from powerprop_jax.train import ensemble, methods, optimizers
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import mask_watch
from powerprop_jax.train.step import TrainState

Records = list[Row]

PROGRAM = 'dct_plus_sparse'
# The times of steps are measured again.
NOT_SETTINGS = ('timed_steps',)


class Combination(NamedTuple):
  """What one compiled program trains, for all keys.

  Attributes:
    network: 'standard' or 'dct'.
    support: how the connections are chosen.
    density: share of the weights that are connections.
    alpha: the power.
  """

  network: Network
  support: SupportName
  density: float
  alpha: float

  @property
  def name(self) -> str:
    """The name of its folder."""
    return (
      f'{self.network}_{self.support}_density_{self.density:g}_alpha_'
      f'{self.alpha:g}'
    )


def combinations(config: Config) -> list[Combination]:
  """All that are possible: scored supports are for the standard network."""
  return [
    Combination(network, support, density, alpha)
    for alpha in config.alphas
    for support in config.supports
    for density in config.densities
    for network in config.networks
    if patterns.is_possible(support, dct=network == 'dct')
  ]


def make_net(
  config: Config, network: Network, alpha: float, num_classes: int
) -> hk.TransformedWithState:
  """The network, with the transform or without it.

  With the transform and α > 1 its weights start at small random values: at zero
  powerprop could not move them.
  """
  if network == 'standard':
    return nets.make(config.net, num_classes)
  w_init = None
  if alpha > 1:
    w_init = hk.initializers.VarianceScaling(config.dct_init_scale)
  return nets.make(config.net, num_classes, dct=True, w_init=w_init)


def tx_maker(
  config: Config, combination: Combination, theta: Params, splits: data.Splits
) -> MakeTx:
  """What trains a combination, for the shapes of its network."""
  network, support, density, alpha = combination
  inner = inner_tx(config, network, alpha)
  lengths = methods.lengths_of(config.loop, theta, len(splits.train.labels))
  return lambda key: patterns.make_tx(
    inner, support, density, config.sparse, lengths, key
  )


def inner_tx(
  config: Config, network: Network, alpha: float, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """The optimiser of a network, powerprop included."""
  settings = optimizer_of(config, network)
  return optimizers.make_tx(settings, alpha, config.loop.num_steps, **options)


def optimizer_of(config: Config, network: Network) -> OptimizerConfig:
  """The settings of a network's optimiser."""
  return config.dct_optimizer if network == 'dct' else config.optimizer


def train(
  config: Config, description: str, combination: Combination
) -> Records:
  """Results of a combination: trained, or read where that is done.

  One record of the network for each key, and one of each layer. None at all
  where the scores rank nothing, as of a network that earlier rounds of pruning
  have cut through; a line says so.
  """
  network, support, _, alpha = combination
  networks = sparse_runs.networks(config, alpha, dct=network == 'dct')
  folder = combination_runs.folder(
    config, combination, PROGRAM, *NOT_SETTINGS, networks=networks
  )
  if folder.is_complete:
    return combination_runs.read(folder)
  splits = sparse_runs.load(config, bool(description))
  net = make_net(config, network, alpha, splits.num_classes)
  theta = step_lib.shapes(net, splits.example)
  make_tx = tx_maker(config, combination, theta, splits)
  members = ensemble.product([alpha], config.keys)
  state = ensemble.create_by_key(net, make_tx, members, splits.example)
  if support in patterns.SCORED:
    try:
      masks = _find_masks(config, combination, net, state, splits)
    except ValueError as error:
      print(f'note: {combination.name} is left out: {error}', flush=True)
      return combination_runs.write(folder, [])
    state = patterns.install(state, masks)
  signals = _signals(config, net, state, splits)
  trained = sparse_runs.train(
    config, net, make_tx, alpha, folder, state=state, description=description
  )
  records = _records(config, combination, trained, signals)
  return combination_runs.write(folder, records)


def _find_masks(
  config: Config,
  combination: Combination,
  net: hk.TransformedWithState,
  state: TrainState,
  splits: data.Splits,
) -> Tree:
  """The masks of a scored support for every key, stacked."""
  prepare = sparse_runs.preparation(config, splits)
  weights = jax.jit(jax.vmap(lambda s: (s.theta, s.net_state)))(state)
  scorer = patterns.make_scorer(
    net, ensemble.take(weights, 0)[1], splits.train, prepare, config.score
  )
  found = []
  for index, key in enumerate(config.keys):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', at_init.LayerCollapseWarning)
      masks = patterns.find(
        scorer,
        combination.support,
        ensemble.take(weights, index)[0],
        combination.density,
        # Another stream than those of the weights, the masks and the steps.
        jax.random.fold_in(jax.random.key(key), 3),
      )
    for warning in caught:
      line = str(warning.message).split('. ')[0]
      print(f'note: {combination.name}, key {key}: {line}.', flush=True)
    found.append(masks)
  return jax.tree.map(lambda *parts: jnp.stack(parts), *found)


def _signals(
  config: Config,
  net: hk.TransformedWithState,
  state: TrainState,
  splits: data.Splits,
) -> list[Records]:
  """Signal propagation before the first step, for each key."""
  prepare = sparse_runs.preparation(config, splits)
  images, labels = (part[: config.loop.batch_size] for part in splits.train)
  layers: list[str] = []

  def measure(state: TrainState, batch: Any) -> Any:
    images, labels = batch

    def apply(theta: Params, images: Any) -> jax.Array:
      key = jax.random.key(0)  # of dropout, where the network has it
      return net.apply(theta, state.net_state, key, prepare(images), True)[0]

    masks = pp.current_masks(state.phi, state.opt_state)
    found = propagation.signal_propagation(
      apply,
      lambda logits: jnp.mean(step_lib.cross_entropy(logits, labels)),
      state.theta,
      images,
      masks=masks,
    )
    # A dictionary would come out of jit in another order.
    layers[:] = found
    return tuple(found.values())

  mapped = jax.jit(ensemble.mapped(measure, 1))
  measured = mapped(state, (images, labels))
  by_layer = dict(zip(layers, jax.device_get(measured), strict=True))
  return [
    propagation.signal_records(
      {
        layer: propagation.Signal(*ensemble.take(signal, index))
        for layer, signal in by_layer.items()
      }
    )
    for index in range(len(config.keys))
  ]


def _records(
  config: Config,
  combination: Combination,
  trained: Trained,
  signals: list[Records],
) -> Records:
  """One record of the network for each key, and one of each layer."""
  state = trained.state
  masks = mask_watch.stacked_masks(state)
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state
  )
  place = combination._asdict()
  records: Records = []
  for index, record in enumerate(sparse_runs.results(trained)):
    counts = {path: int(np.sum(m[index])) for path, m in masks.items()}
    sizes = _sizes(config, combination, one, counts)
    records.append({**place, **record, **sizes})
  for index, key in enumerate(config.keys):
    densities = {
      path.rpartition('/')[0]: float(np.mean(mask[index]))
      for path, mask in masks.items()
    }
    for signal in signals[index]:
      record = {**place, 'key': key, **signal}
      record['layer_density'] = densities[signal['layer']]
      records.append(record)
  return records


def _sizes(
  config: Config,
  combination: Combination,
  state: TrainState,
  counts: dict[str, int],
) -> Row:
  """Parameters that are trained, and bytes of the state, from its shapes."""
  network, support, _, alpha = combination
  phi, net_state = state.phi, state.net_state
  inner = inner_tx(config, network, alpha)
  condensed = inner_tx(config, network, alpha, select=_is_named_w)
  return {
    'parameters': state_sizes.num_trained(phi, sum(counts.values())),
    'bytes_dense': state_sizes.trained_bytes(inner, phi, net_state),
    'bytes_masked': state_sizes.tree_bytes((phi, net_state, state.opt_state)),
    # Connections that move need gradients of those that do not exist.
    'bytes_condensed': None
    if support in patterns.MOVING
    else state_sizes.condensed_bytes(condensed, phi, counts, net_state),
  }


def _is_named_w(module_name: str, name: str, value: Any) -> bool:
  """True for weights, dense or a vector of connections."""
  del module_name, value
  return name == 'w'
