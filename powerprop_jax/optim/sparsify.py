"""Runs an optimiser on the connections that a topology allows.

    ∂L/∂(θ⊙M) ─▶ observe ─▶ [rewire where `when` says so] ─▶ ⊙B ─▶ inner ─▶ ⊙B

Rewiring comes first and looks at the weights as the network saw them. It is a
loop of at most one turn, not a condition: a loop keeps its buffers in place
where a condition copies them, and under vmap it runs only if some network needs
it, where a batched condition would run at every step.
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Params, Static, Tree, Updates
from powerprop_jax.optim import inner as inner_lib
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim import regrow as regrow_lib
from powerprop_jax.optim import topology as topology_lib
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topology import (
  Regrow,
  Rewiring,
  SparseState,
  Topology,
)

# The kind of PRNG key that states hold, whatever JAX's default is: its data
# alone must tell what comes of it.
_KEY_KIND = 'threefry2x32'
# Whether a rewiring is to come, masks, memory of the topology.
_Wiring: TypeAlias = tuple[jax.Array, Masks, Tree]


def sparsify(
  inner: optax.GradientTransformation,
  topology: Topology,
  *,
  regrow: Regrow | None = None,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """Trains only the connections of a topology, and lets it rewire them.

  `update(grads, state, params)` takes grads = ∂L/∂(θ⊙M), dense, as
  `jax.grad` gives it at `effective_params(phi, state)`, and params = φ. inner
  sees gradients and parameters that are zero where nothing is trained; what it
  proposes there is ignored. Slots (momenta and the like) of weights that are
  dropped or reborn become what inner's init makes them.

  Everything else goes inside. What comes after it in a chain, such as
  optax.scale_by_learning_rate, would scale or clip the very assignments by
  which weights are dropped and start anew, and is refused by pp.init and
  effective_params. What comes before it, such as clipping, sees the gradients
  of connections that do not exist. Around it may be optax.MultiSteps,
  apply_if_finite, inject_hyperparams and conditionally_mask.

  A layer that inner leaves alone (optax.set_to_zero in a multi_transform) still
  loses weights and is rewired, as the topology does not know of it: leave it
  out of the topology's select. `init` warns where it sees that.

  Args:
    inner: any Optax optimiser, with powerprop around it or not; but none in
      optax.flatten if the topology rewires.
    topology: which connections exist; see optim.topologies.
    regrow: see the glossary; an α that is an array counts as α > 1. A weight
      that would start at φ = 0 under α > 1 all the same, because it never had
      another value or α was raised, starts as with 'smallest'; one without
      gradient becomes positive.

  Raises:
    ValueError: if the topology prescribes another regrow; from `init`, if
      regrow is 'zero' under powerprop with α > 1, or the topology refuses the
      parameters.

  Note:
    If a rewiring meets a weight that is not finite, or a gradient if the
    topology looks at them, the masks stay as they are, and the next rewiring is
    the next chance. Connections that a rewiring both drops and grows keep their
    values and slots.
    Where a rewiring replaces the step, all of inner stands still, its count of
    steps included. Gradients may be accumulated by an optax.MultiSteps inside
    or outside; outside, Optax computes a rewiring at every mini-step before the
    one that counts, and a NaN in the sum stays there.

  Example:
    >>> from powerprop_jax.optim.topologies import fixed
    >>> phi = {'linear': {'w': jnp.array([[2.0, -0.5]])}}
    >>> masks = {'linear': {'w': jnp.array([[True, False]])}}
    >>> tx = sparsify(optax.sgd(0.1), fixed.given(masks))
    >>> grads = {'linear': {'w': jnp.array([[1.0, 1.0]])}}
    >>> updates, state = tx.update(grads, tx.init(phi), phi)
    >>> optax.apply_updates(phi, updates)['linear']['w']
    Array([[1.9, 0. ]], dtype=float32)
  """
  if regrow is not None:
    names.check_choice('regrow', regrow, get_args(Regrow))
  if topology.regrow is not None and regrow not in (None, topology.regrow):
    raise ValueError(
      f'this topology prescribes regrow={topology.regrow!r}, got {regrow!r}. '
      'Leave regrow out.'
    )
  inner = optax.with_extra_args_support(inner)
  return Parts(inner, topology, regrow, key).transformation()


def parts(tx: optax.GradientTransformation) -> 'Parts | None':
  """What a transformation was made of, if it is one that sparsify returned.

  None for anything around it: a wrapper may leave no trace in the state, and
  yet change what sparsify assigns.
  """
  made = getattr(tx.update, '__self__', None)
  return made if isinstance(made, Parts) else None


class Network(NamedTuple):
  """What is trained in a step, as a rewiring leaves it.

  Attributes:
    masks: the connections that exist.
    memory: what the topology remembers.
    inner_state: the state of the optimiser inside.
    phi: latent parameters, with new connections at their first values.
    least: by leaf, the size at which weights start that would be dead at zero;
      0 where there was no rewiring.
  """

  masks: Masks
  memory: Tree
  inner_state: OptState
  phi: Params
  least: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """What sparsify is made of: its arguments, and what it does with them."""

  inner: optax.GradientTransformationExtraArgs
  topology: Topology
  regrow: Regrow | None
  key: int | jax.Array

  def transformation(self) -> optax.GradientTransformationExtraArgs:
    """What sparsify returns."""
    return optax.GradientTransformationExtraArgs(self.init, self.update)

  def init(self, params: Params) -> SparseState:
    """The state at the start."""
    inner, topology, phi = self.inner, self.topology, params
    inner_state = inner.init(phi)
    if topology_lib.find_sparse_state(inner_state) is not None:
      raise ValueError(
        'the optimiser inside sparsify holds a topology already. Use one for '
        'all leaves, and choose leaves with its select.'
      )
    topology_lib.refuse_drop_in(inner_state, 'sparsify')
    if topology.rewire is not None:
      inner_lib.check_known(inner, inner_state)
    power = powerprop_lib.find_power_state(inner_state)
    theta = powerprop_lib.to_theta(phi, power)
    mode = regrow_lib.resolve(self.regrow, topology, power)
    masks, memory = topology.init(_to_key(_key_data(self.key)), theta)
    # Optimisers may copy the parameters or their norms, so inner is shown those
    # that are trained. A leaf without connections is shown as it is: powerprop
    # refuses zeros.
    trained = jax.tree.map(
      lambda m: m | ~jnp.any(m), topology.trainable(masks, memory)
    )
    state = SparseState(
      step=jnp.zeros([], jnp.int32),
      key=_key_data(self.key),
      masks=masks,
      memory=memory,
      initial_scale=regrow_lib.scales(theta) if mode == 'redraw' else (),
      inner_state=inner.init(masks_lib.apply_masks(phi, trained)),
      regrow=Static(mode),
    )
    inner_lib.warn_of_frozen(inner, topology, state, phi)
    return state

  def update(
    self,
    updates: Updates,
    state: SparseState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, SparseState]:
    """The step on φ, and the state after it."""
    trees.require_params(params, 'sparsify', latent=True)
    topology, grads, phi = self.topology, updates, params
    power = powerprop_lib.find_power_state(state.inner_state)
    if self.regrow is not None:  # α may have been raised since
      regrow_lib.resolve(self.regrow, topology, power)
    memory = topology.observe(state.memory, grads)
    net = Network(state.masks, memory, state.inner_state, phi, {})
    due = jnp.asarray(False)
    if topology.rewire is not None and jax.tree.leaves(phi):
      due = topology.when(state.step)
      net = self._rewire_if(due, net, state, power, grads)
    trained = topology.trainable(net.masks, net.memory)
    delta, inner_state = self.propose(grads, net, trained, power, **extra_args)
    if topology.replaces_step:
      delta, inner_state = jax.tree.map(
        lambda old, new: jnp.where(due, old, new),
        (jax.tree.map(jnp.zeros_like, delta), net.inner_state),
        (delta, inner_state),
      )
    if net.least:
      delta = regrow_lib.revived(delta, phi, grads, net.least)

    def confined(
      d: jax.Array, m: jax.Array, p: jax.Array, start: jax.Array
    ) -> jax.Array:
      """The step on φ: assignments, and nothing where nothing is trained."""
      # Half-precision gradients give half-precision steps, too coarse for -φ,
      # which takes latent weights to zero exactly.
      d = d if d.dtype.itemsize > p.dtype.itemsize else d.astype(p.dtype)
      outside = (-p).astype(d.dtype) if state.pins else jnp.zeros_like(d)
      inside = d if start is p else (start - p).astype(d.dtype) + d
      return jnp.where(m, inside, outside)

    delta = jax.tree.map(confined, delta, trained, phi, net.phi)
    return delta, state._replace(
      step=optax.safe_increment(state.step),
      masks=net.masks,
      memory=net.memory,
      inner_state=inner_state,
    )

  def propose(
    self,
    grads: Updates,
    net: Network,
    trained: Masks,
    power: PowerState | None,
    **extra_args: Any,
  ) -> tuple[Updates, OptState]:
    """What inner says, shown what is trained: its step and its new state."""
    if self.topology.penalise is not None:
      theta = powerprop_lib.to_theta(net.phi, power)
      grads = self.topology.penalise(grads, theta, net.masks, net.memory)
    grads = masks_lib.apply_masks(grads, trained)
    if (powered := powerprop_lib.parts(self.inner)) is not None:
      # A masked φ with two uses, for θ and for ψ′, would be written to memory.
      return powered.update_masked(
        grads, net.inner_state, net.phi, trained, **extra_args
      )
    return self.inner.update(
      grads,
      net.inner_state,
      masks_lib.apply_masks(net.phi, trained),
      **extra_args,
    )

  def _rewire_if(
    self,
    due: jax.Array,
    net: Network,
    state: SparseState,
    power: PowerState | None,
    grads: Updates,
  ) -> Network:
    """The network after a rewiring, or as it is."""
    topology, mode, phi = self.topology, state.regrow.value, net.phi
    # φ travels along only where new connections are given a value.
    assigns = mode in ('redraw', 'smallest')
    powers = {}
    if not assigns and topology.regrow != 'zero':
      powers = regrow_lib.powers_above_one(phi, power)
    outer = (phi, grads, state.key, state.step, state.initial_scale)

    def body(carry: tuple[jax.Array, Network]) -> tuple[jax.Array, Network]:
      # XLA moves what a loop computes from its surroundings out of the loop,
      # even out of one that takes no turn: random numbers at every step.
      carry, (phi, grads, key, step, scale) = jax.lax.optimization_barrier(
        (carry, outer)
      )
      due, old = carry
      theta = powerprop_lib.to_theta(phi, power)
      keys = jax.random.split(jax.random.fold_in(_to_key(key), step))
      before = topology.trainable(old.masks, old.memory)
      masks, memory = _rewire(
        topology, Rewiring(keys[0], step, old.masks, old.memory, theta, grads)
      )
      after = topology.trainable(masks, memory)
      changed = jax.tree.map(jnp.not_equal, before, after)
      survivors = jax.tree.map(jnp.logical_and, before, after)
      new_phi = phi
      if assigns:
        values = (
          regrow_lib.redrawn(keys[1], theta, scale)
          if mode == 'redraw'
          else regrow_lib.smallest(theta, grads, survivors)
        )
        new_phi = jax.tree.map(
          jnp.where,
          masks_lib.difference(after, before),
          powerprop_lib.to_phi(values, power),
          old.phi,
        )
      fresh = self.inner.init(masks_lib.apply_masks(new_phi, after))
      return jnp.zeros_like(due), Network(
        masks,
        memory,
        inner_lib.renewed(self.inner, old.inner_state, fresh, changed),
        new_phi if assigns else (),
        regrow_lib.least_above_zero(phi, survivors, powers),
      )

    carried = net._replace(
      phi=phi if assigns else (),
      least={path: jnp.zeros([], jnp.float32) for path in powers},
    )
    _, new = jax.lax.while_loop(lambda carry: carry[0], body, (due, carried))
    return new if assigns else new._replace(phi=phi)


def _rewire(topology: Topology, rewiring: Rewiring) -> tuple[Masks, Tree]:
  """New masks and memory; the old ones if what they rest on is not finite."""
  rewire = topology.rewire
  assert rewire is not None
  theta, grads = rewiring.theta, rewiring.grads
  seen = jax.tree.leaves((theta, grads) if topology.needs_grads else theta)
  # Of each leaf the largest, which a NaN is too: to ask every number of it, XLA
  # makes three loops and an array of the answers.
  largest = [jnp.max(jnp.abs(x)) for x in seen if x.size]
  sound = trees.all_finite(jnp.array(largest, jnp.float32))

  def body(state: _Wiring) -> _Wiring:
    _, masks, memory = state
    now = rewiring._replace(masks=masks, memory=memory)
    return jnp.zeros_like(sound), *rewire(now)

  # A loop here too: to select every leaf by one scalar, XLA computes it again
  # in each of them, from those of all leaves, and takes long to compile that.
  state = (sound, rewiring.masks, rewiring.memory)
  _, masks, memory = jax.lax.while_loop(lambda state: state[0], body, state)
  return masks, memory


def _key_data(key: int | jax.Array) -> jax.Array:
  """The key of a state, as uint32[2] of its own: the state may be donated."""
  dtype = getattr(key, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    if jax.random.key_impl(key) != _KEY_KIND:
      return jax.random.bits(key, (2,), jnp.uint32)
    return jnp.array(jax.random.key_data(key), copy=True)
  if jnp.ndim(key) == 1:  # raw, as from jax.random.PRNGKey
    return _key_data(jax.random.wrap_key_data(jnp.asarray(key)))
  return jax.random.key_data(jax.random.key(key, impl=_KEY_KIND))


def _to_key(data: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(data, impl=_KEY_KIND)
