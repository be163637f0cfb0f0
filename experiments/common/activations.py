"""Outputs of the layers of any Haiku network, by looking over its shoulder.

Haiku tells who asks whenever a method of a module is called; this is how the
outputs of layers are seen that the network itself keeps to itself.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params

# (theta, inputs) -> anything, by way of Haiku modules.
Apply = Callable[[Any, Any], Any]


def layer_outputs(
  apply: Apply, theta: Params, inputs: Any, *, with_norms: bool = True
) -> dict[str, tuple[jax.Array, ...]]:
  """Outputs of every layer of a Haiku network, before any nonlinearity.

  A layer is a module that has a weight. A batch normalisation applied
  directly to a layer's output belongs to the layer: its output is the layer's,
  unless with_norms is False.

  Args:
    apply: runs the network, (theta, inputs) -> anything, not compiled by
      jax.jit; what calls layer_outputs may be. Layers inside hk.remat, hk.scan
      or hk.layer_stack cannot be read: their arrays must not leave it.

  Returns:
    For each layer, by the name of its module and in the order of the forward
    pass, its output each time that it is applied, [N, ..., C].

  Raises:
    ValueError: if apply runs none of the modules of theta, or a layer returns
      something other than one array.

  Example:
    >>> net = hk.without_apply_rng(hk.transform(
    ...     lambda x: hk.nets.MLP([3, 2])(x)))
    >>> theta = net.init(jax.random.key(0), jnp.ones((5, 4)))
    >>> found = layer_outputs(net.apply, theta, jnp.ones((5, 4)))
    >>> {layer: outputs[0].shape for layer, outputs in found.items()}
    {'mlp/~/linear_0': (5, 3), 'mlp/~/linear_1': (5, 2)}
  """
  layers = dict.fromkeys(
    leaf.module_name
    for leaf in trees.named_leaves(theta)
    if pp.is_weight(*leaf)
  )
  found: dict[str, list[jax.Array]] = {}
  # A layer's output by identity, until a normalisation takes its place. The
  # array is kept, so that no other can have its id.
  pending: dict[int, tuple[jax.Array, str, int]] = {}

  def watch(
    next_fn: Any, args: Any, kwargs: Any, context: hk.MethodContext
  ) -> Any:
    output = next_fn(*args, **kwargs)
    if context.method_name != '__call__':
      return output
    name = context.module.module_name
    if name in layers:
      outputs = found.setdefault(name, [])
      _check_output(output, name)
      if with_norms:
        pending[id(output)] = (output, name, len(outputs))
      outputs.append(_features_last(output, context.module))
    elif isinstance(context.module, hk.BatchNorm):
      before = args[0] if args else kwargs.get('inputs')
      if id(before) in pending:
        _, layer, index = pending.pop(id(before))
        found[layer][index] = _features_last(output, context.module)
    return output

  with hk.intercept_methods(watch):
    apply(theta, inputs)
  if not found:
    raise ValueError(
      'apply ran none of the modules that have weights: '
      f'{", ".join(layers)}. It must call the apply function of the network '
      'that theta belongs to, and not be compiled.'
    )
  return {layer: tuple(outputs) for layer, outputs in found.items()}


def _features_last(output: jax.Array, module: hk.Module) -> jax.Array:
  # Haiku's convolutions and norms of channels-first images have index 1.
  return jnp.moveaxis(output, getattr(module, 'channel_index', -1), -1)


def _check_output(output: Any, layer: str) -> None:
  if not isinstance(output, jax.Array) or output.ndim < 2:
    found = getattr(output, 'shape', type(output).__name__)
    raise ValueError(
      f'the output of {layer} must be an array [N, ..., C], got {found}.'
    )
