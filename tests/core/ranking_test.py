"""Masks from counts, alone and shared, against a sort in NumPy."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax.core.top_k import ranking

_SHAPES = {'a': (4, 3), 'b': (2, 5), 'c': (3, 3)}


def _tree(seed, largest, norm):
  rng = np.random.default_rng(seed)
  tree = {
    name: {'w': jnp.asarray(rng.integers(0, largest + 1, shape), norm.dtype)}
    for name, shape in _SHAPES.items()
  }
  return tree | {'norm': {'scale': norm}}


def _scores(seed):
  return _tree(seed, 3, jnp.ones(3))


class MasksFromCountsTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2, 3), has_among=(False, True))
  def test_equals_a_stable_sort_with_ties(self, seed, has_among):
    scores = _scores(seed)
    among = _tree(100 + seed, 1, jnp.ones(3, bool))
    everything = jax.tree.map(lambda s: np.ones(s.shape, bool), scores)
    eligible = among if has_among else everything
    counts = {'b/w': 2 + seed, ranking.SHARED: 3 * seed}
    given = {'among': among} if has_among else {}
    masks = ranking.masks_from_counts(scores, counts, **given)
    traced = jax.jit(ranking.masks_from_counts)(scores, counts, **given)
    chex.assert_trees_all_equal(traced, masks)
    for count, names in ((2 + seed, 'b'), (3 * seed, 'ac')):
      given = [[x[n]['w'] for n in names] for x in (scores, eligible)]
      expected = small.largest_of_all(given[0], count, given[1])
      for name, mask in zip(names, expected, strict=True):
        np.testing.assert_array_equal(masks[name]['w'], mask, err_msg=name)
    self.assertTrue(masks['norm']['scale'].all())

  @parameterized.parameters(
    ({'a/w': 1},),
    ({'a/w': 1, 'b/w': 1, 'c/w': 1, ranking.SHARED: 1},),
    ({'a/w': 1, 'typo/w': 1, ranking.SHARED: 1},),
    ({'norm/scale': 1, ranking.SHARED: 1},),
  )
  def test_counts_that_do_not_fit_name_the_leaves(self, counts):
    with self.assertRaisesRegex(ValueError, 'a/w, b/w, c/w.*same select'):
      ranking.masks_from_counts(_scores(0), counts)
