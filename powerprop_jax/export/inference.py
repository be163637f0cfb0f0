"""One trained network as a function of images, in each form that it can take.

    form = condensed(make, exported, image_shape)
    logits = jax.jit(form.run)(form.parameters, images)

All forms compute the same logits up to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.export.exported import Exported
from powerprop_jax.sparse import weight as sparse_weight

# Makes a network, perhaps with supports=, e.g. partial(nets.make, 'mlp', 10).
Make: TypeAlias = Callable[..., hk.TransformedWithState]


class Form(NamedTuple):
  """A network and what it computes with.

  run, to be jitted, takes parameters and images [N, H, W, C] to logits
  [N, classes].
  """

  run: Callable[[Params, jax.Array], jax.Array]
  parameters: Params


def dense(make: Make, exported: Exported) -> Form:
  """Dense products with θ, whose zeros are multiplied like all other weights.

  The parameters of the form are theta and net_state.
  """
  parameters = _on_device((exported.theta, exported.net_state))
  return Form(_run(make()), parameters)


def _run(
  net: hk.TransformedWithState,
) -> Callable[[Params, jax.Array], jax.Array]:
  def run(parameters: Params, images: jax.Array) -> jax.Array:
    theta, net_state = parameters
    logits: jax.Array = net.apply(theta, net_state, None, images, False)[0]
    return logits

  return run


def masked(make: Make, exported: Exported) -> Form:
  """Dense products with θ ⊙ M, multiplied out in every call.

  The parameters of the form are theta, net_state and masks.
  """
  form = dense(make, exported)

  def run(parameters: Params, images: jax.Array) -> jax.Array:
    theta, net_state, masks = parameters
    theta = masks_lib.apply_masks(theta, masks)
    return form.run((theta, net_state), images)

  return Form(run, (*form.parameters, _on_device(exported.masks)))


def condensed(
  make: Make, exported: Exported, image_shape: tuple[int, ...]
) -> Form:
  """The network without its zeros, by the layers that hold its connections.

  The parameters of the form are the condensed theta and net_state. A leaf with
  more connections than zeros stays dense, and so all of a network without
  zeros.
  """
  select = sparse_leaves(exported.masks)
  if select is None:
    return dense(make, exported)
  net = make(supports=sparse_weight.supports(exported.masks, select=select))
  theta = sparse_weight.condense(
    _on_device(exported.theta), exported.masks, select=select
  )
  init = jax.jit(net.init, static_argnums=2)
  images = jnp.zeros((1, *image_shape))
  # What condensed layers keep there, and the statistics of the norms.
  _, made = init(jax.random.key(0), images, True)
  net_state = {module: dict(leaves) for module, leaves in made.items()}
  for module, leaves in _on_device(exported.net_state).items():
    net_state.setdefault(module, {}).update(leaves)
  return Form(_run(net), (theta, net_state))


def sparse_leaves(masks: Tree) -> Select | None:
  """The weights that are worth storing by their connections; None for none.

  A value and its position take twice the memory of a value: at most half of the
  weights may exist.

  Example:
    >>> masks = {'a': {'w': np.eye(3) > 0}, 'b': {'w': np.ones((3, 3)) > 0}}
    >>> sparse_leaves(masks)('a', 'w', None)
    True
  """
  # Predicates look at floating-point parameters.
  like: Tree = lambda m: jax.ShapeDtypeStruct(np.shape(m), jnp.float32)
  chosen = {
    (leaf.module_name, leaf.name)
    for leaf in trees.named_leaves(masks)
    if select_lib.is_weight(leaf.module_name, leaf.name, like(leaf.value))
    and np.size(leaf.value)
    and np.mean(leaf.value) <= 0.5
  }
  if not chosen:
    return None
  return lambda module_name, name, value: (module_name, name) in chosen


def _on_device(tree: Tree) -> Tree:
  return jax.tree.map(jnp.asarray, tree)
