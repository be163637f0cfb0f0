"""Training with a composition, looked at after every update."""

from collections.abc import Iterator
import dataclasses
from typing import Any

from composition_draws import BY_WEIGHT
from compositions import PATHS, Composition, as_leaves, as_tree
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.optim import topology

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Look:
  """Parameters and state between two updates, as NumPy arrays by leaf.

  Attributes:
    phi: latent parameters.
    seen: what the network sees.
    masks: the connections that exist.
    trained: the weights that are trained.
    step: what sparsify counts; None without.
    pins: whether weights that are not trained are zero.
    kinds: structure, shapes, dtypes and weak types of the state.
    has_nan: whether there is NaN in the state.
    faults: what is wrong already.
  """

  phi: Leaves
  seen: Leaves
  masks: Leaves
  trained: Leaves
  step: int | None
  pins: bool
  kinds: Any
  has_nan: bool
  faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Move:
  """An update: what it was given, and what came of it."""

  number: int
  grads: Leaves
  before: Look
  after: Look


def train(c: Composition) -> Iterator[Move]:
  """Yields the state after init, in a Move of number -1, and each update."""
  tx = optax.with_extra_args_support(c.build())
  phi, state = pp.init(tx, c.theta())
  num_traces = 0

  def step(grads: Any, phi: Any, state: Any, loss: Any) -> Any:
    nonlocal num_traces
    num_traces += 1
    extra_args = {'value': loss} if c.value else {}
    updates, state = tx.update(grads, state, phi, **extra_args)
    return optax.apply_updates(phi, updates), state

  if c.jit:
    step = jax.jit(step, donate_argnums=(1, 2))
  look = _look(c, phi, state)
  yield Move(-1, {}, look, look)
  for number in range(c.steps):
    grads = _gradient(c, number, look)
    loss = jnp.float32(1 / (1 + number))
    phi, state = step(as_tree(grads), phi, state, loss)
    new = _look(c, phi, state)
    if c.jit and num_traces > 1:
      new = dataclasses.replace(
        new, kinds=(new.kinds, f'traced {num_traces} times')
      )
    yield Move(
      number,
      {path: np.asarray(g, np.float64) for path, g in grads.items()},
      look,
      new,
    )
    look = new


def _gradient(c: Composition, number: int, look: Look) -> dict[str, jax.Array]:
  """∂/∂θ of ½ ‖θ - target‖², with what is to be wrong with it."""
  rng = np.random.default_rng(number + 1)
  grads = {
    path: look.seen[path] - rng.normal(size=look.seen[path].shape)
    for path in PATHS
  }
  if c.quiet and c.is_due(look.step):
    grads = {path: np.zeros_like(g) for path, g in grads.items()}
  if c.bad is not None and c.bad[0] == number:
    _, value, where = c.bad
    trained = look.trained['m/w']
    places = np.flatnonzero(trained if where == 'trained' else ~trained)
    if places.size:
      grads['m/w'].flat[places[0]] = float(value)
  dtypes = {
    path: jnp.float32 if c.wide else leaf.dtype
    for path, leaf in as_leaves(c.theta()).items()
  }
  return {path: jnp.asarray(g, dtypes[path]) for path, g in grads.items()}


def _look(c: Composition, phi: Any, state: Any) -> Look:
  numbers = lambda tree: {
    path: np.asarray(leaf, np.float64) for path, leaf in as_leaves(tree).items()
  }
  booleans = lambda tree: {
    path: np.array(leaf) for path, leaf in as_leaves(tree).items()
  }
  sparse = topology.find_sparse_state(state)
  seen = pp.effective_params(phi, state)
  masks = booleans(pp.current_masks(phi, state))
  trained = masks
  faults = []
  if c.name == 'top_kast' and sparse is not None:
    extra = booleans(sparse.memory)
    trained = {path: masks[path] | extra[path] for path in PATHS}
  pinned = pp.effective_params(phi, state, pinned=True)
  if not _same(numbers(seen), numbers(pinned)):
    faults.append('effective_params is another with pinned=True')
  if sparse is not None and is_by_weight(c):
    faults += _stale_slots(c, sparse, trained)
  kinds = jax.tree.map(
    lambda x: (x.shape, x.dtype, getattr(x, 'weak_type', False)), (phi, state)
  )
  return Look(
    phi=numbers(phi),
    seen=numbers(seen),
    masks=masks,
    trained=trained,
    step=None if sparse is None else int(sparse.step),
    pins=sparse is not None and bool(sparse.pins),
    kinds=(jax.tree.structure((phi, state)), kinds),
    has_nan=any(
      jnp.issubdtype(x.dtype, jnp.floating) and bool(jnp.isnan(x).any())
      for x in jax.tree.leaves(state)
    ),
    faults=tuple(faults),
  )


def is_by_weight(c: Composition) -> bool:
  """Whether a weight without gradients stays, and its slots at zero."""
  return c.inner in BY_WEIGHT and not c.inside and not c.between


def _same(tree: Leaves, other: Leaves) -> bool:
  return all(
    np.array_equal(tree[path], other[path], equal_nan=True) for path in PATHS
  )


def _stale_slots(c: Composition, sparse: Any, trained: Leaves) -> list[str]:
  """Slots of weights that are not trained and are not zero."""
  stale = []

  def visit(slot: Any, mask: Any) -> Any:
    if not isinstance(slot, optax.MaskedNode):
      slot = np.asarray(slot, np.float64)
      if np.any(slot[~mask] != 0):
        stale.append(f'slots of weights that are not trained: {slot[~mask]}')
    return slot

  optax.tree.map_params(
    c.build_inner(),
    visit,
    sparse.inner_state,
    as_tree(trained),
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )
  return stale
