"""Signal propagation: how far a network passes its signals on, layer by layer.

A network that is too sparse shows it before its first step: activations fade
towards the output, and gradients on their way back. Both are measured here, at
initialisation or later, on layers of Haiku, which says who asks whenever a
method of a module is called: what the transform of a layer adds is part of its
output, so that the products of its weight alone do not show it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row

Record = Row

# (theta, inputs) -> anything, by way of Haiku modules.
Apply = Callable[[Any, Any], Any]


class Signal(NamedTuple):
  """What passes through a layer, float32 scalars.

  Attributes:
    variance: of its outputs, before normalisation and nonlinearity, over all
      examples, positions and features of the batch.
    gradient_norm: Euclidean norm of ∂L/∂(θ⊙M) over its connections; 0 if it
      has none.
  """

  variance: jax.Array
  gradient_norm: jax.Array


def signal_propagation(
  apply: Apply,
  loss_fn: Callable[[Any], jax.Array],
  theta: Params,
  inputs: Any,
  *,
  masks: pp.Masks | None = None,
) -> dict[str, Signal]:
  """The signal in every layer of a Haiku network, forward and backward.

  A layer is a module that has a selected weight; its fixed transform, where it
  has one, counts in its outputs. Of a layer that is applied several times, all
  outputs are taken together. Layers come by the names of their modules, in the
  order of the forward pass.

  Args:
    apply: runs the network, not compiled, and without hk.remat and hk.scan,
      whose arrays must not leave them.
    loss_fn: outputs -> scalar loss.
    masks: the network is measured at theta⊙masks; all True by default.

  Raises:
    ValueError: if masks do not fit theta, or apply runs none of its modules.

  Example:
    >>> import haiku as hk
    >>> net = hk.without_apply_rng(hk.transform(
    ...     lambda x: hk.Linear(1, w_init=jnp.ones)(x)))
    >>> images = jnp.array([[1., 0.], [1., 2.]])
    >>> theta = net.init(None, images)
    >>> found = signal_propagation(net.apply, jnp.mean, theta, images)
    >>> print(found['linear'].variance)       # of 1 and 3
    1.0
    >>> print(found['linear'].gradient_norm)  # of (1, 1)
    1.4142135
  """
  masks = masks_lib.full_masks(theta) if masks is None else masks
  theta = pp.apply_masks(theta, masks)
  outputs = _outputs(apply, theta, inputs)
  grads = jax.grad(lambda t: loss_fn(apply(t, inputs)))(theta)
  grads = pp.apply_masks(grads, masks)
  squares: Row = {}
  for leaf, value in zip(
    trees.named_leaves(theta), jax.tree.leaves(grads), strict=True
  ):
    if leaf.module_name in outputs and pp.is_weight(*leaf):
      square = jnp.sum(jnp.square(value.astype(jnp.float32)))
      squares[leaf.module_name] = squares.get(leaf.module_name, 0.0) + square
  return {
    layer: Signal(_variance(found), jnp.sqrt(squares[layer]))
    for layer, found in outputs.items()
  }


def _outputs(
  apply: Apply, theta: Params, inputs: Any
) -> dict[str, list[jax.Array]]:
  """What each layer computes each time that it is applied, in that order."""
  layers = dict.fromkeys(
    leaf.module_name
    for leaf in trees.named_leaves(theta)
    if pp.is_weight(*leaf)
  )
  found: dict[str, list[jax.Array]] = {}

  def watch(
    next_fn: Any, args: Any, kwargs: Any, context: hk.MethodContext
  ) -> Any:
    output = next_fn(*args, **kwargs)
    name = context.module.module_name
    if name in layers and context.method_name == '__call__':
      found.setdefault(name, []).append(output)
    return output

  with hk.intercept_methods(watch):
    apply(theta, inputs)
  if not found:
    raise ValueError(
      'apply ran none of the modules that have weights: '
      f'{", ".join(layers)}. It must call the apply function of the network '
      'that theta belongs to, and not be compiled.'
    )
  return found


def signal_records(found: Mapping[str, Signal]) -> list[Record]:
  """Flat records of concrete signals, one per layer, in their order.

  Example:
    >>> signal_records({'linear': Signal(jnp.float32(1), jnp.float32(0.5))})
    [{'layer': 'linear', 'variance': 1.0, 'gradient_norm': 0.5}]
  """
  return [
    {
      'layer': layer,
      'variance': float(signal.variance),
      'gradient_norm': float(signal.gradient_norm),
    }
    for layer, signal in found.items()
  ]


def _variance(outputs: list[jax.Array]) -> jax.Array:
  values = [jnp.ravel(output).astype(jnp.float32) for output in outputs]
  return jnp.var(jnp.concatenate(values))
