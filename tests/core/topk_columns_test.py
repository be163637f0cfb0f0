"""Top-k of each column against top-k of the column alone, and a stable sort."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax.core.top_k import counting, topk_columns


def oracle(scores, k, among=None):
  """Column by column."""
  scores, mask = np.asarray(scores), np.zeros(scores.shape, bool)
  for j, count in enumerate(np.broadcast_to(k, scores.shape[-1:])):
    eligible = among if among is None else [among[..., j]]
    column = small.largest([scores[..., j]], int(count), eligible)
    mask[..., j] = column.reshape(scores.shape[:-1])
  return mask


def _shapes(generator):
  """A random shape: any rank, with axes of size 1 and of none."""
  return tuple(generator.integers(0, 7, generator.integers(1, 5)))


class TopKColumnsTest(parameterized.TestCase):
  @parameterized.product(
    dtype=(jnp.float32, jnp.bfloat16, jnp.float16), seed=tuple(range(5))
  )
  def test_equals_a_stable_sort_on_random_shapes_with_ties(self, dtype, seed):
    generator = np.random.default_rng(seed)
    shape = _shapes(generator)
    scores = jnp.asarray(generator.choice(small.ODD_NUMBERS, shape), dtype)
    among = generator.random(shape) < 0.7 if seed % 2 else None
    counts = generator.integers(-1, 9, shape[-1:])
    for k in (0, 3, 1000, jnp.asarray(counts, jnp.int32)):
      got = topk_columns.top_k_columns(scores, k, among)
      np.testing.assert_array_equal(got, oracle(scores, k, among))

  @parameterized.parameters((64, 8), (3, 3, 5, 6), (1, 7), (9, 1), (5,))
  def test_k_may_be_traced_and_differ_between_columns(self, *shape):
    generator = np.random.default_rng(0)
    scores = jnp.asarray(generator.normal(size=shape), jnp.float32)
    size = scores.size // shape[-1]
    counts = generator.integers(0, size + 1, shape[-1])
    for k in (jnp.asarray(counts, jnp.int32), jnp.int32(size // 2)):
      mask = jax.jit(topk_columns.top_k_columns)(scores, k)
      np.testing.assert_array_equal(mask, oracle(scores, k))

  @parameterized.parameters(True, False)
  def test_the_two_ways_to_count_agree(self, fused):
    """One is for arrays without shards, the other for all."""
    generator = np.random.default_rng(1)
    scores = jnp.asarray(generator.integers(0, 5, (3, 16, 9)), jnp.float32)
    among = jnp.asarray(generator.random(scores.shape) < 0.8)
    k = jnp.asarray(generator.integers(0, 49, 9), jnp.int32)
    got = topk_columns._mask(scores, k, among, fused=fused)
    np.testing.assert_array_equal(got, oracle(scores, k, among))

  def test_works_under_vmap_scan_and_grad(self):
    scores = jnp.asarray(
      np.random.default_rng(3).integers(0, 4, (5, 8, 3)), jnp.float32
    )
    k = jnp.arange(15).reshape(5, 3)
    masks = jax.jit(jax.vmap(topk_columns.top_k_columns))(scores, k)
    _, scanned = jax.lax.scan(
      lambda carry, x: (carry, topk_columns.top_k_columns(*x)), 0, (scores, k)
    )
    for lane in range(5):
      expected = oracle(scores[lane], k[lane])
      np.testing.assert_array_equal(masks[lane], expected)
      np.testing.assert_array_equal(scanned[lane], expected)
    kept = lambda x: jnp.where(topk_columns.top_k_columns(x, 2), x, 0.0).sum()
    grads = jax.grad(kept)(scores[0])
    np.testing.assert_array_equal(grads, oracle(scores[0], 2))

  @parameterized.parameters(
    (jnp.ones((2, 2), jnp.int32), 1, None, TypeError, 'scores must be float32'),
    (jnp.float32(1), 1, None, ValueError, 'must have columns, got a scalar'),
    (jnp.ones((2, 2)), 1.0, None, TypeError, 'k must be integers'),
    (jnp.ones((2, 2)), jnp.ones(3, int), None, ValueError, r'the 2 columns'),
    (jnp.ones((2, 2)), 1, jnp.ones(2, bool), ValueError, 'shapes of scores'),
    (jnp.ones((2, 2)), 1, jnp.ones((2, 2)), TypeError, 'among must be boolean'),
  )
  def test_bad_arguments_are_named(self, scores, k, among, error, message):
    with self.assertRaisesRegex(error, message):
      topk_columns.top_k_columns(scores, k, among)


def test_countdown_numbers_some_axes():
  like = jnp.zeros((2, 3, 4))
  got = counting.countdown(jnp.asarray(5, jnp.int32), like, (0, 1))
  expected = 5 - np.arange(6).reshape(2, 3, 1)
  np.testing.assert_array_equal(got, np.broadcast_to(expected, like.shape))
