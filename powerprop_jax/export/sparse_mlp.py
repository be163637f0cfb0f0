"""A fully connected network for SciPy and NumPy, without JAX.

At batch 1 SciPy's CSR is the fastest sparse product for a CPU that needs
neither a package of its own nor a compiler, ahead of dense ones from 90 %
sparsity on. A call costs a few microseconds, where one of a compiled JAX
function costs tens.
"""

from collections.abc import Sequence
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from powerprop_jax.core import layouts
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.export import sparse_matrices
from powerprop_jax.export.exported import Array

# Below 80 to 90 % sparsity a dense product is faster.
_MAX_DENSITY = 0.2


class Layer(NamedTuple):
  """A fully connected layer, features first: weight @ x + bias.

  The weight [out, in] is a scipy.sparse.csr_array, or a NumPy array where few
  are zero.
  """

  weight: Any
  bias: Array


class SparseMLP:
  """Fully connected layers, from the first to the last, with ReLU between.

  Example:
    >>> mlp = SparseMLP([Layer(np.array([[1., -1.]]), np.array([0.5]))])
    >>> mlp(np.array([[3., 1.], [0., 2.]]))
    array([[ 2.5],
           [-1.5]])
  """

  def __init__(self, layers: Sequence[Layer]):
    self.layers = tuple(layers)

  def __call__(self, x: Array) -> Array:
    """Logits [N, out] of inputs [N, ...], whose other axes are flattened."""
    if len(x) == 1:
      return self._features_first(np.ravel(x), 0)[np.newaxis]
    columns = np.ascontiguousarray(np.reshape(x, (len(x), -1)).T)
    return self._features_first(columns, 1).T

  def _features_first(self, x: Array, num_axes: int) -> Array:
    for number, (weight, bias) in enumerate(self.layers):
      if number:
        x = np.maximum(x, 0, out=x)
      x = weight @ x
      x += bias[:, np.newaxis] if num_axes else bias
    return x


def is_mlp(theta: Params, net_state: Tree) -> bool:
  """Whether a network is fully connected, by its parameters.

  True if every module holds a weight and at most a bias, of whatever library,
  and the outputs of each are as many as the inputs of the next in natural
  order. What lies between them cannot be seen.

  Example:
    >>> is_mlp({'mlp/linear_0': {'w': np.ones((4, 3)), 'b': np.ones(3)},
    ...         'mlp/logits': {'w': np.ones((3, 2))}}, {})
    True
  """
  layers = None if net_state else _layers(theta)
  if not layers:
    return False
  shapes = [weight.shape for weight, _ in layers]
  return all(a[1] == b[0] for a, b in itertools.pairwise(shapes))


def _layers(tree: Params) -> list[tuple[Array, Array]] | None:
  """Weights as [in, out] and biases, in order; None where there is more."""
  found = []
  for module in _in_order(tree):
    leaves = dict(tree[module])
    name = next((n for n in leaves if n in layouts.WEIGHT_NAMES), '')
    weight = np.asarray(leaves.pop(name, 0))
    bias = leaves.pop('b', leaves.pop('bias', None))
    if weight.ndim != 2 or leaves:
      return None
    weight = weight.transpose(layouts.by_name(module, name, weight.shape).order)
    none = np.zeros(weight.shape[1], weight.dtype)
    found.append((weight, none if bias is None else np.asarray(bias)))
  return found


def _in_order(modules: Params) -> list[str]:
  """Names in natural order: linear_2 before linear_10, and logits last."""
  natural = lambda name: [
    (int(part), '') if part.isdigit() else (-1, part)
    for part in re.split(r'(\d+)', name)
  ]
  return sorted(modules, key=natural)


def from_params(theta: Params, masks: Tree) -> SparseMLP:
  """A fully connected network, with ReLU between its layers.

  Modules, {'w': [in, out], 'b': [out]} or as Flax, Equinox or PyTorch has them,
  follow each other in natural order. A layer with more than a
  fifth of its weights stays dense, and half precision becomes float32, which
  SciPy computes with.

  Example:
    >>> w = np.array([[2., 0.], [0., 0.], [0., 0.], [0., 0.], [0., 0.]])
    >>> mlp = from_params({'linear': {'w': w}}, {'linear': {'w': w != 0}})
    >>> mlp(np.ones((1, 5)))
    array([[2., 0.]])
  """
  if not is_mlp(theta, {}):
    raise ValueError(
      f'the modules {", ".join(theta)} are not fully connected layers that '
      'follow each other. SciPy can run networks such as lenet_300_100 and mlp.'
    )
  layers = []
  held, kept = _layers(theta) or [], _layers(masks) or []
  for (weight, bias), (mask, _) in zip(held, kept, strict=True):
    wide = np.promote_types(np.float32, weight.dtype)
    if mask.mean() <= _MAX_DENSITY:
      matrix = sparse_matrices.csr(weight, mask)
    else:
      matrix = np.ascontiguousarray(np.where(mask, weight, 0).T.astype(wide))
    layers.append(Layer(matrix, bias.astype(wide)))
  return SparseMLP(layers)
