"""SNFS, sparse momentum: connections go where the gradient has been steady.

    importance of a layer = mean |m| over its connections, m its momentum

Each layer drops its smallest weights. What all of them dropped is shared out
again in proportion to the importance of the layers, and grows where |m| is
largest among the connections that do not exist.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import distributions, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import Schedule, When
from powerprop_jax.core.top_k import patterns
from powerprop_jax.core.trees import (
  NamedLeaf,
  Params,
  Tree,
  Updates,
)
from powerprop_jax.optim.topologies import allocation, counts, drop_grow
from powerprop_jax.optim.topologies.counts import (
  Budget,
  Patterned,
  check_options,
)
from powerprop_jax.optim.topology import Rewiring, Topology

# A layer with fewer zeros than this, and growing, drops no more than its zeros.
_NEAR_DENSE = 0.2
# The share of its free places that a layer may grow.
_CAP = 0.99
_MAX_TURNS = 1000
_EPSILON = 1e-8


class SparseMomentum(NamedTuple):
  """What SNFS remembers.

  Attributes:
    momentum: m, sum of past gradients that decays; float32, a tree like θ, zero
      on leaves that are not selected.
    square: v, running mean of squared gradients, likewise; an empty tuple
      without second_moment.
    correction: connections to grow beyond those dropped, float32 scalar.
    residuals: sum of past residuals, float32 scalar.
    num_rewirings: how many those were, int32 scalar.
  """

  momentum: Tree
  square: Tree
  correction: jax.Array
  residuals: jax.Array
  num_rewirings: jax.Array


def snfs(
  sparsity: Sparsity,
  when: When,
  drop_fraction: float | Schedule = 0.5,
  *,
  momentum: float = 0.9,
  second_moment: float | None = None,
  redistribute: bool = True,
  replaces_step: bool = False,
  **leaves: Unpack[Patterned],
) -> Topology:
  """Drops by magnitude, grows by momentum, moves connections between layers.

  In each layer l with n_l connections and z_l free places, importance i_l (all
  of them sum to 1) and L layers:

  1. p_l = p; no more than its share of zeros, if that is below 0.2 and
     i_l > 1/L.
  2. The r_l = ceil(p_l n_l) smallest |θ| are dropped.
  3. ceil(i_l (Σ r + c)) are to grow, but at most 0.99 (z_l + r_l). What is over
     is spread over all layers alike, until nothing is.
  4. So many, rounded down, grow where |m| is largest, of all that is not kept.
  5. With e the number then missing to the total, and ē the mean of all e so
     far, c ← c/4 + 3e/4 + ē.

  Then the total is made exact: those missing go to the layers in proportion to
  i_l, those too many are taken from what each has grown, in proportion.

  With constant fan-in a layer gains or loses an input for all of its neurons at
  once: allocation.whole_fan_ins makes whole inputs of what each layer should
  have, and each neuron grows what it lacks.

  Args:
    sparsity: what to start from, and the distribution likewise.
    when: once an epoch in the paper.
    drop_fraction: p, in (0, 1); or a schedule of it, in [0, 1].
    momentum: β of m ← β m + g, in [0, 1). It is the topology's own, dense one.
    second_moment: β₂ of v ← β₂ v + (1 - β₂) g², in [0, 1); |m|/(√v + 1e-8) then
      takes the place of |m|, as with Adam. None is without.
    redistribute: False to leave every layer its number of connections for ever,
      as the authors of RigL do when they compare with SNFS.
    **leaves: see Patterned. The paper selects all layers, from first to last.

  Returns:
    A Topology whose memory is a SparseMomentum. The total number of connections
    never changes; those of each leaf do, and are at least one. With constant
    fan-in the total falls short of that of the start by less than the neurons
    of the widest layer, which is shared out again the next time.

  Note:
    The authors' code draws the first masks entry by entry, so that the total is
    not what was promised, and lets it drift; the correction c steers it back.
    Here the first masks and every total are exact. Their momentum is that of
    the optimiser, to which weight decay contributes. A layer drops no more than
    all but one of its connections. Layers are equally important while no
    connection has momentum. Gradients that are not finite do not count.

    Importances are sums of floats: in another order, as on several devices,
    they may differ in the last digit, and a layer by one connection.

  Source:
    Algorithm 1 of the paper, see aliases.snfs; steps 1, 3 and 5 as in its code.
  """
  leaves.setdefault('distribution', distributions.uniform)
  check_options(leaves, Patterned)
  budget = Budget(sparsity, **leaves)
  select = budget.select
  schedule = counts.as_schedule(drop_fraction)
  for name, decay in (('momentum', momentum), ('second_moment', second_moment)):
    if decay is not None and not 0 <= decay < 1:
      raise ValueError(f'{name} must be in [0, 1), got {decay}.')
  is_adaptive = second_moment is not None

  def init(key: jax.Array, theta: Params) -> tuple[Masks, SparseMomentum]:
    zeros = lambda: optax.tree.zeros_like(theta, dtype=jnp.float32)
    return budget.random_masks(key, theta), SparseMomentum(
      momentum=zeros(),
      square=zeros() if is_adaptive else (),
      correction=jnp.zeros([], jnp.float32),
      residuals=jnp.zeros([], jnp.float32),
      num_rewirings=jnp.zeros([], jnp.int32),
    )

  def observe(memory: SparseMomentum, grads: Updates) -> SparseMomentum:
    add = functools.partial(_decayed, momentum, lambda g: g)
    sums = trees.map_selected(add, select, memory.momentum, grads)
    if second_moment is None:
      return memory._replace(momentum=sums)
    scaled_square = lambda g: (1 - second_moment) * jnp.square(g)
    add = functools.partial(_decayed, second_moment, scaled_square)
    squares = trees.map_selected(add, select, memory.square, grads)
    return memory._replace(momentum=sums, square=squares)

  def rewire(rewiring: Rewiring) -> tuple[Masks, SparseMomentum]:
    memory, masks, theta = rewiring.memory, rewiring.masks, rewiring.theta
    ranked = _steadiness(memory, is_adaptive)
    names = select_lib.selected_names(select, theta)
    held, sizes = counts.held(masks, names)
    share = _importances(ranked, masks, names)
    fraction = jnp.asarray(schedule(rewiring.step), jnp.float32)
    dropped = num_to_drop(fraction, held, sizes, share)
    wanted, missing = _redistributed(
      budget, theta, held - dropped, sizes, share, dropped, memory.correction
    )
    plan = dict(zip(names, zip(dropped, wanted, strict=True), strict=True))

    def move(leaf: NamedLeaf, mask: jax.Array, grow: jax.Array) -> jax.Array:
      drop, num = scores.magnitude(leaf.value), plan[leaf.path]
      layout = budget.layout(leaf.path, mask)
      mask, drop, grow = map(layout.to_neurons, (mask, drop, grow))
      moved = drop_grow.drop_and_grow(mask, drop, grow, *num, budget.pattern)
      return layout.from_neurons(moved)

    moved = counts.map_masks(move, select, rewiring, ranked)
    return moved, _corrected(memory, missing)

  if not redistribute:
    alone = drop_grow.drop_grow(
      sparsity,
      when,
      drop_fraction,
      lambda rewiring: _steadiness(rewiring.memory, is_adaptive),
      replaces_step=replaces_step,
      **leaves,
    )
    return alone._replace(init=init, observe=observe)
  return Topology(
    init, rewire, when, observe=observe, replaces_step=replaces_step
  )


def _redistributed(
  budget: Budget,
  theta: Params,
  left: jax.Array,
  sizes: jax.Array,
  share: jax.Array,
  dropped: jax.Array,
  correction: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Connections that each group of each layer should have, and e of step 5."""
  room = sizes - left
  if budget.pattern is patterns.UNSTRUCTURED:
    grown, missing = exact_growth(jnp.sum(dropped), correction, share, room)
    return left + grown, missing
  start, shapes = budget.counts(theta), budget.shapes(theta)
  groups = [budget.pattern.groups(shapes[name])[0] for name in start]
  neurons = jnp.array(groups, jnp.int32)
  # From the start: what whole inputs left over the last time counts too.
  total = jnp.sum(jnp.array(list(start.values()), jnp.int32) * neurons)
  lacks = total - jnp.sum(left)
  grown, missing = exact_growth(lacks, correction, share, room)
  return allocation.whole_fan_ins(left + grown, neurons), missing


def num_to_drop(
  fraction: jax.Array, counts: jax.Array, sizes: jax.Array, share: jax.Array
) -> jax.Array:
  """Steps 1 and 2 of snfs: how many connections each layer drops.

  Of counts connections of each layer, int32[L], of its sizes weights and its
  share of the importance, float32[L]. Less than counts unless these are 0.

  Example:
    >>> num_to_drop(0.5, jnp.array([9, 9]), jnp.array([10, 90]),
    ...             jnp.array([0.6, 0.4]))
    Array([1, 5], dtype=int32)
  """
  total = counts.astype(jnp.float32)
  zeros = (sizes - counts).astype(jnp.float32) / sizes.astype(jnp.float32)
  grows = (zeros < _NEAR_DENSE) & (share > 1 / share.size)
  fractions = jnp.where(grows, jnp.minimum(zeros, fraction), fraction)
  dropped = jnp.ceil(fractions * total).astype(jnp.int32)
  return jnp.clip(dropped, 0, jnp.maximum(counts - 1, 0))


def num_to_grow(
  total: jax.Array, correction: jax.Array, share: jax.Array, room: jax.Array
) -> jax.Array:
  """Steps 3 and 4 of snfs: how many connections each layer should grow.

  Args:
    total: number of connections dropped in all layers, int32 scalar.
    correction: c, float32 scalar.
    share: importance of each layer, float32[L].
    room: its free places after dropping, int32[L]; at most these are grown, in
      all near total, but not always as many.

  Example:
    >>> num_to_grow(jnp.array(20), jnp.array(0.), jnp.array([0.75, 0.25]),
    ...             jnp.array([10, 100]))
    Array([ 9, 10], dtype=int32)
  """
  cap = _CAP * room.astype(jnp.float32)
  wanted = jnp.ceil(share * (total.astype(jnp.float32) + correction))

  def is_over(state: Tree) -> jax.Array:
    turn, _, over = state
    return (over > 0) & (turn < _MAX_TURNS)

  def spread(state: Tree) -> Tree:
    turn, growth, over = state
    growth = growth + over / share.size
    capped = jnp.minimum(growth, cap)
    return turn + 1, capped, jnp.sum(growth - capped)

  wanted = jnp.maximum(wanted, 0)
  capped = jnp.minimum(wanted, cap)
  start = (jnp.ones([], jnp.int32), capped, jnp.sum(wanted - capped))
  _, growth, _ = jax.lax.while_loop(is_over, spread, start)
  return jnp.floor(growth).astype(jnp.int32)


def exact_growth(
  total: jax.Array, correction: jax.Array, share: jax.Array, room: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """As num_to_grow, with what is then missing or too much put right.

  Returns (grown, missing): int32[L] whose sum is total, and e of step 5, how
  many num_to_grow left missing.
  """
  grown = num_to_grow(total, correction, share, room)
  missing = total - jnp.sum(grown)
  grown += allocation.allocate(missing, share, room - grown)
  grown -= allocation.allocate(-missing, grown, grown)
  return grown, missing


def _corrected(memory: SparseMomentum, missing: jax.Array) -> SparseMomentum:
  """Step 5 of snfs."""
  residual = missing.astype(jnp.float32)
  residuals = memory.residuals + residual
  num_rewirings = memory.num_rewirings + 1
  mean = residuals / num_rewirings.astype(jnp.float32)
  return memory._replace(
    correction=0.25 * memory.correction + 0.75 * residual + mean,
    residuals=residuals,
    num_rewirings=num_rewirings,
  )


def _decayed(
  decay: float,
  term: Callable[[jax.Array], jax.Array],
  old: jax.Array,
  g: jax.Array,
) -> jax.Array:
  """decay · old + term(g), where that is finite; else without g."""
  rest = decay * old
  new = rest + term(g.astype(jnp.float32))
  return jnp.where(jnp.isfinite(new), new, rest)


def _steadiness(memory: SparseMomentum, is_adaptive: bool) -> Tree:
  """|m|, or |m|/(√v + ε): how steadily a connection is pulled one way."""
  if not is_adaptive:
    return scores.magnitude(memory.momentum)
  return jax.tree.map(
    lambda m, v: jnp.abs(m) / (jnp.sqrt(v) + _EPSILON),
    memory.momentum,
    memory.square,
  )


def _importances(
  steadiness: Tree, masks: Masks, names: tuple[str, ...]
) -> jax.Array:
  """Mean over the connections of each layer, float32[L], summing to 1."""
  values, active = trees.by_path(steadiness), trees.by_path(masks)
  means = jnp.stack([_mean(values[name], active[name]) for name in names])
  total = jnp.sum(means)
  is_usable = (total > 0) & jnp.isfinite(total)
  alike = jnp.full_like(means, 1 / len(names))
  return jnp.where(is_usable, means / jnp.where(is_usable, total, 1), alike)


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  count = jnp.maximum(counts.num_active(mask), 1)
  return jnp.sum(values, where=mask) / count.astype(jnp.float32)
