"""What a cosine transform costs: sizes, and the time of a training step."""

from collections.abc import Sequence
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import sparse_runs
from experiments.dct_plus_sparse import patterns, training
from experiments.dct_plus_sparse.config import Config, Network
from powerprop_jax.files.tables import Row
from powerprop_jax.train import methods
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.data import splits as data

_Records = Sequence[dict[str, Any]]
_REPEATS = 7


def size_table(records: _Records) -> list[Row]:
  """Sizes of the state, a row for each network and density.

  Bytes are of the state while training, masked and condensed, the latter as a
  share of the dense network's too. The first record of each network and density
  counts, and a support that stays as it is before one that moves.

  Example:
    >>> sizes = {'bytes_dense': 400, 'bytes_masked': 500, 'bytes_condensed': 8}
    >>> size_table([{'network': 'dct', 'density': 0.01, 'parameters': 1,
    ...              **sizes}])[0]['condensed / dense']
    0.02
  """
  rows: dict[Any, Row] = {}
  for record in records:
    place = (record['network'], record['density'])
    condensed = record['bytes_condensed']
    if place in rows and (
      condensed is None or rows[place]['bytes condensed'] is not None
    ):
      continue
    share = None if condensed is None else condensed / record['bytes_dense']
    rows[place] = {
      'network': record['network'],
      'density': record['density'],
      'parameters': record['parameters'],
      'bytes masked': record['bytes_masked'],
      'bytes condensed': condensed,
      'condensed / dense': share,
    }
  return list(rows.values())


def step_table(config: Config) -> list[Row]:
  """Time of a step of each network, with all connections in the masked form.

  A step of that form takes as long at every density. The networks take turns;
  milliseconds are the median of seven runs after compilation.
  """
  if not config.timed_steps:
    return []
  programs: dict[str, timing.Program] = {
    network: _program(config, network) for network in config.networks
  }
  times = timing.take_turns(programs, _REPEATS)
  first = times[config.networks[0]].wall
  return [
    {
      'network': network,
      'optimiser': training.optimizer_of(config, network).name,
      'step (ms)': 1000
      * statistics.median(times[network].wall)
      / config.timed_steps,
      f'ratio to {config.networks[0]}': timing.median_ratio(
        times[network].wall, first
      ),
    }
    for network in config.networks
  ]


def _program(config: Config, network: Network) -> timing.Program:
  """Some steps of a network, all on the first batch."""
  splits = sparse_runs.load(config)
  alpha = config.alphas[0]
  net = training.make_net(config, network, alpha, splits.num_classes)
  inner = training.inner_tx(config, network, alpha)
  tx = patterns.make_tx(
    inner, 'magnitude', 1.0, config.sparse, methods.Lengths(1, 1, 1)
  )
  images, labels = (part[: config.loop.batch_size] for part in splits.train)
  prepare = sparse_runs.preparation(config, splits)
  advance = jax.jit(
    step_lib.make_advance(
      net,
      tx,
      prepare=prepare,
      augment=data.crop_and_flip if config.augment else None,
    )
  )
  start = step_lib.create(net, tx, jax.random.key(0), prepare(images))
  arrays = jax.device_put(type(splits.train)(images, labels))
  indices = jnp.broadcast_to(
    jnp.arange(len(labels)), (config.timed_steps, len(labels))
  )
  return functools.partial(advance, start, arrays, indices)
