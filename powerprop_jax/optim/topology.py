"""What a sparse-training method is: a Topology, and the state that runs it.

A topology says which connections exist and how they change, in pure functions
of the effective weights θ and their dense gradient. It knows nothing of
optimisers, of φ or of the training step; `sparsify` does.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from powerprop_jax.core import schedules, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.schedules import When
from powerprop_jax.core.trees import OptState, Params, Static, Tree, Updates
from powerprop_jax.optim import shown

# How a connection that did not exist gets its first value; see sparsify.
Regrow = Literal['zero', 'keep', 'redraw', 'smallest']


class Rewiring(NamedTuple):
  """What a topology sees when it changes the masks.

  Attributes:
    key: PRNG key of this rewiring; the same on every device.
    step: number of updates before this one, int32 scalar.
    masks: the connections as they are.
    memory: what the topology remembers.
    theta: effective parameters, dense: values behind a mask are included.
    grads: ∂L/∂(θ⊙M), dense: connections that do not exist have one too.
  """

  key: jax.Array
  step: jax.Array
  masks: Masks
  memory: Tree
  theta: Params
  grads: Updates


class Topology(NamedTuple):
  """Which connections exist, as pure functions of θ and its dense gradient.

  Masks are True on leaves that never change. All functions must accept a θ
  without leaves. Those who make topologies refuse arguments out of range with a
  ValueError, and their init leaves that would lose all their weights.

  Attributes:
    init: (key, theta) -> (masks, memory). memory is any tree of arrays whose
      structure, shapes and dtypes never change.
    rewire: Rewiring -> (masks, memory), called only where `when` says so; None
      if the masks never change.
    when: step -> whether to rewire at that update; step 0 is the first.
    observe: (memory, grads) -> memory, at every step, before rewiring.
    trainable: (masks, memory) -> which weights are trained. By default those of
      the masks; more where connections are explored behind them (Top-KAST),
      fewer where some are protected (continual learning).
    penalise: (grads, theta, masks, memory) -> grads, the gradient of a penalty
      added; None if there is none.
    replaces_step: whether a rewiring takes the place of the optimiser's step.
    needs_grads: whether rewire looks at grads, so that it must not happen where
      they are not finite.
    regrow: how new connections get their value, where the method prescribes it:
      'zero' if it never grows any, 'keep' if weights live on behind the mask.
      None leaves it to the user of sparsify.
  """

  init: Callable[[jax.Array, Params], tuple[Masks, Tree]]
  rewire: Callable[[Rewiring], tuple[Masks, Tree]] | None = None
  when: When = schedules.never
  observe: Callable[[Tree, Updates], Tree] = lambda memory, grads: memory
  trainable: Callable[[Masks, Tree], Masks] = lambda masks, memory: masks
  penalise: Callable[[Updates, Params, Masks, Tree], Updates] | None = None
  replaces_step: bool = False
  needs_grads: bool = True
  regrow: Regrow | None = None


class SparseState(NamedTuple):
  """State of sparsify.

  Attributes:
    step: number of updates seen, int32 scalar.
    key: data of the PRNG key from which that of each rewiring is derived,
      uint32[2]. A typed key is an array that few libraries can store.
    masks: the connections that exist, one byte a weight; True on leaves that
      are never masked.
    memory: what the topology remembers.
    initial_scale: with regrow='redraw', root mean square of each leaf of θ at
      the start, float32 scalars; otherwise an empty tuple.
    inner_state: state of the wrapped optimiser.
    regrow: the first value of a connection that did not exist before, Static.
  """

  step: jax.Array
  key: jax.Array
  masks: Masks
  memory: Tree
  initial_scale: Tree
  inner_state: OptState
  regrow: Static

  def __repr__(self) -> str:
    return shown.state(self)

  @property
  def pins(self) -> bool:
    """Whether latent weights without a connection are held at zero."""
    return bool(self.regrow.value != 'keep')


class DropInState(NamedTuple):
  """State of drop_in, which holds φ where the loop holds θ⊙M.

  Attributes:
    phi: latent parameters.
    started: whether there was an update, a boolean scalar.
    adopted: how many updates found other parameters than they had left, int32
      scalar.
    inner_state: state of what drop_in wraps.
  """

  phi: Params
  started: jax.Array
  adopted: jax.Array
  inner_state: OptState

  def __repr__(self) -> str:
    return shown.state(self)


def find_drop_in_state(opt_state: OptState) -> DropInState | None:
  """The state of drop_in within an optimiser state, if there is one."""
  return next(iter(trees.find_states(opt_state, DropInState)), None)


def refuse_drop_in(opt_state: OptState, name: str) -> None:
  """Refuses drop_in inside the transformation of this name."""
  if find_drop_in_state(opt_state) is not None:
    raise ValueError(
      f'drop_in goes around {name}, not inside it: its parameters are θ. Write '
      f'drop_in({name}(...)).'
    )


def find_sparse_state(opt_state: OptState) -> SparseState | None:
  """The state of sparsify in an optimiser state, or None; refuses several."""
  found = trees.find_states(opt_state, SparseState)
  if len(found) > 1 or any(
    trees.find_states(state.inner_state, SparseState) for state in found
  ):
    raise ValueError(
      'the optimiser state holds more than one sparsify. Use one topology for '
      'all leaves, and choose leaves with its select.'
    )
  return found[0] if found else None
