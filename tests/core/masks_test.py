"""Tests of powerprop_jax.core.masks."""

import io
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
  def test_is_exact_for_every_percentage(self):
    for percent in range(100):
      for size in (1, 7, 17, 100, 1_000, 26_623_000):
        self.assertEqual(
          masks.num_kept(size, percent / 100), size - size * percent // 100
        )

  @parameterized.parameters(np.float32, np.float64, float)
  def test_reads_numbers_as_they_print(self, kind):
    self.assertEqual(masks.num_kept(100, kind(0.29)), 71)
    self.assertEqual(masks.num_kept(1_000, kind(0.9)), 100)

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


class MeasureTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_density_counts_entries_not_leaves(self):
    m = random_masks(0)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)])
    np.testing.assert_allclose(
      self.variant(masks.density)(m), flat.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(
      self.variant(masks.sparsity)(m), 1 - flat.mean(), rtol=1e-6
    )

  def test_density_of_selected_leaves(self):
    m = random_masks(0)
    m['linear']['b'] = jnp.zeros(3, bool)
    kept = int(m['linear']['w'].sum()) + int(m['conv']['w'].sum())
    np.testing.assert_allclose(
      masks.density(m, select=select.is_weight), kept / (35 + 72), rtol=1e-6
    )
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
    pairs = {
      'linear/w': (a['linear']['w'], b['linear']['w']),
      'conv/w': (a['conv']['w'], b['conv']['w']),
    }
    for path, (x, y) in pairs.items():
      x, y = np.ravel(x), np.ravel(y)
      leaf = found.leaves[path]
      np.testing.assert_allclose(leaf.agreement, (x == y).mean(), rtol=1e-6)
      np.testing.assert_allclose(leaf.intersection, y[x].mean(), rtol=1e-6)
    x, y = (
      np.concatenate([np.ravel(p[i]) for p in pairs.values()]) for i in range(2)
    )
    np.testing.assert_allclose(
      found.total.agreement, (x == y).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(found.total.intersection, y[x].mean(), rtol=1e-6)

  def test_overlap_with_itself_is_one(self):
    a = random_masks(0)
    chex.assert_trees_all_equal(
      masks.overlap(a, a), jax.tree.map(jnp.ones_like, masks.overlap(a, a))
    )
    nothing = {'w': jnp.zeros(4, bool)}
    self.assertEqual(float(masks.overlap(nothing, nothing).total[1]), 1.0)


class PackTest(parameterized.TestCase):
  def test_round_trip_is_exact(self):
    m = random_masks(0) | {
      'scalar': jnp.array(True),
      'none': np.ones((0, 3)) > 0,
    }
    packed = masks.pack_masks(m)
    unpacked = masks.unpack_masks(packed)
    chex.assert_trees_all_equal(unpacked, jax.tree.map(np.asarray, m))
    self.assertEqual(packed['conv']['w'].bits.nbytes, 9)
    self.assertEqual(packed['linear']['w'].bits.nbytes, 5)

  def test_survives_an_npz_file(self):
    m = random_masks(0)['conv']['w']
    file = io.BytesIO()
    np.savez(file, **masks.pack_masks(m)._asdict())
    file.seek(0)
    with np.load(file) as loaded:
      packed = masks.PackedMask(loaded['bits'], loaded['shape'])
    np.testing.assert_array_equal(masks.unpack_masks(packed), m)

  def test_bits_that_do_not_fit_are_an_error(self):
    packed = masks.PackedMask(np.zeros(2, np.uint8), np.array([3]))
    with self.assertRaisesRegex(ValueError, 'into 1 bytes, got 2'):
      masks.unpack_masks(packed)
