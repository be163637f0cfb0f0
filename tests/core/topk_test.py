"""Tests of powerprop_jax.core.top_k.topk."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax.core.top_k import topk

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def flatten(masks):
  return np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(masks)])


def random_leaves(generator, num_leaves):
  leaves = []
  for _ in range(num_leaves):
    shape = generator.integers(0, 6, generator.integers(0, 4))
    values = generator.choice(small.ODD_NUMBERS, tuple(shape))
    leaves.append(jnp.asarray(values, DTYPES[generator.integers(3)]))
  return leaves


class TopKMaskTest(parameterized.TestCase):
  @parameterized.parameters(*DTYPES)
  def test_numbers_of_all_bits_keep_their_place(self, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    if dtype == jnp.float32:
      bits = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32)
    scores = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    for k in (1, 700, 2**15, 2**15 + 3, 65_000):
      mask = topk.top_k_mask(scores, k)
      np.testing.assert_array_equal(mask, small.largest([scores], k))

  def test_subnormals_are_not_ties(self):
    scores = jnp.asarray(np.array([1e-45, 3e-45, -1e-45, 0.0], np.float32))
    np.testing.assert_array_equal(topk.top_k_mask(scores, 1), [0, 1, 0, 0])
    np.testing.assert_array_equal(topk.top_k_mask(scores, 3), [1, 1, 0, 1])

  def test_scalars_empty_arrays_and_empty_trees(self):
    self.assertTrue(topk.top_k_mask(jnp.float32(3), 1))
    self.assertFalse(topk.top_k_mask(jnp.float32(3), 0))
    self.assertEqual(topk.top_k_mask(jnp.zeros((2, 0)), 0).shape, (2, 0))
    self.assertEqual(topk.top_k_masks({}, 0), {})
    np.testing.assert_array_equal(topk.top_k_mask(np.ones(2, 'f'), 1), [1, 0])

  def test_traced_k_is_clipped_and_compiles_once(self):
    mask_of = jax.jit(chex.assert_max_traces(topk.top_k_mask, n=1))
    for k, expected in ((-3, [0, 0]), (9, [1, 1]), (1, [0, 1])):
      mask = mask_of(jnp.array([1.0, 2.0]), k)
      np.testing.assert_array_equal(mask, expected)

  def test_vmap_has_a_k_for_each_lane(self):
    generator = np.random.default_rng(0)
    scores = jnp.asarray(generator.integers(0, 4, (5, 3, 8)), jnp.float32)
    k = jnp.array([0, 1, 7, 23, 24])
    masks = jax.jit(jax.vmap(topk.top_k_mask))(scores, k)
    for lane in range(5):
      (expected,) = small.largest_of_all([scores[lane]], int(k[lane]))
      np.testing.assert_array_equal(masks[lane], expected)

  def test_works_in_scan_and_cond_and_under_grad(self):
    scores = jnp.arange(6.0)
    largest = lambda x, k: jnp.where(topk.top_k_mask(x, k), x, 0.0).sum()
    body = lambda carry, k: (
      carry,
      jax.lax.cond(k > 2, largest, lambda *_: 0.0, carry, k),
    )
    _, sums = jax.lax.scan(body, scores, jnp.arange(6))
    np.testing.assert_array_equal(sums, [0, 0, 0, 12, 14, 15])
    grads = jax.jit(jax.grad(largest))(scores, 2)
    np.testing.assert_array_equal(grads, [0, 0, 0, 0, 1, 1])

  @pytest.mark.slow
  def test_counts_exactly_beyond_float32(self):
    size = 2**24 + 3
    mask = np.asarray(topk.top_k_mask(jnp.ones(size), size - 1))
    self.assertEqual(mask.sum(), size - 1)
    self.assertFalse(mask[-1])

  @parameterized.parameters(
    (jnp.arange(3), 1, None, TypeError, 'got int32'),
    (jnp.ones(4), -1, None, ValueError, 'size = 4.* got -1'),
    (jnp.ones(4), 5, None, ValueError, 'size = 4.* got 5'),
    (jnp.ones(4), 0.5, None, TypeError, 'k must be an integer'),
    (jnp.ones((2, 2)), 1, jnp.ones(4, bool), ValueError, r'got \(4,\)'),
    (jnp.ones(4), 1, jnp.ones(4), TypeError, 'among must be boolean'),
    ({'a': jnp.ones(4)}, 1, [jnp.ones(4, bool)], ValueError, 'structure'),
  )
  def test_bad_arguments_are_named(self, scores, k, among, error, message):
    with self.assertRaisesRegex(error, message):
      topk.top_k_masks(scores, k, among)

  def test_more_entries_than_int32_counts_are_refused(self):
    big = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with self.assertRaisesRegex(ValueError, '2,147,483,648'):
      jax.eval_shape(lambda x: topk.top_k_mask(x, 1), big)


class TopKMasksTest(parameterized.TestCase):
  # Both ways of counting: the fused one serves arrays on one device, the other
  # traced arrays where there are several.
  @parameterized.product(fused=(True, False), has_among=(True, False))
  def test_equals_a_stable_sort_of_the_whole_tree(self, fused, has_among):
    generator = np.random.default_rng(0)
    masks_of = topk.top_k_masks if fused else jax.jit(topk.top_k_masks)
    for _ in range(8):
      leaves = random_leaves(generator, generator.integers(1, 4))
      among = [jnp.asarray(generator.random(x.shape) < 0.5) for x in leaves]
      given = [among] if has_among else []
      size = sum(leaf.size for leaf in leaves)
      for k in (0, int(generator.integers(size + 1)), size):
        masks = masks_of(leaves, jnp.asarray(k, jnp.int32), *given)
        expected = small.largest_of_all(leaves, k, *given)
        chex.assert_trees_all_equal(masks, expected)
        if not has_among:
          chex.assert_trees_all_equal(topk.top_k_masks(leaves, k), expected)

  def test_many_ties_in_larger_trees(self):
    generator = np.random.default_rng(2)
    shapes = ((64, 50), (3, 3, 8, 16), (640,), (7,))
    leaves = [generator.integers(0, 9, s).astype(np.float32) for s in shapes]
    for k in (1, 100, 2_000, 4_998):
      masks = topk.top_k_masks(leaves, k)
      np.testing.assert_array_equal(flatten(masks), small.largest(leaves, k))
