"""Tests of powerprop_jax.core.masks."""

import math

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.core import masks, select


def random_masks(seed, density=0.5):
  generator = np.random.default_rng(seed)
  shapes = {'linear': {'w': (5, 7), 'b': (3,)}, 'conv': {'w': (3, 3, 2, 4)}}
  return jax.tree.map(
    lambda s: jnp.asarray(generator.random(s) < density),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


class NumKeptTest(parameterized.TestCase):
  @parameterized.parameters(np.float32, np.float64, float)
  def test_is_exact_for_every_percentage(self, kind):
    for percent in range(100):
      for size in (1, 7, 17, 100, 1_000, 26_623_000):
        kept = masks.num_kept(size, kind(percent / 100))
        self.assertEqual(kept, size - size * percent // 100)

  def test_leaves_one_weight_at_least(self):
    for sparsity in (1 - 1e-13, 1 - 1e-16, 0.999999):
      self.assertEqual(masks.num_kept(100, sparsity), 1)
      self.assertEqual(masks.num_kept(1, sparsity), 1)
    self.assertEqual(masks.num_kept(0, 0.5), 0)
    self.assertEqual(masks.num_kept(3, 0), 3)
    self.assertEqual(masks.num_kept(10**9, 1e-9), 10**9 - 1)

  def test_reads_fractions_as_they_are_meant(self):
    for size in range(1, 60):
      for removed in range(size):
        kept = masks.num_kept(size, removed / size)
        self.assertEqual(kept, size - removed)

  @parameterized.parameters(1.0, -0.1, math.nan, math.inf, 90)
  def test_refuses_other_sparsities_by_value(self, value):
    with self.assertRaisesRegex(ValueError, f'sparsity must be .* got {value}'):
      masks.num_kept(10, value)


class CombineTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_apply_keeps_dtypes_and_kills_nans(self):
    tree = {'w': jnp.array([jnp.nan, 2], jnp.bfloat16), 'n': jnp.array([3, 4])}
    mask = {'w': jnp.array([False, True]), 'n': jnp.array([True, False])}
    masked = self.variant(masks.apply_masks)(tree, mask)
    chex.assert_trees_all_equal(
      masked, {'w': jnp.array([0, 2], jnp.bfloat16), 'n': jnp.array([3, 0])}
    )
    chex.assert_trees_all_equal_dtypes(masked, tree)

  def test_full_masks_change_nothing(self):
    tree = {'w': jnp.arange(6.0).reshape(2, 3), 'b': jnp.zeros(())}
    full = masks.full_masks(tree)
    chex.assert_trees_all_equal(masks.apply_masks(tree, full), tree)
    self.assertEqual(float(masks.density(full)), 1.0)

  def test_set_operations_agree_with_numpy(self):
    a, b = random_masks(0), random_masks(1)
    for ours, theirs in (
      (masks.intersect, np.logical_and),
      (masks.union, np.logical_or),
      (masks.difference, np.greater),
    ):
      chex.assert_trees_all_equal(ours(a, b), jax.tree.map(theirs, a, b))

  def test_shape_and_structure_mismatches_name_the_leaf(self):
    tree = {'linear': {'w': jnp.ones((2, 2))}}
    with self.assertRaisesRegex(ValueError, r"'linear/w' is \(2, 2\) .*\(2,\)"):
      masks.apply_masks(tree, {'linear': {'w': jnp.ones(2, bool)}})
    with self.assertRaisesRegex(ValueError, "'linear/w' is .* nothing in b"):
      masks.union(masks.full_masks(tree), {})


def joined(*leaves):
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


class MeasureTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_density_counts_entries_not_leaves(self):
    m = random_masks(0)
    density, sparsity = self.variant(
      lambda m: (masks.density(m), masks.sparsity(m))
    )(m)
    share = joined(*jax.tree.leaves(m)).mean()
    np.testing.assert_allclose((density, sparsity), (share, 1 - share), 1e-6)
    share = joined(m['linear']['w'], m['conv']['w']).mean()
    density = masks.density(m, select=select.is_weight)
    np.testing.assert_allclose(density, share, rtol=1e-6)
    with self.assertRaisesRegex(ValueError, 'linear/b'):
      masks.density(m, select=select.by_regex('nothing'))

  @pytest.mark.slow
  def test_more_than_two_to_the_31_entries(self):
    block = jnp.arange(2**22) % 4 == 0
    many = {str(i): block for i in range(520)}
    assert masks.density(many) == 0.25
    total = masks.overlap(many, many).total
    assert (total.agreement, total.intersection) == (1, 1)
    # A leaf of that size is not counted in int32 either.
    shape = jax.ShapeDtypeStruct((2**20, 2**12), bool)
    jax.eval_shape(masks.density, {'w': shape})
    long = jax.ShapeDtypeStruct((2**32,), bool)
    counts = str(jax.make_jaxpr(masks.density)({'w': long}))
    assert 'bool[1073741824]' in counts  # in parts that int32 can count
    jax.eval_shape(masks.overlap, {'w': shape}, {'w': shape})

  def test_density_without_entries_is_one(self):
    self.assertEqual(float(masks.density({})), 1.0)
    self.assertEqual(float(masks.sparsity({'w': jnp.ones((0, 2), bool)})), 0.0)

  def test_overlap_agrees_with_numpy(self):
    a, b = random_masks(0), random_masks(1)
    found = masks.overlap(a, b, select=select.is_weight)
    self.assertCountEqual(found.leaves, ['linear/w', 'conv/w'])
    for overlap, names in (
      (found.leaves['linear/w'], ['linear']),
      (found.leaves['conv/w'], ['conv']),
      (found.total, ['linear', 'conv']),
    ):
      x, y = (joined(*(m[name]['w'] for name in names)) for m in (a, b))
      np.testing.assert_allclose(overlap, ((x == y).mean(), y[x].mean()), 1e-6)

  def test_overlap_with_itself_is_one(self):
    a = random_masks(0)
    chex.assert_trees_all_equal(
      masks.overlap(a, a), jax.tree.map(jnp.ones_like, masks.overlap(a, a))
    )
    nothing = {'w': jnp.zeros(4, bool)}
    self.assertEqual(float(masks.overlap(nothing, nothing).total[1]), 1.0)


class PackTest(parameterized.TestCase):
  def test_round_trip_is_exact(self):
    odd = {'scalar': jnp.array(True), 'none': np.ones((0, 3)) > 0}
    m = random_masks(0) | odd
    packed = masks.pack_masks(m)
    unpacked = masks.unpack_masks(packed)
    chex.assert_trees_all_equal(unpacked, jax.tree.map(np.asarray, m))
    self.assertEqual(packed['conv']['w'].bits.nbytes, 9)
    self.assertEqual(packed['linear']['w'].bits.nbytes, 5)

  def test_bits_that_do_not_fit_are_an_error(self):
    packed = masks.PackedMask(np.zeros(2, np.uint8), np.array([3]))
    with self.assertRaisesRegex(ValueError, 'into 1 bytes, got 2'):
      masks.unpack_masks(packed)
