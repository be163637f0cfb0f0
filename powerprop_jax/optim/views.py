"""What a training step needs from an optimiser state: views of the weights.

The power α, the choice of leaves and the masks live in the optimiser state, so
these functions take (phi, opt_state) and nothing that could disagree with it.
They find that state inside chains, MultiSteps and other wrappers, and treat a
state without one as a dense network with θ = φ.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Alpha, OptState, Params, Static
from powerprop_jax.optim import nesting, regrow
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim.alphas import remap
from powerprop_jax.optim.alphas.remap import Hold
from powerprop_jax.optim.topology import (
  DropInState,
  SparseState,
  find_drop_in_state,
)


def init(
  tx: optax.GradientTransformation, theta: Params
) -> tuple[Params, OptState]:
  """Latent parameters and optimiser state for freshly initialised weights.

  Args:
    theta: weights as the network initialises them. They are copied, so that a
      train step may donate its state.

  Returns:
    (phi, opt_state) with ψ(φ) = θ, so that the network at step 0 computes the
    same function whatever α is; φ is zero where sparsify has no connection,
    unless it regrows with the latent value. Of drop_in, (θ⊙M, opt_state).

  Raises:
    ValueError: if powerprop or sparsify refuses the weights or what is around
      it: above all a selected leaf of zeros with α > 1, whose step is 0 for
      ever. Under jax.jit such a leaf goes unnoticed.

  Warns:
    UserWarning: if more than one in a thousand of the connections of a leaf
      with α > 1 start at exactly zero; sparsify gives them another value when
      it next rewires.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.)
    >>> phi, opt_state = init(tx, {'linear': {'w': jnp.array([[4., -0.25]])}})
    >>> phi['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  _check_arguments(tx, theta)
  phi = jax.tree.map(jnp.array, theta)
  opt_state = tx.init(phi)
  if find_drop_in_state(opt_state) is not None:
    return effective_params(phi, opt_state), opt_state
  # First, as it is what stands further out.
  nesting.find_sparse_state(opt_state)
  nesting.check_chains(opt_state)
  power = nesting.find_power_state(opt_state)
  if power is not None:
    phi = powerprop_lib.to_phi(phi, power)
    opt_state = tx.init(phi)
  sparse = nesting.find_sparse_state(opt_state)
  masks = None if sparse is None else sparse.masks
  powerprop_lib.warn_of_zeros(phi, power, masks)
  if sparse is not None and sparse.pins:
    phi = masks_lib.apply_masks(phi, masks)
  return phi, opt_state


def _check_arguments(tx: Any, theta: Params) -> None:
  is_tx = lambda value: hasattr(value, 'init') and hasattr(value, 'update')
  if not is_tx(tx):
    swapped = ' The arguments are swapped.' if is_tx(theta) else ''
    raise TypeError(
      'init(tx, theta) needs an Optax gradient transformation and the weights, '
      f'got {type(tx).__name__} for tx.{swapped}'
    )
  for leaf in trees.named_leaves(theta):
    if not (hasattr(leaf.value, 'dtype') or isinstance(leaf.value, float)):
      raise TypeError(
        f'theta must hold arrays only, but {leaf.path!r} is '
        f'{type(leaf.value).__name__}. Pass the arrays alone; of an Equinox '
        'module they are eqx.filter(module, eqx.is_inexact_array).'
      )


def effective_params(
  phi: Params, opt_state: OptState, *, pinned: bool = False
) -> Params:
  """What the network should see: θ = ψ(φ)⊙M, α and M read from the state.

  Args:
    pinned: promises that phi is just as init and the updates left it, and that
      nothing of one's own around sparsify changes its updates. It then mostly
      holds what has no connection at zero already, and one pass over the
      weights is saved. Not for averages of φ over steps.

  Example:
    >>> tx = optax.chain(powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.))
    >>> phi = {'linear': {'w': jnp.array([[2., -0.5]])}}
    >>> effective_params(phi, tx.init(phi))['linear']['w']
    Array([[ 4.  , -0.25]], dtype=float32)
  """
  sparse = nesting.find_sparse_state(opt_state)
  power = nesting.find_power_state(opt_state)
  if find_drop_in_state(opt_state) is not None:  # then phi is θ already
    power = None
  theta = powerprop_lib.to_theta(phi, power)
  if sparse is None or (pinned and sparse.pins and nesting.is_exact(opt_state)):
    return theta
  return masks_lib.apply_masks(theta, sparse.masks)


def current_masks(phi: Params, opt_state: OptState) -> Masks:
  """The connections that exist: the masks of sparsify, read from the state.

  All True without a sparsify. The arrays are those of the state, so copy them
  before it is donated.

  Example:
    >>> phi = {'linear': {'w': jnp.array([[2., -0.5]])}}
    >>> current_masks(phi, optax.sgd(0.1).init(phi))['linear']['w']
    Array([[ True,  True]], dtype=bool)
  """
  sparse = nesting.find_sparse_state(opt_state)
  return masks_lib.full_masks(phi) if sparse is None else sparse.masks


def with_masks(opt_state: OptState, masks: Masks) -> OptState:
  """The optimiser state with other connections, e.g. after pruning once more.

  The slots of weights that were not trained before are whatever the optimiser
  holds for them, which is zero if sparsify kept them out. The topology's memory
  stays as it is, so this is for those without one: given masks, random masks,
  gradual pruning, SET and RigL. A connection that is added starts at zero where
  sparsify held it there, which under α > 1 is dead, and refused.

  Example:
    >>> phi, masks = {'w': jnp.ones(2)}, {'w': jnp.array([True, False])}
    >>> tx = pp.static(optax.sgd(0.1), masks=masks)
    >>> opt_state = with_masks(tx.init(phi), {'w': jnp.array([False, True])})
    >>> effective_params(phi, opt_state)['w']
    Array([0., 1.], dtype=float32)
  """
  sparse = nesting.find_sparse_state(opt_state)
  if sparse is None:
    raise ValueError(
      'with_masks found no sparsify in the optimiser state; build it with '
      'sparsify(inner, topology) or one of its short forms, such as static.'
    )
  masks_lib.check_same_shapes(sparse.masks, masks, 'the state', 'masks')
  copies = jax.tree.map(lambda m: jnp.array(m, bool, copy=True), masks)
  if sparse.pins:
    power = nesting.find_power_state(opt_state)
    shapes = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32), masks
    )
    powers = regrow.powers_above_one(shapes, power)
    _check_none_added(sparse.masks, copies, powers)
  return trees.replace_states(
    opt_state, SparseState, lambda s: s._replace(masks=copies)
  )


def _check_none_added(old: Masks, new: Masks, powers: dict[str, Alpha]) -> None:
  """Refuses new connections at φ = 0, where α > 1."""
  added = masks_lib.difference(new, old)
  for leaf in trees.named_leaves(added):
    known = powers.get(leaf.path, 1), leaf.value
    if trees.is_traced(known):
      continue
    if known[0] > 1 and (count := int(jnp.sum(leaf.value))):
      raise ValueError(
        f'with_masks would add {count:,} connections to {leaf.path!r} that '
        'start at φ = 0, where powerpropagation with alpha > 1 gives them no '
        "gradient. Build with regrow='keep', or only take connections away."
      )


def latent_params(theta: Params, opt_state: OptState) -> Params:
  """The φ that the state's ψ maps to theta, e.g. to load or rewind weights.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.)
    >>> theta = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> latent_params(theta, tx.init(theta))['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  power = nesting.find_power_state(opt_state)
  return powerprop_lib.to_phi(theta, power)


def with_alpha(
  phi: Params, opt_state: OptState, alpha: Alpha, *, hold: Hold = 'theta'
) -> tuple[Params, OptState]:
  """Changes α, by default without changing θ.

  Holding θ, the latent weights become φ′ = φ |φ|^((α-α′)/α′), which ψ maps to
  the same θ under the new power α′; zeros stay zero, and with the recommended
  form the optimiser's own state, in θ-space, stays as it is. Holding φ, the
  network jumps to θ′ = sign(θ) |θ|^(α′/α): where |θ| < 1, a larger α shrinks
  every weight. Where sparsify held latent weights at zero because α was 1,
  connections that it grows from then on start as with regrow='smallest'.

  Args:
    alpha: the new power, in [1, 64]; a scalar or a tree as the old one. Where
      the old one is an array, nothing is compiled again; where it was given as
      a Python number, the new one must be a number too and a jitted step
      compiles again.
    hold: what stays as it is, 'theta' or 'phi'.

  Note:
    In the naive form the optimiser's slots live in φ-space. A momentum there
    would need the factor dφ′/dφ, infinite at 0 when α rises, and to start it
    anew needs the optimiser and not only its state; so that is refused. Holding
    φ is not: the slots stay in the coordinates that they were made in.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=1.)
    >>> phi = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> phi, opt_state = with_alpha(phi, tx.init(phi), 2.)
    >>> phi['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  names.check_choice('hold', hold, get_args(Hold))
  if (drop_in := find_drop_in_state(opt_state)) is not None:
    phi, inner_state = with_alpha(
      drop_in.phi, drop_in.inner_state, alpha, hold=hold
    )
    replaced = lambda s: s._replace(phi=phi, inner_state=inner_state)
    opt_state = trees.replace_states(opt_state, DropInState, replaced)
    return effective_params(phi, inner_state), opt_state
  power = nesting.find_power_state(opt_state)
  if power is None:
    raise ValueError(
      'with_alpha found no powerprop in the optimiser state; build it with '
      'powerprop(inner, alpha).'
    )
  remap.check_form(power, hold)
  stored = _same_kind(powerprop_lib.stored_alpha(alpha), power.alpha)
  if hold == 'theta':
    phi = remap.remap(phi, power, power._replace(alpha=stored))
  return phi, remap.replace_alpha(opt_state, stored)


def is_alpha_static(opt_state: OptState) -> bool:
  """Whether α is part of the program: a Python number, or no powerprop at all.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=jnp.float32(2))
    >>> is_alpha_static(tx.init({'linear': {'w': jnp.ones((1, 1))}}))
    False
  """
  power = nesting.find_power_state(opt_state)
  return power is None or not jax.tree.leaves(power.alpha)


def _same_kind(new: Alpha, old: Alpha) -> Alpha:
  """The new α stored like the old one: arrays where it had arrays."""
  is_static = lambda node: isinstance(node, Static)
  structure = lambda tree: str(
    jax.tree.structure(jax.tree.map(lambda _: 0, tree, is_leaf=is_static))
  )
  if structure(new) != structure(old):
    raise ValueError(
      f'alpha has another structure than the power it replaces, {old}: replace '
      'a scalar by a scalar, and a tree by a tree with the same leaves.'
    )

  def convert(old_leaf: Alpha, new_leaf: Alpha) -> Alpha:
    if not is_static(old_leaf):
      value = new_leaf.value if is_static(new_leaf) else new_leaf
      return jnp.array(value, jnp.float32)
    if not is_static(new_leaf):
      raise ValueError(
        'alpha was compiled in as a Python number and cannot become an array: '
        'build with powerprop(inner, alpha=jnp.float32(...)) to change it in a '
        'jitted program, or pass a number here.'
      )
    return new_leaf

  return jax.tree.map(convert, old, new, is_leaf=is_static)
