"""Any function of weights, with a fixed cosine transform beside its products.

A very sparse layer passes on little of what it gets. Here every product of a
chosen leaf becomes

    y = s D(x) + S(x),

where D is a fixed orthonormal cosine transform, which connects every input with
every output at no cost in parameters, s a trainable number and S the product
with the leaf.

By Price and Tanner, Dense for the Price of Sparse, 2021
(https://arxiv.org/abs/2102.07655).
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import jax.typing
import numpy as np

from powerprop_jax.core import names, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.layouts import Axes
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.jaxprs import moves, observe, rewrite, walk
from powerprop_jax.jaxprs.rewrite import Found, Held

# How the transform is applied: as a constant matrix that is added to the leaf,
# by way of a Fourier transform, or what the shapes say.
Method = Literal['auto', 'matrix', 'fft']
METHODS = get_args(Method)

# 'auto' for a product: 'fft' for at least this many entries of the shorter side
# of the weight per vector that is multiplied.
_ENTRIES_PER_VECTOR = 8

# 'auto' for the transform alone: 'fft' from this length on.
_FFT_LENGTH = 256


class WithDct(NamedTuple):
  """Parameters of a function with a transform.

  Attributes:
    theta: those of the function; the chosen leaves are mostly zero at first.
    scales: s of each chosen leaf, {'module/name': scalar}.
  """

  theta: Params
  scales: dict[str, jax.Array]


def dct_params(
  theta: Params,
  *,
  select: Select = select_lib.is_weight,
  scale: float = 1.0,
  keep: bool = False,
) -> WithDct:
  """The parameters that with_dct starts from: chosen leaves at zero.

  Args:
    scale: the first value of every s. 0 gives a plain sparse function, to which
      training may add the transform.
    keep: whether the chosen leaves keep their values.

  Example:
    >>> dct_params({'w': jnp.ones((1, 2))})
    WithDct(theta={'w': Array([[0., 0.]], dtype=float32)}, \
scales={'w': Array(1., dtype=float32)})
  """
  names = select_lib.selected_names(select, theta)
  leaves = trees.by_path(theta)
  scales = {name: jnp.asarray(scale, leaves[name].dtype) for name in names}
  if not keep:
    theta = trees.map_selected(jnp.zeros_like, select, theta)
  return WithDct(theta, scales)


def with_dct(
  fn: Callable[..., Any],
  *,
  select: Select = select_lib.is_weight,
  method: Method = 'auto',
) -> Callable[..., Any]:
  """fn(theta, *args) with a transform beside every product of a chosen leaf.

  In the place of theta the returned function takes what dct.dct_params(theta)
  gives (from powerprop_jax.jaxprs import dct). What the transform sees are the
  inputs of the product in the order of the leaf; of a convolution the patch at
  each place, in the order (row, column, channel), channel fastest, and of
  groups each its own. The function is in whatever library it is in.

  Args:
    method: 'matrix' adds s D to the leaf, 'fft' computes the transform in
      O(n log n) beside the product, so that without_zeros may then take the
      product without its zeros. 'auto' is 'fft' for linear layers whose shorter
      side is at least 8 times the number of vectors; this is what was faster on
      two CPU cores.

  Raises:
    ValueError: if the function uses a chosen leaf otherwise than in products.

  Example:
    >>> from powerprop_jax.jaxprs import dct
    >>> fn = lambda theta, x: x @ theta['w']
    >>> params = dct.dct_params({'w': jnp.ones((2, 2))})
    >>> with_dct(fn)(params, jnp.eye(2)).round(3)
    Array([[ 0.707,  0.707],
           [ 0.707, -0.707]], dtype=float32)

  Source:
    Price & Tanner, 2021: see the top of this file.
  """
  names.check_choice('method', method, METHODS)

  def transformed(params: WithDct, *args: Any) -> Any:
    theta = params.theta
    axes = walk.leaf_axes(fn, theta, *args)
    chosen = select_lib.selected_names(select, theta)
    leaves = trees.by_path(theta)
    held = {name: (leaves[name], params.scales[name]) for name in chosen}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    rule = _Transform(axes, shapes, method)
    return rewrite.run(fn, rule, rewrite.hold(held, theta), *args)[0]

  return transformed


class _Transform:
  """The rule by which rewrite.run adds the transform."""

  def __init__(
    self,
    axes: Mapping[str, Axes],
    shapes: Mapping[str, tuple[int, ...]],
    method: Method,
  ):
    self._axes, self._shapes, self._method = axes, shapes, method

  def dense(self, held: Held, used_by: str) -> jax.Array:
    leaf = held.view.leaf
    if used_by not in rewrite.PRODUCTS:
      raise ValueError(
        f'{leaf!r} is used by {used_by}, where there is no transform to add. '
        'Leave it out of select.'
      )
    weight, scale = held.value
    axes, shape = self._axes[leaf], self._shapes[leaf]
    *window, num_in, num_out = axes.layer(shape)
    rows = cosine_weight(math.prod(window) * num_in, num_out, weight.dtype)
    repeats = axes.repeats[len(held.view.repeats) :]
    rows = jnp.broadcast_to(rows, (*(shape[a] for a in repeats), *rows.shape))
    return weight + scale * moves.from_matrix(rows, axes, shape)

  def layers(self, held: Held) -> Tree:
    weight, scale = held.value
    return weight, jnp.broadcast_to(scale, weight.shape[:1])

  def product(
    self, eqn: jax_core.JaxprEqn, held: Held, other: jax.Array, side: int
  ) -> Found:
    leaf = held.view.leaf
    axes, shape = self._axes[leaf], self._shapes[leaf]
    is_linear = eqn.primitive.name == 'dot_general'
    method = self._method
    if method == 'auto':
      *_, num_in, num_out = axes.layer(shape)
      contracted = eqn.params['dimension_numbers'][0] if is_linear else ()
      summed = {*contracted[1 - side]} if is_linear else set()
      vectors = [n for a, n in enumerate(other.shape) if a not in summed]
      shorter = min(num_in, num_out)
      is_long = shorter >= _ENTRIES_PER_VECTOR * math.prod(vectors)
      method = 'fft' if is_linear and is_long else 'matrix'
    if method == 'matrix':
      return Found(None)
    weight, scale = held.value
    plain = rewrite.place(weight, held)
    operands = (plain, other) if side == 0 else (other, plain)
    y = rewrite.bind(eqn, operands)[0]
    add = _beside_linear if is_linear else _beside_conv
    return Found(y + scale.astype(y.dtype) * add(eqn, held, other, side, axes))


def _beside_linear(
  eqn: jax_core.JaxprEqn, held: Held, x: jax.Array, side: int, axes: Axes
) -> jax.Array:
  """The transform of what a matrix product multiplies, in its shape."""
  contracted, batch = eqn.params['dimension_numbers']
  inputs = observe.inputs(eqn, held, x, side)
  free = [
    axis
    for axis in range(len(held.view.axes))
    if axis not in contracted[side] and axis not in batch[side]
  ]
  parts = [piece for axis in free for piece in held.view.axes[axis]]
  y = transform(inputs, math.prod(p.size for p in parts), method='fft')
  shape = inputs.shape[:-1]
  y = moves.arranged(
    y, shape, moves.pieces_in_order(parts, axes.outputs), parts
  )
  sizes = [math.prod(p.size for p in held.view.axes[axis]) for axis in free]
  y = y.reshape(*shape, *sizes)
  if side == 1:
    return y
  first, count = len(batch[0]), len(shape)
  order = [*range(first), *range(count, y.ndim), *range(first, count)]
  return y.transpose(order)


def _beside_conv(
  eqn: jax_core.JaxprEqn, held: Held, x: jax.Array, side: int, axes: Axes
) -> jax.Array:
  """The transform of each patch, in the shape of the convolution."""
  patches = observe.inputs(eqn, held, x, side)
  out = eqn.params['dimension_numbers'].out_spec
  num_out = moves.shape_of(eqn.outvars[0])[out[1]]
  groups = axes.groups
  y = transform(patches, num_out, method='fft')
  if groups > 1:
    # Every group's patch has all coefficients; a group keeps its own channels.
    y = y.reshape(*y.shape[:-1], groups, num_out // groups)
    y = jnp.einsum('...ggo->...go', y).reshape(*y.shape[:-3], num_out)
  by_out = [out[0], *out[2:], out[1]]
  return y.transpose([by_out.index(axis) for axis in range(y.ndim)])


def cosine_weight(
  num_in: int, num_out: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """The cosine transform as a weight: x @ cosine_weight is the transform of x.

  With n = max(num_in, num_out), entry [i, o] is c_o cos(π (2i + 1) o / 2n),
  where c_0 = sqrt(1/n) and c_o = sqrt(2/n): the orthonormal DCT-II of x padded
  with zeros to length n, of which the first num_out coefficients are left.
  Columns are orthonormal if num_in = n, rows if num_out = n.

  It is computed in float64, whatever its dtype.

  Example:
    >>> cosine_weight(2, 2, jnp.float32).round(3)
    Array([[ 0.707,  0.707],
           [ 0.707, -0.707]], dtype=float32)

  Source:
    Price & Tanner, 2021: see the top of this file.
  """
  n = max(num_in, num_out)
  # The angle is a multiple of π/2n; whole turns are left out while it is an
  # integer, so that long transforms are as exact as short ones.
  cosines = math.sqrt(2 / n) * np.cos(np.pi / (2 * n) * np.arange(4 * n))
  angles = np.outer(2 * np.arange(num_in) + 1, np.arange(num_out)) % (4 * n)
  weight = cosines[angles]
  weight[:, 0] = math.sqrt(1 / n)
  return jnp.asarray(weight, dtype)


def transform(x: jax.Array, num_out: int, *, method: str = 'auto') -> jax.Array:
  """First num_out coefficients of the orthonormal cosine transform of vectors.

  Args:
    num_out: number of coefficients; if it is more than num_in, x is padded with
      zeros to that length first.
    method: 'matrix' multiplies by cosine_weight; 'fft' computes the transform
      in O(n log n), in float32 for half precision; 'auto' is 'fft' from length
      256 on, where it becomes faster on a CPU.

  Example:
    >>> transform(jnp.array([1.0, 2.0, 3.0, 4.0]), 1)
    Array([5.], dtype=float32)

  Source:
    Makhoul, A fast cosine transform in one and two dimensions, 1980, for the
    transform by way of a real Fourier transform of the same length.
  """
  names.check_choice('method', method, METHODS)
  if num_out < 1:
    raise ValueError(f'num_out must be at least 1, got {num_out}.')
  num_in = x.shape[-1]
  if method == 'auto':
    method = 'fft' if max(num_in, num_out) >= _FFT_LENGTH else 'matrix'
  if method == 'matrix':
    return x @ cosine_weight(num_in, num_out, x.dtype)
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return _fast_transform(wide, num_out).astype(x.dtype)


def _fast_transform(x: jax.Array, num_out: int) -> jax.Array:
  n = max(x.shape[-1], num_out)
  missing = n - x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
  # Every second entry forwards, then the others backwards.
  x = jnp.concatenate([x[..., ::2], x[..., 1::2][..., ::-1]], axis=-1)
  turns = np.exp(-1j * np.pi / (2 * n) * np.arange(n // 2 + 1))
  scales = np.full(turns.shape, math.sqrt(2 / n))
  scales[0] = math.sqrt(1 / n)
  spectrum = jnp.fft.rfft(x)
  factors = jnp.asarray(turns * scales, spectrum.dtype)
  spectrum *= factors.reshape((1,) * (x.ndim - 1) + factors.shape)
  if num_out <= n // 2 + 1:
    return spectrum.real[..., :num_out]
  # Coefficient n - k is found beside coefficient k.
  rest = -spectrum.imag[..., 1 : (n + 1) // 2][..., ::-1]
  found = jnp.concatenate([spectrum.real, rest], axis=-1)
  return found[..., :num_out]
