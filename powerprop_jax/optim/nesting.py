"""Which transformation may stand around which, read from an optimiser state.

    adaptive_alpha(sparsify(chain(powerprop(inner, α), decay_phi), topology))

sparsify assigns: to weights that it drops, and to those that start anew. An
assignment travels as an update, which is exact only if nothing changes it on
its way to φ. Most of what is wrong about an order would train all the same.
"""

import jax
import optax

from powerprop_jax.core import trees
from powerprop_jax.core.trees import OptState
from powerprop_jax.optim import inner, topology
from powerprop_jax.optim.alphas.adaptive import AdaptiveAlphaState
from powerprop_jax.optim.decay import DecayPhiState
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topology import SparseState

# Wrappers that hand on what is inside them or nothing at all. adaptive_alpha
# moves φ, but leaves zeros where they are.
_EXACT = (
  optax.MultiStepsState,
  optax.ApplyIfFiniteState,
  optax.schedules.InjectHyperparamsState,
  optax.schedules.InjectStatefulHyperparamsState,
  optax.transforms.ConditionallyMaskState,
  AdaptiveAlphaState,
)


def find_sparse_state(opt_state: OptState) -> SparseState | None:
  """The state of sparsify within an optimiser state, if there is one.

  Refuses several, and one whose masks or assignments would not reach the
  weights as they are.
  """
  partial = trees.find_states(opt_state, *inner.PARTIAL)
  if any(trees.find_states(state, SparseState) for state in partial):
    raise ValueError(
      'sparsify must not be inside optax.masked or optax.partition: its masks '
      'would not cover the network. Write sparsify(optax.masked(...), ...), '
      'and choose leaves with the select of its topology.'
    )
  found = topology.find_sparse_state(opt_state)
  if found is not None:
    _check_around_sparsify(opt_state)
  return found


def find_power_state(opt_state: OptState) -> PowerState | None:
  """The state of powerprop within an optimiser state, if there is one.

  Refuses several, and one that would see only some of the leaves.
  """
  found = trees.find_states(opt_state, PowerState)
  partial = trees.find_states(opt_state, *inner.PARTIAL)
  inside = [state.inner_state for state in found]
  if (
    len(found) > 1
    or trees.find_states(inside, PowerState)
    or any(trees.find_states(state, PowerState) for state in partial)
  ):
    raise ValueError(
      'powerprop must be outermost: found it inside optax.masked or '
      'optax.partition, or more than once. Write powerprop(optax.masked(...), '
      'alpha, select) and choose leaves with select.'
    )
  _check_around_adaptive_alpha(opt_state)
  return found[0] if found else None


def is_exact(opt_state: OptState) -> bool:
  """Whether all that is around sparsify is known to hand on what it assigns.

  Not for states of optax.named_chain, which forget their order.
  """
  return all(
    isinstance(node, _EXACT)
    or (_is_chain(node) and not _after_sparsify(node))
    or (isinstance(node, dict) and len(node) == 1)
    for node in _around_sparsify(opt_state)
  )


def _is_chain(node: OptState) -> bool:
  """Whether it can be of optax.chain: with an array in it, it is not."""
  return type(node) is tuple and all(isinstance(link, tuple) for link in node)


def check_chains(opt_state: OptState) -> None:
  """Refuses what follows sparsify in an optax.named_chain.

  Of a state as tx.init returns it, with the order of the chain: JAX sorts the
  names whenever it takes a tree apart.
  """
  for node in _around_sparsify(opt_state):
    if isinstance(node, dict):
      _check_last(tuple(node.values()), opt_state)


def _around_sparsify(node: OptState) -> list[OptState]:
  """The states around that of sparsify, from the outermost inwards."""
  if isinstance(node, SparseState) or not trees.find_states(node, SparseState):
    return []
  for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node):
    if isinstance(child, SparseState):
      return [node]
    if inside := _around_sparsify(child):
      return [node, *inside]
  return []


def _check_around_sparsify(opt_state: OptState) -> None:
  for node in _around_sparsify(opt_state):
    if type(node) is tuple:  # optax.chain
      _check_last(node, opt_state)
    elif type(node).__module__.startswith('optax') and not isinstance(
      node, _EXACT
    ):
      raise ValueError(
        f'{type(node).__name__}: this wrapper of Optax must not be around '
        'sparsify, as what that assigns to weights that it drops or starts '
        'anew would not reach them as it is. '
        + _inside(opt_state, 'wrapper(inner)')
      )


def _after_sparsify(links: tuple[OptState, ...]) -> tuple[OptState, ...]:
  is_sparse = [bool(trees.find_states(link, SparseState)) for link in links]
  return links[is_sparse.index(True) + 1 :]


def _check_last(links: tuple[OptState, ...], opt_state: OptState) -> None:
  """Refuses a chain in which something follows sparsify."""
  # An array is no state of a link, but part of that of something else.
  after = [link for link in _after_sparsify(links) if isinstance(link, tuple)]
  if not after:
    return
  if any(isinstance(link, DecayPhiState) for link in after):
    raise ValueError(
      'decay_phi goes inside sparsify, not behind it: there it would shrink '
      'latent weights that have no connection. Write sparsify(optax.chain('
      'powerprop(inner, alpha), decay_phi(...)), topology), or '
      'rigl(optax.chain(...), ...).'
    )
  names = ', '.join(type(link).__name__ for link in after)
  raise ValueError(
    'sparsify must come last in a chain: what follows it, here a '
    f'transformation with the state {names}, would also change what it assigns '
    'to weights that it drops or starts anew. '
    + _inside(
      opt_state, 'optax.chain(inner, optax.scale_by_learning_rate(...))'
    )
  )


def _inside(opt_state: OptState, inner: str) -> str:
  """The line to write instead."""
  if trees.find_states(opt_state, PowerState):
    inner = f'powerprop({inner}, alpha)'
  return f'Write sparsify({inner}, topology), or rigl({inner}, ...).'


def _check_around_adaptive_alpha(opt_state: OptState) -> None:
  """Refuses around adaptive_alpha what works on φ and would miss its moves."""
  adaptive = trees.find_states(opt_state, AdaptiveAlphaState)
  inside = [state.inner_state for state in adaptive]
  is_outside = lambda *kinds: (
    adaptive
    and len(trees.find_states(opt_state, *kinds))
    > len(trees.find_states(inside, *kinds))
  )
  if is_outside(SparseState):
    raise ValueError(
      'sparsify goes inside adaptive_alpha, not around it: it decides what '
      'happens to latent weights without a connection, and these must move '
      'with α as well. Write adaptive_alpha(rigl(powerprop(inner, alpha), '
      '...), controller, period=...).'
    )
  if is_outside(DecayPhiState):
    raise ValueError(
      'decay_phi goes inside adaptive_alpha, not behind it: when α changes it '
      'would shrink the new φ by a share of the old one. Write adaptive_alpha('
      'optax.chain(powerprop(inner, alpha), decay_phi(...)), controller, '
      'period=...).'
    )
