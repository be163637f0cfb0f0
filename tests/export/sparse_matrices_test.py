"""Weights as sparse matrices: products against NumPy, and round trips."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.export import sparse_matrices, sparse_mlp
from powerprop_jax.export.sparse_matrices import Rows

FORMS = ['csr', 'bcsr']
SHAPES = [(7, 5), (1, 1), (1, 9), (9, 1), (3, 3, 2, 4), (2, 3, 4)]


def draw(seed, shape, density, dtype=np.float32):
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < density
  return rng.standard_normal(shape).astype(dtype), mask


def make(form, weight, mask):
  return getattr(sparse_matrices, form)(weight, mask)


class MatrixTest:
  @pytest.mark.parametrize('form', FORMS)
  @pytest.mark.parametrize('shape', SHAPES)
  @pytest.mark.parametrize('density', [0.0, 0.3, 1.0])
  def test_multiplies_features_first_and_comes_back(self, form, shape, density):
    weight, mask = draw(0, shape, density)
    weight.flat[0] = 0.0  # a connection may have the weight zero
    matrix, theta = make(form, weight, mask), np.where(mask, weight, 0)
    found, kept = sparse_matrices.dense(matrix, shape)
    np.testing.assert_array_equal(kept, mask)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, theta)
    num_in = weight.size // shape[-1]
    for batch in ((), (6,)):
      x = np.random.default_rng(2).standard_normal((num_in, *batch), np.float32)
      expected = theta.reshape(num_in, -1).T @ x
      np.testing.assert_allclose(matrix @ x, expected, rtol=1e-5, atol=1e-5)

  def test_half_precision_stays_in_jax_and_double_in_scipy(self):
    for dtype in (jnp.bfloat16, np.float16):
      weight, mask = draw(3, (6, 4), 0.5, dtype)
      for form, expected in (('bcsr', dtype), ('csr', 'f4')):
        matrix = make(form, weight, mask)
        assert matrix.dtype == np.dtype(expected)
        found, _ = sparse_matrices.dense(matrix, weight.shape)
        np.testing.assert_array_equal(found.astype(dtype), weight * mask)

    weight, mask = draw(4, (3, 2), 1.0, np.float64)
    with pytest.raises(ValueError, match='round float64 to float32'):
      make('bcsr', weight, mask)
    assert make('csr', weight, mask).dtype == np.float64

  @pytest.mark.parametrize('form', FORMS)
  def test_masks_and_shapes_that_do_not_fit_are_refused(self, form):
    weight, mask = draw(5, (4, 3), 0.5)
    with pytest.raises(ValueError, match='same structure and shapes'):
      make(form, weight, mask.T)
    with pytest.raises(ValueError, match='two axes or more'):
      make(form, weight[0], mask[0])
    for shape in ((3, 4), (5, 3), (2, 2)):
      full = np.ones((4, 3), bool)
      with pytest.raises(ValueError, match='not those of a weight of shape'):
        sparse_matrices.dense(make(form, weight, full), shape)

  @pytest.mark.parametrize(
    'found',
    [
      (2, [0, 0], [0, 2]),  # twice the same
      *((1, [5], [0, 1]), (1, [-1], [0, 1])),
      *((2, [0], [0, 1]), (1, [0], [0, 2]), (1, [0], [1, 1])),
    ],
  )
  def test_impossible_rows_are_refused(self, found):
    num, columns, starts = found
    rows = Rows(np.ones(num), np.array(columns), np.array(starts))
    with pytest.raises(ValueError, match=r'weight of shape \(3, 1\)'):
      sparse_matrices.from_rows(rows, (3, 1))


def layers(widths, density, dtype=np.float32):
  theta, masks = {}, {}
  for number, shape in enumerate(itertools.pairwise(widths)):
    name = f'net/linear_{number}' if number < len(widths) - 2 else 'net/logits'
    weight, mask = draw(number, shape, density, dtype)
    theta[name] = {'w': np.where(mask, weight, np.zeros((), dtype))}
    masks[name] = {'w': mask}
    if number != 1:
      theta[name]['b'] = draw(9 + number, shape[1:], 1.0, dtype)[0]
      masks[name]['b'] = np.ones(shape[1:], bool)
  return theta, masks


def oracle(theta, x):
  x = x.reshape(len(x), -1).astype(np.float64)
  for number, leaves in enumerate(theta.values()):
    x = np.maximum(x, 0) if number else x
    x = x @ leaves['w'].astype(np.float64)
    x += leaves.get('b', np.zeros(1)).astype(np.float64)
  return x


class SparseMLPTest:
  @pytest.mark.parametrize('batch', [1, 2, 7])
  @pytest.mark.parametrize(
    ('density', 'dtype'),
    [
      *((d, np.float32) for d in (0.0, 0.1, 0.5, 1.0)),
      *((0.15, d) for d in (np.float16, jnp.bfloat16, np.float64)),
    ],
  )
  def test_computes_what_numpy_does(self, batch, density, dtype):
    theta, masks = layers((12, 9, 7, 1, 4), density, dtype)
    shape = (batch, 2, 3, 2)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    before = x.copy()
    logits = sparse_mlp.from_params(theta, masks)(x)
    assert logits.shape == (batch, 4)
    if dtype == np.float32:
      assert logits.dtype == dtype
    np.testing.assert_allclose(logits, oracle(theta, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, before)

  def test_order_is_natural(self):
    widths = tuple(range(14, 1, -1))
    theta, masks = layers(widths, 1.0)
    shuffled = {name: theta[name] for name in sorted(theta)}
    assert list(shuffled) != list(theta)
    x = np.random.default_rng(0).standard_normal((2, 14))
    np.testing.assert_allclose(
      sparse_mlp.from_params(shuffled, masks)(x), oracle(theta, x), rtol=1e-4
    )

  def test_other_networks_are_told_apart(self):
    theta, masks = layers((6, 5, 3), 0.5)
    assert sparse_mlp.is_mlp(theta, {})
    assert not sparse_mlp.is_mlp(theta, {'norm': {'average': np.ones(3)}})
    assert not sparse_mlp.is_mlp({}, {})
    name = next(iter(theta))
    for other in (
      theta | {name: {'w': np.ones((3, 3, 1, 6))}},
      theta | {name: theta[name] | {'transform_scale': np.ones(())}},
      theta | {name: {'w': np.ones((6, 4))}},
    ):
      assert not sparse_mlp.is_mlp(other, {})
      with pytest.raises(ValueError, match='not fully connected layers'):
        sparse_mlp.from_params(other, masks)
