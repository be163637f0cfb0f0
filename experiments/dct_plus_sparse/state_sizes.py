"""Bytes of what a training run keeps from one step to the next, from shapes.

A sparse network is kept in one of two forms. Masked: every weight with its
slots in the optimiser, and a mask of one byte a weight. Condensed: values of
the connections alone, with their slots, and a position of four bytes each, with
which they can be found (layers that are fast at it keep three such numbers).
"""

from collections.abc import Mapping

import jax
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Tree


def tree_bytes(tree: Tree) -> int:
  """Bytes of all leaves of a tree of arrays, or of their shapes.

  Example:
    >>> tree_bytes({'w': np.zeros((2, 3), np.float32), 'm': np.ones(6, bool)})
    30
  """
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def trained_bytes(
  tx: optax.GradientTransformation, phi: Params, net_state: Tree = ()
) -> int:
  """Bytes of φ, the network's own state and the optimiser's; shapes will do.

  Example:
    >>> trained_bytes(optax.sgd(0.1, 0.9), {'w': np.zeros((5, 2), np.float32)})
    80
  """
  opt_state = jax.eval_shape(tx.init, phi)
  return tree_bytes((phi, net_state, opt_state))


def condensed_bytes(
  inner: optax.GradientTransformation,
  phi: Params,
  num_connections: Mapping[str, int],
  net_state: Tree = (),
) -> int:
  """The same of a network that holds its connections alone, and positions.

  Args:
    inner: the optimiser, without sparsify: there are no masks.
    phi: of the dense form.
    num_connections: connections of each weight, by 'module/name'; other leaves
      are kept as they are.

  Example:
    >>> phi = {'w': np.zeros((5, 2), np.float32)}
    >>> condensed_bytes(optax.sgd(0.1, 0.9), phi, {'w': 3})  # 3 (4 + 4 + 4)
    36
  """
  positions = np.dtype(np.int32).itemsize * sum(num_connections.values())
  values = trees.map_named(
    lambda module, name, leaf: jax.ShapeDtypeStruct(
      (num_connections[path],)
      if (path := trees.join_name(module, name)) in num_connections
      else leaf.shape,
      leaf.dtype,
    ),
    phi,
  )
  return trained_bytes(inner, values, net_state) + positions


def num_trained(phi: Params, num_connections: int) -> int:
  """Parameters that are trained: connections, and all that are not weights.

  These are biases, scales and offsets of norms and transforms.

  Example:
    >>> phi = {'linear': {'w': np.zeros((5, 2)), 'b': np.zeros(2)}}
    >>> num_trained(phi, 3)
    5
  """
  return num_connections + sum(
    leaf.value.size
    for leaf in trees.named_leaves(phi)
    if not pp.is_weight(*leaf)
  )
