r"""How long a step takes that rewires a network the size of ResNet-50.

    python -m experiments.benchmarks.rewiring

Measures sparsify's whole update, around SGD with momentum, on random weights
and gradients of the shapes of ResNet-50, with every step a rewiring:

rigl              drop by magnitude, grow by gradient, each layer by itself.
set               likewise, grow at random.
magnitude         gradual pruning, each layer by itself.
magnitude_global  gradual pruning, all layers ranked together.
snfs, dsr, top_kast

Ours finds thresholds by counting. Beside the first four stands the same update
with every ranking done the usual way, a stable argsort of the scores and a
scatter of which ranks to keep; the program checks that both choose the same
connections. `without` is the same update when no rewiring is due. Everything
runs in a process with the compiler settings that JAX comes with.

Expected: about 1 s for rigl on two CPU cores, a tenth of the time of sorting or
less. Takes about five minutes, most of it in the sorts.
"""

from collections.abc import Callable
import dataclasses
import math
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments
from experiments.benchmarks import harness
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import masks, schedules, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import NamedLeaf, Params, Updates
from powerprop_jax.files import tables
from powerprop_jax.optim.topologies import (
  counts,
  drop_grow,
  dsr,
  gradual,
  snfs,
  top_kast,
)
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors

# A topology's function that changes the masks.
_Rewire = Callable[[pp.Rewiring], tuple[Any, Any]]


class _Method(NamedTuple):
  """A way to rewire, and the same by sorting."""

  topology: pp.Topology
  by_sorting: _Rewire | None = None


def _drop_grow(
  config: 'Config', growth: drop_grow.Growth, *, replaces_step: bool
) -> _Method:
  topology = drop_grow.drop_grow(
    config.sparsity,
    schedules.every(1),
    config.drop_fraction,
    growth,
    replaces_step=replaces_step,
  )
  return _Method(topology, _sorted_drop_grow(growth, config.drop_fraction))


def _gradual(config: 'Config', scope: gradual.Scope) -> _Method:
  progress = lambda step: jnp.minimum((step + 500) / 1000, 1.0)
  topology = gradual.gradual(
    config.sparsity, progress, schedules.every(1), scope=scope
  )
  return _Method(topology, _sorted_pruning(config.sparsity, progress, scope))


def _dsr(config: 'Config', theta: Params) -> _Method:
  num_dropped = max(1, optax.tree.size(theta) // 1000)
  return _Method(
    dsr.dsr(config.sparsity, schedules.every(1), num_dropped=num_dropped)
  )


# (config, theta) -> how to rewire.
METHODS: dict[str, Callable[['Config', Any], _Method]] = {
  'rigl': lambda config, _: _drop_grow(
    config, drop_grow.by_gradient, replaces_step=True
  ),
  'set': lambda config, _: _drop_grow(
    config, drop_grow.at_random, replaces_step=False
  ),
  'magnitude': lambda config, _: _gradual(config, 'layer'),
  'magnitude_global': lambda config, _: _gradual(config, 'global'),
  'snfs': lambda config, _: _Method(
    snfs.snfs(config.sparsity, schedules.every(1), config.drop_fraction)
  ),
  'dsr': _dsr,
  'top_kast': lambda config, _: _Method(
    top_kast.top_kast(
      config.sparsity, max(config.sparsity - 0.1, 0), schedules.every(1)
    )
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of a step that rewires a network the size of ResNet-50."""

  # The network, one of powerprop_jax.nets.NAMES.
  net: str = 'resnet_50'
  # What to measure.
  methods: tuple[str, ...] = tuple(METHODS)
  # Share of zeros.
  sparsity: float = 0.9
  # Share of the connections that moves.
  drop_fraction: float = 0.3
  # Timed runs of each program, after one that is not counted.
  repeats: int = 3
  # Whether to measure sorting too.
  by_sorting: bool = True


def main(config: Config) -> None:
  """Prints a table as it grows."""
  _check(config)
  with harness.process_with('none') as process:
    environment = process.submit(timing.environment).result()
    print(
      f'{config.net}, sparsity {config.sparsity:g}; medians of '
      f'{config.repeats} interleaved updates.\n{environment}'
    )
    rows: list[tables.Row] = []
    for name in config.methods:
      row, heading = process.submit(_measure, config, name).result()
      if not rows:
        print(f'{heading}\n')
      rows.append(row)
      print(f'{name}: {row["s"]} s', flush=True)
  print(f'\n{tables.text_table(rows)}')


def _check(config: Config) -> None:
  harness.check_known(config, 'methods', METHODS)
  masks.check_sparsity(config.sparsity, '--sparsity')
  counts.check_fraction(config.drop_fraction, '--drop-fraction')
  errors.check_positive(config, 'repeats')
  nets.make(config.net, 1)


def _measure(config: Config, name: str) -> tuple[tables.Row, str]:
  """The row of a method, and a line about the network."""
  theta, grads = _weights_and_gradients(config.net)
  method = METHODS[name](config, theta)
  topologies = {
    'ours': method.topology,
    'without': method.topology._replace(when=schedules.never),
  }
  if config.by_sorting and method.by_sorting is not None:
    topologies['sorting'] = method.topology._replace(rewire=method.by_sorting)
  states: dict[str, pp.SparseState] = {}
  programs = {
    variant: _updates(topology, theta, grads, states, variant)
    for variant, topology in topologies.items()
  }
  times = timing.take_turns(programs, config.repeats)
  ours = times['ours'].wall
  row: tables.Row = {
    'method': name,
    's': round(statistics.median(ours), 3),
    'without_s': round(statistics.median(times['without'].wall), 3),
    'sorting_s': None,
    'sorting_/_ours': None,
    'same_masks': None,
  }
  if 'sorting' in times:
    by_sorting = times['sorting'].wall
    row['sorting_s'] = round(statistics.median(by_sorting), 3)
    row['sorting_/_ours'] = round(timing.median_ratio(by_sorting, ours), 1)
    is_same = _are_equal(states['ours'].masks, states['sorting'].masks)
    row['same_masks'] = 'yes' if is_same else 'no'
  return row, _about(theta, states['ours'].masks)


def _about(theta: Params, held: Any) -> str:
  num_bytes = sum(mask.nbytes for mask in jax.tree.leaves(held))
  return (
    f'{optax.tree.size(theta):,} parameters in {len(jax.tree.leaves(theta))} '
    f'leaves; masks of {num_bytes:,} bytes in the state'
  )


def _weights_and_gradients(net_name: str) -> tuple[Any, Any]:
  """Random trees with the shapes of a network for photographs."""
  net = nets.make(net_name, 1000)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes, _ = jax.eval_shape(
    lambda key, images: net.init(key, images, True), jax.random.key(0), images
  )
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(
    rng.standard_normal(leaf.shape, np.float32) * np.float32(0.05)
  )
  return jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)


def _updates(
  topology: pp.Topology,
  phi: Params,
  grads: Updates,
  states: dict[str, pp.SparseState],
  variant: str,
) -> timing.Program:
  """A program that runs one update; states[variant] is where it has got to."""
  tx = pp.sparsify(optax.sgd(0.1, momentum=0.9), topology)
  states[variant] = tx.init(phi)
  update = jax.jit(tx.update, donate_argnums=1)

  def run() -> Any:
    updates, states[variant] = update(grads, states[variant], phi)
    return updates, states[variant]

  return run


def _are_equal(one: Any, other: Any) -> bool:
  return all(jax.tree.leaves(jax.tree.map(jnp.array_equal, one, other)))


def _sorted_drop_grow(growth: drop_grow.Growth, fraction: float) -> _Rewire:
  """SET and RigL with two sorts a layer."""

  def move(leaf: NamedLeaf, mask: jax.Array, grow: jax.Array) -> jax.Array:
    active = counts.num_active(mask)
    moved = counts.share(jnp.float32(fraction), active)
    moved = jnp.minimum(moved, mask.size - active)
    survivors = sorted_top_k(jnp.abs(leaf.value), active - moved, mask)
    return survivors | sorted_top_k(grow, moved, ~survivors)

  def rewire(rewiring: pp.Rewiring) -> tuple[Any, Any]:
    moved = counts.map_masks(move, pp.is_weight, rewiring, growth(rewiring))
    return moved, rewiring.memory

  return rewire


def _sorted_pruning(
  sparsity: float,
  progress: Callable[[jax.Array], jax.Array],
  scope: gradual.Scope,
) -> _Rewire:
  """Magnitude pruning with one sort a layer, or one of everything."""

  def smaller(mask: jax.Array, theta: jax.Array, done: jax.Array) -> jax.Array:
    size = mask.size
    removed = size - masks.num_kept(size, sparsity)
    count = size - counts.share(done, jnp.int32(removed))
    return sorted_top_k(jnp.abs(theta), count, mask)

  def rewire(rewiring: pp.Rewiring) -> tuple[Any, Any]:
    done = progress(rewiring.step)
    if scope == 'global':
      names = select_lib.selected_names(pp.is_weight, rewiring.theta)
      values, held = (
        trees.by_path(tree) for tree in (rewiring.theta, rewiring.masks)
      )
      flat = lambda tree: jnp.concatenate([tree[n].ravel() for n in names])
      together = smaller(flat(held), flat(values), done)
      ends = np.cumsum([values[name].size for name in names])[:-1]
      parts = dict(zip(names, jnp.split(together, ends), strict=True))
      pick = lambda module, name, mask: (
        parts[path].reshape(mask.shape)
        if (path := trees.join_name(module, name)) in parts
        else mask
      )
      return trees.map_named(pick, rewiring.masks), rewiring.memory
    pruned = counts.map_masks(
      lambda leaf, mask: smaller(mask, leaf.value, done),
      pp.is_weight,
      rewiring,
    )
    return pruned, rewiring.memory

  return rewire


def sorted_top_k(
  scores: jax.Array, k: jax.Array, among: jax.Array
) -> jax.Array:
  """What core.top_k.topk.top_k_mask gives, by sorting.

  Keeps k entries, an integer scalar, where among is True; no more than it has.

  Example:
    >>> sorted_top_k(jnp.array([3., 1., 3., 2.]), 2,
    ...              jnp.array([False, True, True, True]))
    Array([False, False,  True,  True], dtype=bool)
  """
  ranked = jnp.where(among, scores, -jnp.inf).ravel()
  order = jnp.argsort(-ranked, stable=True)
  kept = jnp.arange(math.prod(scores.shape)) < k
  mask = jnp.zeros(ranked.shape, bool).at[order].set(kept)
  return mask.reshape(scores.shape)


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
