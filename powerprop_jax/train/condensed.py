"""Training that holds and multiplies only the connections that exist.

A masked network trains a dense φ of which masks let a few entries count. Here
each masked leaf of the state is replaced by its connections: φ, gradients and
the slots of the optimiser have as many entries as there are connections, and
products skip the zeros (sparse/network.py). The numbers are those of masked
training but for rounding. The network is any pair of functions.

    masked state ── condense ─▶ step, step, …, step ── expand ─▶ masked state
                                      │       ▲
                                      └rewire─┘  where the topology says so

Only a rewiring needs what does not exist: its step is the masked one, with
dense weights and a dense gradient for the while, after which the index of the
connections is built anew, in the same compiled program.

In a condensed state a leaf keeps its name and is [1, room], or [*repeats, room]
of a stack of layers: for everything that chooses leaves by name and rank it is
still a weight.
"""

from collections.abc import Callable, Collection
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import schedules, trees
from powerprop_jax.core.layouts import Axes
from powerprop_jax.core.trees import Tree
from powerprop_jax.jaxprs import moves
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.topology import SparseState, Topology
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import linear, network
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.network import Connections
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Prepare
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import TrainState

# How training computes with weights that masks remove.
Execution = Literal['masked', 'condensed', 'auto']


class Room(NamedTuple):
  """Of a leaf that is condensed.

  Attributes:
    shape: of the dense leaf.
    axes: as its products have them.
    size: room for connections in each of its layers.
  """

  shape: tuple[int, ...]
  axes: Axes
  size: int


# The leaves that are condensed, by 'module/name'.
Layout = dict[str, Room]


class NetState(NamedTuple):
  """The network's own state, in a condensed state.

  Attributes:
    net_state: as the network has it.
    where: the connections of each leaf.
  """

  net_state: hk.State
  where: dict[str, Index]


def check_execution(execution: str) -> None:
  """Refuses an unknown execution."""
  if execution not in get_args(Execution):
    raise UserError(
      f'execution must be one of {", ".join(get_args(Execution))}, got '
      f'{execution!r}.'
    )


def why_not(tx: optax.GradientTransformation, state: TrainState) -> str:
  """Why a training cannot be condensed; '' if it can."""
  sparse = state.opt_state
  parts = sparsify_lib.parts(tx)
  if parts is None or not isinstance(sparse, SparseState):
    return 'sparsify is not the outermost transformation, or there is none'
  if not sparse.pins:
    return (
      "its regrow is 'keep', which remembers weights that do not exist; use "
      "'redraw' or 'smallest'"
    )
  topology = parts.topology
  plain = Topology(topology.init)
  if (
    jax.tree.leaves(sparse.memory)
    or topology.trainable is not plain.trainable
    or topology.observe is not plain.observe
    or topology.penalise is not None
  ):
    return 'its topology needs dense gradients or weights at every step'
  return ''


def layout(
  state: TrainState,
  *,
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  images: Any,
  execution: Execution | Collection[str] = 'condensed',
) -> Layout:
  """Which leaves are held without their zeros.

  Args:
    state: a masked state, concrete: the numbers of its connections are part of
      the program. With a leading axis of lanes, room is made for the lane that
      has most.
    images: a batch as the network sees it, or its shape: what pays depends on
      its size.
    execution: 'condensed' takes every masked leaf that is multiplied by, 'auto'
      those with so few connections that it should be faster
      (kernel_choice.pays), 'masked' none; or the names of leaves, as
      sparse.tune gives them.

  Returns:
    The layout, without leaves if the training cannot be condensed and need not
    be; if execution is 'condensed' that is a UserError, which says why.
  """
  if isinstance(execution, str):
    check_execution(execution)
  reason = why_not(tx, state)
  if execution == 'condensed' and reason:
    raise UserError(f'training cannot be condensed: {reason}.')
  if execution == 'masked' or reason:
    return {}
  num_lanes = state.opt_state.step.ndim
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[num_lanes:], leaf.dtype),
    (state.phi, state.net_state, state.key),
  )
  shapes, rooms = {}, {}
  for leaf in trees.named_leaves(state.opt_state.masks):
    shape = leaf.value.shape[num_lanes:]
    lanes = np.asarray(leaf.value).reshape(-1, *shape)
    fullest = lanes.sum(axis=tuple(range(1, lanes.ndim))).max()
    if 0 < fullest < math.prod(shape):
      shapes[leaf.path] = shape
      rooms[leaf.path] = functools.partial(_room, lanes)
  images = jax.ShapeDtypeStruct(images.shape, images.dtype)
  phi, *others = one
  fn = lambda theta, *args: net.apply(theta, *args, is_training=True)
  taken: Any = execution
  plan = network.plan(fn, rooms, phi, *others, images, execution=taken)
  parts = sparsify_lib.parts(tx)
  moves_connections = parts is not None and parts.topology.rewire is not None
  found = {
    path: Room(shapes[path], axes, rooms[path](axes))
    for path, axes in plan.axes.items()
    # From one layer of a stack to another, so that there may be no room.
    if not (moves_connections and axes.repeats)
  }
  if execution == 'condensed' and not found:
    raise UserError(
      'training cannot be condensed: no weight that is multiplied by lacks '
      'connections at its first step. Gradual pruning begins with all of them: '
      "use execution='masked'."
    )
  return found


def _room(lanes: np.ndarray[Any, Any], axes: Axes) -> int:
  """Connections of the fullest layer in any of the masks."""
  layers = [moves.matrix(mask, axes).sum(axis=(-2, -1)) for mask in lanes]
  return int(np.max(layers))


def _by_layer(fn: Callable[..., Any], room: Room) -> Callable[..., Any]:
  """A function of a matrix and the like, on all layers of a leaf."""
  for _ in room.axes.repeats:
    fn = jax.vmap(fn)
  return fn


def condense(state: TrainState, layout: Layout) -> TrainState:
  """A masked state without what its masks remove.

  The net_state of the result is a NetState. An optimiser that keeps something
  else than a number for each weight is refused.
  """
  sparse: SparseState = state.opt_state
  by_path = trees.by_path(sparse.masks)

  def index(path: str, room: Room) -> Index:
    build = functools.partial(sparse_index.from_mask, size=room.size)
    found: Index = _by_layer(build, room)(
      moves.matrix(by_path[path], room.axes)
    )
    return found

  where = {path: index(path, room) for path, room in layout.items()}

  def gather(path: str, leaf: jax.Array) -> jax.Array:
    room = layout[path]
    layers = moves.matrix(leaf, room.axes)
    found: jax.Array = _by_layer(linear.gather, room)(layers, where[path])
    return found if room.axes.repeats else found[jnp.newaxis]

  return _converted(state, layout, gather, NetState(state.net_state, where))


def expand(state: TrainState, layout: Layout) -> TrainState:
  """Undoes condense: zeros where there is no connection."""
  thin: Any = state.net_state
  net_state, where = thin

  def scatter(path: str, leaf: jax.Array) -> jax.Array:
    room, index = layout[path], where[path]
    values = leaf.reshape(index.positions.shape)
    if leaf.dtype == bool:
      values = values.astype(jnp.int8)
    layers = _by_layer(linear.scatter, room)(values, index)
    dense = moves.from_matrix(layers, room.axes, room.shape)
    return dense.astype(leaf.dtype)

  return _converted(state, layout, scatter, net_state)


def _converted(
  state: TrainState,
  layout: Layout,
  convert: Callable[[str, jax.Array], jax.Array],
  net_state: Tree,
) -> TrainState:
  """convert(path, leaf) on φ, masks and slots of the leaves of the layout."""
  shapes = {
    leaf.path: jnp.shape(leaf.value) for leaf in trees.named_leaves(state.phi)
  }

  def visit(leaf: trees.NamedLeaf) -> Tree:
    path = leaf.path
    return convert(path, leaf.value) if path in layout else leaf.value

  def slots(part: Tree) -> Tree:
    """The same on what the optimiser holds for the parameters."""
    kind: Any = jax.tree.structure(state.phi)

    def is_like_phi(node: Tree) -> bool:
      return bool(jax.tree.structure(node) == kind)

    def visit_slot(leaf: trees.NamedLeaf) -> Tree:
      path, shape = leaf.path, jnp.shape(leaf.value)
      if path in layout and shape != shapes[path]:
        raise ValueError(
          f'for {path}, of shape {shapes[path]}, the optimiser keeps an array '
          f'of shape {shape}, which cannot be condensed: factored moments need '
          "the dense weight. Use execution='masked'."
        )
      return visit(leaf)

    return jax.tree.map(
      lambda node: (
        trees.map_leaves(visit_slot, node) if is_like_phi(node) else node
      ),
      part,
      is_leaf=is_like_phi,
    )

  sparse: SparseState = state.opt_state
  opt_state = sparse._replace(
    masks=trees.map_leaves(visit, sparse.masks),
    inner_state=slots(sparse.inner_state),
  )
  return state._replace(
    phi=trees.map_leaves(visit, state.phi),
    net_state=net_state,
    opt_state=opt_state,
  )


def make_step(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  layout: Layout,
  **options: Any,
) -> step_lib.Step:
  """The step of step.make_step, and with its options, over a condensed state.

  Where topologies let the number of connections of a leaf grow, its layout has
  no room for them: none of ours that can be condensed does.
  """
  parts = sparsify_lib.parts(tx)
  assert parts is not None  # why_not says so
  topology = parts.topology
  still = topology._replace(rewire=None, when=schedules.never)
  thin_tx = sparsify_lib.sparsify(parts.inner, still, regrow=parts.regrow)
  thin_step = step_lib.make_step(_thin(net, layout), thin_tx, **options)
  if topology.rewire is None:
    return thin_step
  dense_step = step_lib.make_step(net, tx, **options)

  def rewire(
    state: TrainState, images: jax.Array, labels: jax.Array
  ) -> tuple[TrainState, step_lib.Metrics]:
    after, metrics = dense_step(expand(state, layout), images, labels)
    return condense(after, layout), metrics

  return lambda state, images, labels: jax.lax.cond(
    jnp.asarray(topology.when(state.opt_state.step)),
    rewire,
    thin_step,
    *(state, images, labels),
  )


def _thin(
  net: hk.TransformedWithState, layout: Layout
) -> hk.TransformedWithState:
  """The network, with parameters and state as a condensed state has them."""
  axes = {path: room.axes for path, room in layout.items()}

  def apply(
    theta: hk.Params, state: NetState, *args: Any, **options: Any
  ) -> tuple[jax.Array, NetState]:
    held, shown = {}, {}
    for leaf in trees.named_leaves(theta):
      if leaf.path in layout:
        where = state.where[leaf.path]
        values = leaf.value.reshape(where.positions.shape)
        held[leaf.path] = Connections(values, where)
        shape = layout[leaf.path].shape
        shown[leaf.path] = jax.ShapeDtypeStruct(shape, values.dtype)
    logits, net_state = network.apply(
      functools.partial(net.apply, **options),
      held,
      axes,
      trees.map_leaves(lambda leaf: shown.get(leaf.path, leaf.value), theta),
      state.net_state,
      *args,
    )
    return logits, state._replace(net_state=net_state)

  return hk.TransformedWithState(net.init, apply)


def make_advance(step: step_lib.Step, layout: Layout) -> step_lib.Advance:
  """Many steps in one dispatch, from a masked state to a masked state.

  Between them the state is condensed, and the step is from make_step.
  Checkpoints, scores and everything else see what they see of masked training,
  so a run may be resumed with another execution.
  """

  def advance(
    state: TrainState, arrays: Arrays, indices: jax.Array
  ) -> tuple[TrainState, step_lib.Metrics]:
    thin = condense(state, layout)
    thin, metrics = step_lib.repeated(step)(thin, arrays, indices)
    return expand(thin, layout), metrics

  return advance


def advance_of(
  state: TrainState,
  *,
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  images: Any,
  execution: Execution,
  prepare: Prepare,
  **options: Any,
) -> step_lib.Advance | None:
  """make_advance for a state; None where its layout has no leaf.

  Images are a batch as it is stored; the other arguments are those of layout,
  prepare and the options those of step.make_step.
  """
  if execution == 'masked':
    return None
  seen = jax.eval_shape(prepare, images)
  found = layout(state, net=net, tx=tx, images=seen, execution=execution)
  if not found:
    return None
  step = make_step(net, tx, found, prepare=prepare, **options)
  return make_advance(step, found)
