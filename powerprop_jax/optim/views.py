"""What a training step needs from an optimiser state: views of the weights.

The power α and the choice of leaves live in the optimiser state, so these
functions take (phi, opt_state) and nothing that could disagree with it. They
find that state inside chains, MultiSteps and other wrappers, and treat a state
without one as a dense network with θ = φ.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import trees
from powerprop_jax.optim import powerprop as powerprop_lib
from powerprop_jax.optim.powerprop import PowerState, Static

# Wrappers that show their inner transformation only some of the leaves, while
# a view is asked about all of them.
_PARTIAL = (optax.MaskedState, optax.transforms.PartitionState)


def init(tx: optax.GradientTransformation, theta: Any) -> tuple[Any, Any]:
  """Latent parameters and optimiser state for freshly initialised weights.

  Args:
    tx: a gradient transformation, with or without powerprop inside.
    theta: effective weights as the network initialises them. They are copied,
      so that a train step may donate its state.

  Returns:
    (phi, opt_state) with ψ(φ) = θ, so that the network at step 0 computes the
    same function whatever α is.

  Raises:
    ValueError: if powerprop refuses the weights (see its `init`).

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.)
    >>> phi, opt_state = init(tx, {'linear': {'w': jnp.array([[4., -0.25]])}})
    >>> phi['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  theta = jax.tree.map(jnp.array, theta)
  power = _find_power_state(tx.init(theta))
  if power is None:
    return theta, tx.init(theta)
  phi = powerprop_lib.to_phi(theta, power)
  return phi, tx.init(phi)


def effective_params(phi: Any, opt_state: Any) -> Any:
  """What the network should see: θ = ψ(φ), with α read from the state.

  Args:
    phi: latent parameters.
    opt_state: the optimiser state that goes with them.

  Returns:
    Effective parameters, same structure, shapes and dtypes.

  Example:
    >>> tx = optax.chain(powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.))
    >>> phi = {'linear': {'w': jnp.array([[2., -0.5]])}}
    >>> effective_params(phi, tx.init(phi))['linear']['w']
    Array([[ 4.  , -0.25]], dtype=float32)
  """
  power = _find_power_state(opt_state)
  return phi if power is None else powerprop_lib.to_theta(phi, power)


def latent_params(theta: Any, opt_state: Any) -> Any:
  """The φ that the state's ψ maps to theta, e.g. to load or rewind weights.

  Args:
    theta: effective parameters.
    opt_state: the optimiser state they will be trained with.

  Returns:
    Latent parameters, same structure, shapes and dtypes.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=2.)
    >>> theta = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> latent_params(theta, tx.init(theta))['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  power = _find_power_state(opt_state)
  return theta if power is None else powerprop_lib.to_phi(theta, power)


def with_alpha(phi: Any, opt_state: Any, alpha: Any) -> tuple[Any, Any]:
  """Changes α without changing θ.

  The latent weights become ψ⁻¹(θ) under the new power; the optimiser's own
  state lives in θ-space and stays as it is.

  Args:
    phi: latent parameters.
    opt_state: their optimiser state, with powerprop somewhere inside.
    alpha: the new power, a scalar or a tree as the old one. Where the old one
      is an array, nothing is compiled again; where it was given as a Python
      number, the new one must be a number too and a jitted step compiles again.

  Returns:
    (phi, opt_state) for the new power.

  Raises:
    ValueError: if there is no powerprop in the state, or alpha is invalid or of
      another kind or structure than the old one.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=1.)
    >>> phi = {'linear': {'w': jnp.array([[4., -0.25]])}}
    >>> phi, opt_state = with_alpha(phi, tx.init(phi), 2.)
    >>> phi['linear']['w']
    Array([[ 2. , -0.5]], dtype=float32)
  """
  power = _find_power_state(opt_state)
  if power is None:
    raise ValueError(
      'with_alpha found no powerprop in the optimiser state; build it with '
      'powerprop(inner, alpha).'
    )
  stored = _same_kind(powerprop_lib.stored_alpha(alpha), power.alpha)
  changed = dataclasses.replace(power, alpha=stored)
  new_phi = powerprop_lib.to_phi(powerprop_lib.to_theta(phi, power), changed)
  opt_state = trees.replace_states(
    opt_state, PowerState, lambda s: dataclasses.replace(s, alpha=stored)
  )
  return new_phi, opt_state


def is_alpha_static(opt_state: Any) -> bool:
  """Whether α is part of the program: a Python number, or no powerprop at all.

  Args:
    opt_state: an optimiser state.

  Returns:
    False if any leaf has an α that is an array.

  Example:
    >>> tx = powerprop_lib.powerprop(optax.sgd(0.1), alpha=jnp.float32(2))
    >>> is_alpha_static(tx.init({'linear': {'w': jnp.ones((1, 1))}}))
    False
  """
  power = _find_power_state(opt_state)
  return power is None or not jax.tree.leaves(power.alpha)


def _find_power_state(opt_state: Any) -> PowerState | None:
  """The state of powerprop within opt_state, if there is one."""
  found = trees.find_states(opt_state, PowerState)
  partial = trees.find_states(opt_state, *_PARTIAL)
  if len(found) > 1 or any(trees.find_states(s, PowerState) for s in partial):
    raise ValueError(
      'powerprop must be outermost: found it inside optax.masked or '
      'optax.partition, or more than once. Write powerprop(optax.masked(...), '
      'alpha, select) and choose leaves with select.'
    )
  return found[0] if found else None


def _same_kind(new: Any, old: Any) -> Any:
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

  def convert(old_leaf: Any, new_leaf: Any) -> Any:
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
