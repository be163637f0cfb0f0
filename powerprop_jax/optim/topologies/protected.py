"""Some weights stand still, others are hidden: many tasks in one network.

Two sets, both data, so that a new task compiles nothing. The forward set holds
the weights that the network computes with. The backward set B holds those that
may move; everything outside it belongs to earlier tasks. The step on φ is
masked last, after momentum and weight decay, so that what is protected keeps
its bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Params
from powerprop_jax.optim import topology as topology_lib
from powerprop_jax.optim.topology import SparseState, Topology


class Protection(NamedTuple):
  """What protected remembers.

  Attributes:
    trainable: the backward set B, True where a weight may move; a tree like
      the parameters.
  """

  trainable: Masks


def protected() -> Topology:
  """Computes with a forward set and trains what is also in the backward set.

  Both sets are full at first; with_protection replaces them. Weights outside
  either of them keep their latent values, bit by bit, whatever the optimiser
  proposes: sparsify masks the gradients before it and the step after it.

  Returns:
    A Topology whose masks are the forward set and whose memory is a Protection.
    It never rewires. Unlike others it may train fewer weights than the network
    computes with.

  Example:
    >>> tx = pp.sparsify(optax.sgd(0.5, momentum=0.9), protected())
    >>> phi = {'w': jnp.array([1., 1.])}
    >>> state = with_protection(
    ...     tx.init(phi), trainable={'w': jnp.array([True, False])})
    >>> updates, state = tx.update({'w': jnp.ones(2)}, state, phi)
    >>> updates['w']
    Array([-0.5,  0. ], dtype=float32)

  Source:
    Mallya & Lazebnik, PackNet, 2018 (https://arxiv.org/abs/1711.05769), and the
    backward mask of Schwarz et al., Powerpropagation, 2021, Algorithm 1.

  Note:
    The code of PackNet zeroes gradients only, which stops neither momentum nor
    weight decay.
  """

  def init(key: jax.Array, theta: Params) -> tuple[Masks, Protection]:
    del key
    full = masks_lib.full_masks
    # Twice, for a state that holds an array twice cannot be donated.
    return full(theta), Protection(full(theta))

  def trainable(masks: Masks, memory: Protection) -> Masks:
    return jax.tree.map(jnp.logical_and, masks, memory.trainable)

  return Topology(init, trainable=trainable, regrow='keep')


def with_protection(
  opt_state: OptState,
  *,
  masks: Masks | None = None,
  trainable: Masks | None = None,
) -> OptState:
  """The optimiser state with another forward set, backward set, or both.

  Args:
    opt_state: an optimiser state with sparsify(inner, protected()) somewhere
      inside. Its other slots stay as they are, and so do structure, shapes and
      dtypes: a jitted step is not traced again.
    masks: the forward set, to be copied; None leaves it.
    trainable: the backward set, likewise.

  Example:
    >>> tx = pp.sparsify(optax.sgd(0.1), protected())
    >>> phi = {'w': jnp.array([1., 2.])}
    >>> state = with_protection(
    ...     tx.init(phi), masks={'w': jnp.array([False, True])})
    >>> pp.effective_params(phi, state)['w']
    Array([0., 2.], dtype=float32)
  """
  sparse = topology_lib.find_sparse_state(opt_state)
  if sparse is None or not isinstance(sparse.memory, Protection):
    found = 'no sparsify' if sparse is None else 'another topology'
    raise ValueError(
      f'with_protection found {found} in the optimiser state; build it with '
      'sparsify(inner, protected()).'
    )
  forward = _replaced(sparse.masks, masks, 'masks')
  backward = _replaced(sparse.memory.trainable, trainable, 'trainable')
  return trees.replace_states(
    opt_state,
    SparseState,
    lambda s: s._replace(masks=forward, memory=Protection(backward)),
  )


def _replaced(old: Masks, new: Masks | None, name: str) -> Masks:
  if new is None:
    return old
  masks_lib.check_same_shapes(old, new, 'the state', name)
  return jax.tree.map(lambda m: jnp.array(m, bool, copy=True), new)
