"""Powerpropagation as an Optax gradient transformation.

The optimiser works on the effective weights θ and their gradient ∂L/∂θ, with
its state in θ-space, and proposes a step Δθ. The latent weights φ follow with
one multiplication, Δφ = Δθ ψ′(φ). Chain-ruling the gradient first and letting
the optimiser work in φ-space is the naive form: equal for plain SGD, but an
optimiser that normalises its gradients, such as Adam, divides most of the
factor away again.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple, get_args
import warnings

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, powers, reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import (
  Alpha,
  NamedLeaf,
  OptState,
  Params,
  Select,
  Static,
  Updates,
)
from powerprop_jax.optim import shown, topology

Form = Literal['recommended', 'naive']


class PowerState(NamedTuple):
  """State of powerprop.

  Attributes:
    alpha: the power: Static, a float32 scalar, or a tree of these by leaf.
    inner_state: state of the wrapped optimiser.
    select: which leaves are reparameterised, Static.
    form: whether the state of the optimiser lives in θ-space ('recommended')
      or in φ-space ('naive'), Static.
  """

  alpha: Alpha
  inner_state: OptState
  select: Static
  form: Static = Static('recommended')

  def __repr__(self) -> str:
    return shown.state(self)

  def alphas(self, tree: Params) -> dict[str, Alpha]:
    """The α of each selected leaf, a number or an array, by 'module/name'."""
    by_path = alpha_by_path(self.alpha)
    return {
      leaf.path: by_path[''] if '' in by_path else by_path[leaf.path]
      for leaf in trees.named_leaves(tree)
      if self.select.value(*leaf)
    }


def powerprop(
  inner: optax.GradientTransformation,
  alpha: Alpha,
  select: Select = select_lib.is_weight,
  *,
  form: Form = 'recommended',
) -> optax.GradientTransformationExtraArgs:
  """Trains φ with the steps that inner takes on θ = ψ(φ) = φ |φ|^(α-1).

  `update(grads, state, params)` takes grads = ∂L/∂θ, the gradient at
  `effective_params(phi, state)`, and params = φ, and returns the step on φ.
  Leaves outside select are trained by inner as they are.

  Args:
    inner: any Optax optimiser. In the recommended form it sees ∂L/∂θ and θ,
      so that weight decay inside it (optax.adamw) decays θ, and its step is
      multiplied once by ψ′(φ), taken before the step. In the naive form it sees
      ∂L/∂φ = ∂L/∂θ ψ′(φ) and φ.
    alpha: the power, in [1, 64]; a scalar, or a tree of scalars with one for
      each selected leaf under its name. A Python number is compiled into the
      program, which is fastest for multiples of 1/4; an array is kept in the
      state, where it may change or be batched without compiling again.
    form: 'recommended', or 'naive' to compare with.

  Raises:
    ValueError: from `init`, if a selected leaf is all zeros although α > 1:
      ψ′(0) = 0, so that it would never move.

  Example:
    >>> tx = powerprop(optax.sgd(0.1), alpha=2.)
    >>> phi = {'linear': {'w': jnp.array([[2.0, -0.5]])}}
    >>> state = tx.init(phi)
    >>> grads = {'linear': {'w': jnp.array([[1.0, 1.0]])}}
    >>> updates, state = tx.update(grads, state, phi)
    >>> updates['linear']['w']                  # -0.1 · 1 · 2|φ|
    Array([[-0.4, -0.1]], dtype=float32)

  Source:
    Schwarz et al., Powerpropagation, 2021, section 2, last paragraph.
  """
  names.check_choice('form', form, get_args(Form))
  inner = optax.with_extra_args_support(inner)
  made = Parts(inner, stored_alpha(alpha), select, form)
  return optax.GradientTransformationExtraArgs(made.init, made.update)


def parts(tx: optax.GradientTransformation) -> 'Parts | None':
  """What a transformation was made of, if it is one that powerprop returned."""
  made = getattr(tx.update, '__self__', None)
  return made if isinstance(made, Parts) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """What powerprop is made of: its arguments, and what it does with them."""

  inner: optax.GradientTransformationExtraArgs
  alpha: Alpha
  select: Select
  form: Form

  def init(self, params: Params) -> PowerState:
    """The state at the start."""
    phi = params
    # A copy: the state may be donated, the caller's array must survive.
    alpha = jax.tree.map(lambda a: jnp.array(a, copy=True), self.alpha)
    power = PowerState(alpha, None, Static(self.select), Static(self.form))
    if select_lib.selected_names(self.select, phi):
      _check_alpha_covers(power, phi)
      _check_no_dead_leaf(power, phi)
    is_naive = self.form == 'naive'
    inner_state = self.inner.init(phi if is_naive else to_theta(phi, power))
    if topology.find_sparse_state(inner_state) is not None:
      raise ValueError(
        'sparsify goes around powerprop, not inside it: what it assigns to a '
        'weight must reach φ as it is. Write sparsify(powerprop(inner, alpha), '
        'topology), or rigl(powerprop(inner, alpha), ...).'
      )
    topology.refuse_drop_in(inner_state, 'powerprop')
    return power._replace(inner_state=inner_state)

  def update(
    self,
    updates: Updates,
    state: PowerState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, PowerState]:
    """The step on φ, and the state after it."""
    trees.require_params(params, 'powerprop', latent=True)
    return self.update_masked(updates, state, params, None, **extra_args)

  def update_masked(
    self,
    grads: Updates,
    state: PowerState,
    phi: Params,
    masks: Masks | None,
    **extra_args: Any,
  ) -> tuple[Updates, PowerState]:
    """The same, where inner is shown a dense φ through masks.

    What it returns outside them has no meaning.
    """
    is_naive = self.form == 'naive'
    if is_naive:
      grads = _times_slope(grads, phi, state)
    shown = phi if masks is None else masks_lib.apply_masks(phi, masks)
    seen = shown if is_naive else to_theta(shown, state)
    updates, inner_state = self.inner.update(
      grads, state.inner_state, seen, **extra_args
    )
    if not is_naive:
      updates = _times_slope(updates, phi, state)
    return updates, state._replace(inner_state=inner_state)


def find_power_state(opt_state: OptState) -> PowerState | None:
  """The first state of powerprop within an optimiser state, if there is one."""
  return next(iter(trees.find_states(opt_state, PowerState)), None)


def to_theta(phi: Params, state: PowerState | None) -> Params:
  """ψ on the selected leaves of φ, with α from the state; φ itself without one.

  Leaves that are not selected are the same arrays.
  """
  return _map_power(reparam.psi, phi, state)


def to_phi(theta: Params, state: PowerState | None) -> Params:
  """ψ⁻¹ on the selected leaves of θ: undoes to_theta."""
  return _map_power(reparam.psi_inverse, theta, state)


def stored_alpha(alpha: Alpha) -> Alpha:
  """α as the state keeps it: Python numbers as Static, the rest as float32.

  Refuses what is not a scalar in [1, reparam.MAX_ALPHA].
  """

  def store(leaf: jax.Array | float) -> Static | jax.Array:
    reparam.check_alpha(leaf)
    reparam.check_invertible(leaf)
    if powers.is_number(leaf):
      return Static(float(leaf))
    return jnp.asarray(leaf, jnp.float32)

  return jax.tree.map(store, alpha)


def alpha_by_path(alpha: Alpha) -> dict[str, Alpha]:
  """Powers, numbers or arrays, by the paths of their leaves; '' for a scalar.

  Example:
    >>> alpha_by_path({'m': {'w': Static(2.0)}}), alpha_by_path(Static(2.0))
    ({'m/w': 2.0}, {'': 2.0})
  """
  is_static = lambda node: isinstance(node, Static)
  return {
    trees.join_name(*trees.leaf_name(path)): a.value if is_static(a) else a
    for path, a in jax.tree_util.tree_leaves_with_path(alpha, is_leaf=is_static)
  }


def _times_slope(updates: Updates, phi: Params, state: PowerState) -> Updates:
  """Multiplies updates by ψ′(φ) on the selected leaves, in float32."""
  alphas = state.alphas(phi)

  def visit(leaf: NamedLeaf, u: jax.Array) -> jax.Array:
    if leaf.path not in alphas:
      return u
    phi = reparam.widen(leaf.value)
    slope = reparam.psi_derivative(phi, alphas[leaf.path])
    return (reparam.widen(u) * slope).astype(u.dtype)

  return trees.map_leaves(visit, phi, updates)


def _map_power(
  fn: Callable[..., jax.Array], tree: Params, state: PowerState | None
) -> Params:
  if state is None:
    return tree
  alphas = state.alphas(tree)
  return trees.map_leaves(
    lambda leaf: (
      fn(leaf.value, alphas[leaf.path]) if leaf.path in alphas else leaf.value
    ),
    tree,
  )


def _check_alpha_covers(state: PowerState, phi: Params) -> None:
  """Refuses a tree of powers that misses a leaf or names an unknown one."""
  given = alpha_by_path(state.alpha)
  if '' in given:
    return
  selected = select_lib.selected_names(state.select.value, phi)
  missing = [path for path in selected if path not in given]
  unknown = sorted(given.keys() - trees.by_path(phi).keys())
  if missing or unknown:
    raise ValueError(
      'alpha is a tree that does not fit the parameters: it has no value for '
      f'{missing} and values for unknown leaves {unknown}. It needs one scalar '
      'for each of: ' + ', '.join(selected) + '.'
    )


def _check_no_dead_leaf(state: PowerState, phi: Params) -> None:
  """Refuses selected leaves that are all zeros although their α > 1."""
  dead = [
    (repr(leaf.path), f'{alpha:g}')
    for leaf, alpha in _known_above_one(state, phi)
    if leaf.value.size and not jnp.any(leaf.value)
  ]
  if dead:
    paths, alphas = zip(*dead, strict=True)
    raise ValueError(
      f'{", ".join(paths)} {"is" if len(dead) == 1 else "are"} all zeros, '
      f'where powerpropagation with alpha = {", ".join(dict.fromkeys(alphas))} '
      'multiplies every step by ψ′(0) = 0: it could never train. Initialise it '
      'with something else, for instance nets.make(..., w_init=...), or leave '
      'it out: select=exclude(is_weight, pattern).'
    )


def warn_of_zeros(
  phi: Params, state: PowerState | None, masks: Masks | None
) -> None:
  """Warns of weights that could never train: at exactly zero under α > 1.

  For leaves where they are more than one in a thousand: random initialisers
  draw a zero now and then.
  """
  if state is None:
    return
  of_leaf = trees.by_path(masks_lib.full_masks(phi) if masks is None else masks)
  dead = []
  for leaf, _ in _known_above_one(state, phi):
    count = int(jnp.sum((leaf.value == 0) & of_leaf[leaf.path]))
    if 1000 * count > leaf.value.size:
      dead.append(f'{count:,} of {leaf.value.size:,} weights of {leaf.path!r}')
  if dead:
    warnings.warn(
      f'{", ".join(dead)} start at exactly zero, where powerpropagation with '
      'alpha > 1 multiplies every step by ψ′(0) = 0: they will not train. '
      'Initialise them with something else, however small, or leave the leaf '
      'out: select=exclude(is_weight, pattern).',
      stacklevel=3,
    )


def _known_above_one(
  state: PowerState, phi: Params
) -> list[tuple[NamedLeaf, float]]:
  """Selected leaves with α > 1, where both can be looked at."""
  alphas = state.alphas(phi)
  return [
    (leaf, float(alphas[leaf.path]))
    for leaf in trees.named_leaves(phi)
    if leaf.path in alphas
    and isinstance(leaf.value, jax.Array)
    and not trees.is_traced((leaf.value, alphas[leaf.path]))
    and alphas[leaf.path] > 1
  ]
