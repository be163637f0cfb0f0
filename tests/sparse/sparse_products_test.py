"""Every kernel of a sparse product: the numbers of a dense one."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax.sparse import convolution as sparse_convolution
from powerprop_jax.sparse import index as sparse_index
from powerprop_jax.sparse import (
  kernel_choice,
  linear,
  native,
  plain_convolution,
)
from powerprop_jax.sparse.plain_convolution import Window

_KERNELS = ('native', 'loops', 'dense')

# in, out, batch, density: tiles of every width, rows and columns of one, more
# columns than are packed at once, empty rows and columns, nothing, everything.
_SHAPES = {
  'square': (64, 64, 64, 0.1),
  'tiles of 64, 32 and 4': (40, 33, 99, 0.2),
  'tile of 16': (17, 50, 13, 0.3),
  'vector': (600, 70, 1, 0.05),
  'one input': (1, 20, 5, 0.5),
  'one output': (30, 1, 7, 0.5),
  'one weight': (1, 1, 1, 1.0),
  'wide': (1300, 20, 3, 0.01),
  'mostly empty': (50, 60, 9, 0.005),
  'empty': (5, 6, 4, 0.0),
  'full': (20, 30, 65, 1.0),
}
_ROOMY = ('square', 'vector', 'mostly empty', 'full')


def _skip_without(kernel):
  if kernel == 'native' and not native.is_available():
    pytest.skip(f'no compiled kernels: {native.status()}')


def _draw(num_in, num_out, num_vectors, density):
  random = np.random.default_rng(0)
  mask = random.random((num_in, num_out)) < density
  w = np.where(mask, random.standard_normal(mask.shape), 0).astype(np.float32)
  index = sparse_index.from_positions(np.flatnonzero(mask.T), mask.shape)
  x = random.standard_normal((num_vectors, num_in)).astype(np.float32)
  dy = random.standard_normal((num_vectors, num_out)).astype(np.float32)
  return mask, w, index, x, dy


def _close(found, expected):
  scale = max(np.abs(expected).max(initial=0), 1)
  np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=1e-5)


# images, channels out, kernel, stride, pads
_CONVOLUTIONS = {
  'plain': ((3, 9, 9, 16), 16, (3, 3), 1, 'SAME'),
  'stride': ((5, 8, 6, 3), 17, (3, 3), 2, 'SAME'),
  'valid, not square': ((2, 9, 9, 20), 5, (5, 3), 2, 'VALID'),
  'small images side by side': ((70, 4, 4, 33), 34, (3, 3), 1, 'SAME'),
  'large kernel': ((2, 11, 13, 5), 3, (7, 7), 2, 'SAME'),
  'even kernel, stride 3': ((2, 10, 10, 3), 4, (2, 2), 3, 'VALID'),
  'stride beyond the kernel': ((1, 5, 5, 2), 1, (1, 1), 2, 'SAME'),
  'rows left over': ((2, 12, 12, 3), 4, (3, 3), 3, 'VALID'),
  'one pixel': ((1, 1, 1, 1), 1, (1, 1), 1, 'SAME'),
  'pads of its own': ((2, 6, 6, 3), 2, (3, 3), 1, ((2, 0), (0, 3))),
  'cut off': ((9, 7, 6, 3), 2, (3, 2), 1, ((-1, 0), (0, -2))),
  'cut off, stride': ((3, 9, 8, 3), 2, (3, 3), 2, ((-2, 1), (-1, -2))),
  'many images': ((37, 6, 11, 3), 5, (3, 3), 2, 'SAME'),
}


def test_gradients_of_a_plain_convolution_can_be_differentiated_again():
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
  w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
  pads = ((1, 1), (1, 1))
  window = Window(3, 3, 1, pads)

  def norm_of_gradient(convolve):
    loss = lambda w: jnp.sum(jnp.sin(convolve(w)))
    return jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(w)

  ours = lambda w: plain_convolution.convolve(x, w, window)
  plain = lambda w: small.conv(x, w, 1, pads)
  chex.assert_trees_all_close(
    *map(norm_of_gradient, (ours, plain)), rtol=1e-3, atol=1e-3
  )


class SparseProductsTest(parameterized.TestCase):
  @parameterized.parameters(*_SHAPES.values())
  def test_the_two_ways_to_make_one_agree(self, *shape):
    mask, _, index, _, _ = _draw(*shape)
    size = int(mask.sum())
    make = jax.jit(sparse_index.from_mask, static_argnums=1)
    chex.assert_trees_all_equal(make(mask, size), index)
    # With room to spare, the connections come first.
    roomy = make(mask, size + 3)
    assert roomy.positions.size == size + 3
    chex.assert_trees_all_equal(
      jax.tree.map(lambda wide, x: wide[: x.size], roomy, index), index
    )

  @parameterized.product(shape=tuple(_SHAPES), room=(0, 3))
  @pytest.mark.slow
  def test_connections_go_into_a_dense_matrix_and_back(self, shape, room):
    mask, w, _, _, _ = _draw(*_SHAPES[shape])
    index = sparse_index.from_mask(jnp.asarray(mask), int(mask.sum()) + room)
    values = np.concatenate([w.T[mask.T], np.zeros(room, np.float32)])
    found = linear.gather(jnp.asarray(w), index)
    np.testing.assert_array_equal(found, values)
    # What lies in room that is not used goes nowhere.
    found = found.at[len(values) - room :].set(7.0)
    np.testing.assert_array_equal(linear.scatter(found, index), w)

  @parameterized.product(kernel=_KERNELS, shape=tuple(_SHAPES))
  @pytest.mark.slow
  def test_equals_the_dense_product_and_its_gradients(self, kernel, shape):
    _skip_without(kernel)
    mask, w, index, x, dy = _draw(*_SHAPES[shape])
    values, size = jnp.asarray(w.T[mask.T]), int(mask.sum())
    if shape in _ROOMY:  # What lies in room that is not used changes nothing.
      index = sparse_index.from_mask(jnp.asarray(mask), size + 5)
      values = jnp.concatenate([values, jnp.full(5, 7.0)])
    multiply = jax.jit(functools.partial(linear.product, kernel=kernel))
    y, pull_back = jax.vjp(lambda x, v: multiply(x, v, index), x, values)
    to_x, to_values = pull_back(jnp.asarray(dy))
    _close(y, x @ w)
    _close(to_x, dy @ w.T)
    _close(to_values[:size], (x.T @ dy).T[mask.T])
    np.testing.assert_array_equal(to_values[size:], 0)
    np.testing.assert_array_equal(linear.dense(values, index), w)

  @parameterized.product(
    kernel=_KERNELS, dtype=(jnp.bfloat16, jnp.float16, jnp.float32)
  )
  def test_half_precision_sums_are_made_in_full(self, kernel, dtype):
    _skip_without(kernel)
    index = sparse_index.from_positions(np.arange(4096), (4096, 1))
    values, x = jnp.ones(4096, dtype), jnp.ones((2, 4096), dtype)
    y, pull_back = jax.vjp(
      lambda x, v: linear.product(x, v, index, kernel), x, values
    )
    to_x, to_values = pull_back(jnp.ones_like(y))
    assert y.dtype == to_x.dtype == to_values.dtype == dtype
    np.testing.assert_array_equal(y, 4096)
    np.testing.assert_array_equal(to_values, 2)

  @parameterized.parameters(*_KERNELS)
  def test_leading_axes_and_vmap(self, kernel):
    _skip_without(kernel)
    mask, w, index, _, _ = _draw(12, 7, 1, 0.4)
    x = np.random.default_rng(1).standard_normal((3, 2, 12))
    x = x.astype(np.float32)
    values = jnp.asarray(w.T[mask.T])
    multiply = lambda x: linear.product(x, values, index, kernel)
    _close(multiply(x), x @ w)
    _close(jax.vmap(multiply)(x), x @ w)
    assert multiply(x[:0]).shape == (0, 2, 7)

  @parameterized.parameters(*_KERNELS)
  def test_what_is_not_finite_stays_so(self, kernel):
    _skip_without(kernel)
    index = sparse_index.from_positions(np.arange(4), (2, 2))
    values = jnp.array([1.0, 1.0, 0.0, 1.0])
    x = jnp.array([[jnp.inf, 1.0], [jnp.nan, 1.0]])
    y = linear.product(x, values, index, kernel)
    np.testing.assert_array_equal(y[0], [np.inf, np.nan])
    assert np.isnan(y[1]).all()

  @parameterized.parameters(
    (3, 4, 'loops', 'do not fit a matrix'),
    (2, 3, 'loops', 'do not fit a matrix'),
    (2, 4, 'fast', "kernel must be .* got 'fast'"),
  )
  def test_bad_input_is_refused(self, num_in, num_values, kernel, message):
    index = sparse_index.from_positions(np.arange(4), (2, 2))
    x, values = jnp.ones((1, num_in)), jnp.ones(num_values)
    with pytest.raises(ValueError, match=message):
      linear.product(x, values, index, kernel)

  @parameterized.product(case=tuple(_CONVOLUTIONS), density=(0.0, 0.2, 1.0))
  @pytest.mark.slow
  def test_equals_the_dense_convolution_and_its_gradients(self, case, density):
    _skip_without('native')
    images, num_out, kernel, stride, pads = _CONVOLUTIONS[case]
    if isinstance(pads, str):
      strides = (stride, stride)
      pads = jax.lax.padtype_to_pads(images[1:3], kernel, strides, pads)
    window = Window(*kernel, stride, tuple(map(tuple, pads)))
    random = np.random.default_rng(0)
    shape = (*kernel, images[-1], num_out)
    mask = random.random(shape) < density
    w = np.where(mask, random.standard_normal(shape), 0).astype(np.float32)
    by_output = lambda w: jnp.moveaxis(w, -1, 0)[np.moveaxis(mask, -1, 0)]
    index = sparse_index.from_positions(
      np.flatnonzero(np.moveaxis(mask, -1, 0)),
      (int(np.prod(shape[:-1])), num_out),
    )
    x = random.standard_normal(images).astype(np.float32)
    expected, expected_back = jax.vjp(
      lambda x, w: plain_convolution.convolve(x, w, window),
      x,
      jnp.asarray(w),
    )
    convolve = lambda x, v: sparse_convolution.convolve(x, v, index, window)
    y, pull_back = jax.vjp(convolve, x, by_output(w))
    dy = random.standard_normal(expected.shape).astype(np.float32)
    to_x, to_values = pull_back(jnp.asarray(dy))
    expected_x, expected_w = expected_back(jnp.asarray(dy))
    _close(convolve(x, by_output(w)), expected)
    _close(y, expected)
    _close(to_x, expected_x)
    _close(to_values, by_output(expected_w))

  def test_few_connections_take_fast_kernels(self):
    few = kernel_choice.Task(512, 512, 2_000, 128)
    many = few._replace(num_connections=200_000)
    assert kernel_choice.choose(many) == 'dense'
    assert not kernel_choice.pays(many)
    for kernels in (_KERNELS, ('loops', 'dense')):
      with kernel_choice.use(*kernels):
        assert kernel_choice.choose(few) != 'dense' and kernel_choice.pays(few)
        assert not kernel_choice.pays(few._replace(num_vectors=1))
    with kernel_choice.use('native', 'loops'):
      assert kernel_choice.choose(many) == (
        'native' if native.is_available() else 'loops'
      )

  def test_only_what_the_context_allows(self):
    few = kernel_choice.Task(512, 512, 2_000, 128)
    for kernel in ('loops', 'dense'):
      with kernel_choice.use(kernel):
        assert kernel_choice.choose(few) == kernel
    with kernel_choice.use('native', 'dense'):
      # There is no compiled kernel for what is not float32.
      assert kernel_choice.choose(few._replace(dtype='float64')) == 'dense'
    with kernel_choice.use('loops', 'dense'):
      assert kernel_choice.choose(few._replace(is_convolution=True)) == 'dense'
    for given, message in ((('fast',), "got 'fast'"), ((), 'got none')):
      use = kernel_choice.use(*given)
      with pytest.raises(ValueError, match=message), use:
        pass
