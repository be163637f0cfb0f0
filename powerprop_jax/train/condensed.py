"""Training that holds and multiplies only the connections that exist.

A masked network trains a dense φ of which masks let a few entries count. Here
each masked leaf of the state is replaced by its connections: φ, gradients and
the slots of the optimiser have as many entries as there are connections, and
layers skip the zeros (sparse/weight.py). The numbers are those of masked
training but for rounding.

    masked state ── condense ─▶ step, step, …, step ── expand ─▶ masked state
                                      │       ▲
                                      └rewire─┘  where the topology says so

Only a rewiring needs what does not exist: its step is the masked one, with
dense weights and a dense gradient for the while, after which the index of the
connections is built anew, in the same compiled program.

In a condensed state a leaf keeps its name and is [1, room]: for everything that
chooses leaves by name and rank it is still a weight.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import schedules, trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import sparsify as sparsify_lib
from powerprop_jax.optim.topology import SparseState, Topology
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import linear
from powerprop_jax.sparse import weight as sparse_weight
from powerprop_jax.sparse.index import Index
from powerprop_jax.sparse.weight import MakeNet, Support
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import TrainState

# How training computes with weights that masks remove.
Execution = Literal['masked', 'condensed', 'auto']


class Layout(NamedTuple):
  """Which leaves are condensed.

  Attributes:
    shapes: {'module/name': shape} of the dense leaves.
    sizes: room for connections of each.
  """

  shapes: dict[str, tuple[int, ...]]
  sizes: dict[str, int]

  def supports(self) -> dict[str, Support]:
    """Stand-ins for the supports, for the shapes; positions are state."""
    return {
      path: Support(np.arange(self.sizes[path], dtype=np.int32), shape)
      for path, shape in self.shapes.items()
    }


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
  tx: optax.GradientTransformation,
  make_net: MakeNet,
  images: Any,
  execution: Execution = 'condensed',
) -> Layout:
  """Which leaves are held without their zeros.

  Args:
    state: a masked state, concrete: the numbers of its connections are part of
      the program. With a leading axis of lanes, room is made for the lane that
      has most.
    images: a batch as the network sees it, or its shape: what pays depends on
      its size.
    execution: 'condensed' takes every masked leaf of a linear layer or a
      convolution, 'auto' those whose layers were measured to be faster on this
      machine (kernel_choice.pays), 'masked' none.

  Returns:
    The layout, without leaves if the training cannot be condensed and need not
    be; if execution is 'condensed' that is a UserError, which says why.
  """
  check_execution(execution)
  reason = why_not(tx, state)
  if execution == 'condensed' and reason:
    raise UserError(f'training cannot be condensed: {reason}.')
  if execution == 'masked' or reason:
    return Layout({}, {})
  key = state.opt_state.step
  shapes, sizes = {}, {}
  for leaf in trees.named_leaves(state.opt_state.masks):
    shape = leaf.value.shape[key.ndim :]
    entries = np.asarray(leaf.value).reshape(-1, math.prod(shape))
    count = int(entries.sum(axis=1).max())
    if len(shape) in (2, 4) and 0 < count < math.prod(shape):
      shapes[leaf.path], sizes[leaf.path] = shape, count
  images = jax.ShapeDtypeStruct(images.shape, jnp.float32)
  choose: Callable[..., Mapping[str, Any]] = sparse_weight.products
  if execution == 'auto':
    choose = sparse_weight.faster_supports
  chosen = choose(
    Layout(shapes, sizes).supports(), make_net, images, is_training=True
  )
  # What no layer holds as its connections stays as it is.
  paths = [path for path in shapes if path in chosen]
  if execution == 'condensed' and not paths:
    raise UserError(
      'training cannot be condensed: no linear layer or convolution lacks '
      'connections at its first step. Gradual pruning begins with all of them: '
      "use execution='masked'."
    )
  return Layout(
    {path: shapes[path] for path in paths},
    {path: sizes[path] for path in paths},
  )


def condense(state: TrainState, layout: Layout) -> TrainState:
  """A masked state without what its masks remove.

  The net_state of the result holds the index of each leaf. An optimiser that
  keeps something else than a number for each weight is refused.
  """
  sparse: SparseState = state.opt_state
  by_path = trees.by_path(sparse.masks)
  indices = {
    path: sparse_index.from_mask(
      by_path[path].reshape(-1, shape[-1]), layout.sizes[path]
    )
    for path, shape in layout.shapes.items()
  }

  def gather(path: str, leaf: jax.Array) -> jax.Array:
    index = indices[path]
    weight = leaf.reshape(index.shape)
    return linear.gather(weight, index)[jnp.newaxis]

  net_state = {module: dict(part) for module, part in state.net_state.items()}
  for path, index in indices.items():
    module = path.rpartition('/')[0]
    net_state.setdefault(module, {}).update(index._asdict())
  return _converted(state, layout, gather, net_state)


def expand(state: TrainState, layout: Layout) -> TrainState:
  """Undoes condense: zeros where there is no connection."""
  net_state = {module: dict(part) for module, part in state.net_state.items()}
  indices = {}
  for path in layout.shapes:
    module = path.rpartition('/')[0]
    part = net_state[module]
    indices[path] = Index(*(part.pop(name) for name in Index._fields))
    if not part:
      del net_state[module]

  def scatter(path: str, leaf: jax.Array) -> jax.Array:
    is_mask = leaf.dtype == bool
    values = leaf[0].astype(jnp.int8) if is_mask else leaf[0]
    dense = linear.scatter(values, indices[path])
    return dense.reshape(layout.shapes[path]).astype(leaf.dtype)

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

  def visit(module: str, name: str, leaf: Tree) -> Tree:
    path = trees.join_name(module, name)
    return convert(path, leaf) if path in layout.shapes else leaf

  def slots(part: Tree) -> Tree:
    """The same on what the optimiser holds for the parameters."""
    kind: Any = jax.tree.structure(state.phi)

    def is_like_phi(node: Tree) -> bool:
      return bool(jax.tree.structure(node) == kind)

    def visit_slot(module: str, name: str, slot: Tree) -> Tree:
      path = trees.join_name(module, name)
      if path in layout.shapes and jnp.shape(slot) != shapes[path]:
        raise ValueError(
          f'for {path}, of shape {shapes[path]}, the optimiser keeps an array '
          f'of shape {jnp.shape(slot)}, which cannot be condensed: factored '
          "moments need the dense weight. Use execution='masked'."
        )
      return visit(module, name, slot)

    return jax.tree.map(
      lambda node: (
        trees.map_named(visit_slot, node) if is_like_phi(node) else node
      ),
      part,
      is_leaf=is_like_phi,
    )

  sparse: SparseState = state.opt_state
  opt_state = sparse._replace(
    masks=trees.map_named(visit, sparse.masks),
    inner_state=slots(sparse.inner_state),
  )
  return state._replace(
    phi=trees.map_named(visit, state.phi),
    net_state=net_state,
    opt_state=opt_state,
  )


def make_step(
  net: hk.TransformedWithState,
  make_net: MakeNet,
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
  thin_net = _renamed(make_net(layout.supports()), layout)
  thin_step = step_lib.make_step(thin_net, thin_tx, **options)
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


def _renamed(
  net: hk.TransformedWithState, layout: Layout
) -> hk.TransformedWithState:
  """The network, with parameters as a condensed state has them."""

  def apply(theta: hk.Params, *args: Any, **kwargs: Any) -> Tree:
    renamed: dict[str, Row] = {}
    for module, name, value in trees.named_leaves(theta):
      if trees.join_name(module, name) in layout.shapes:
        name, value = 'values', value[0]
      renamed.setdefault(module, {})[name] = value
    return net.apply(renamed, *args, **kwargs)

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
