"""Tests of powerprop_jax.core.scores."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax.core import scores


class ScoresTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_formulas(self):
    theta, grads = (small.normal({'a': {'w': (4, 3)}}, seed) for seed in (0, 1))
    a, b = (np.asarray(tree['a']['w']) for tree in (theta, grads))
    for fn, args, expected in (
      (scores.magnitude, (theta,), np.abs(a)),
      (scores.gradient, (grads,), np.abs(b)),
      (scores.saliency, (theta, grads), np.abs(a * b)),
    ):
      found = self.variant(fn)(*args)
      chex.assert_trees_all_close(found, {'a': {'w': expected}}, rtol=1e-6)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_are_float32_for_half_precision(self, dtype):
    theta = {'w': jnp.array([3e-4, -2.0], dtype), 's': jnp.array(1.0, dtype)}
    for score in (
      scores.magnitude(theta),
      scores.gradient(theta),
      scores.saliency(theta, theta),
      scores.random(jax.random.key(0), theta),
    ):
      chex.assert_trees_all_equal_shapes(score, theta)
      self.assertTrue(all(x.dtype == jnp.float32 for x in score.values()))
    # The square of 3e-4 is 0 in float16.
    self.assertGreater(float(scores.saliency(theta, theta)['w'][0]), 8e-8)

  def test_random_scores_differ_between_leaves_and_keys(self):
    theta = {'a': jnp.zeros(50), 'b': jnp.zeros(50)}
    draw = scores.random(jax.random.key(0), theta)
    again = scores.random(jax.random.key(0), theta)
    other = scores.random(jax.random.key(1), theta)
    chex.assert_trees_all_equal(draw, again)
    self.assertFalse(np.array_equal(draw['a'], draw['b']))
    self.assertFalse(np.array_equal(draw['a'], other['a']))

  def test_different_shapes_name_the_leaf(self):
    theta = small.normal({'linear': {'w': (4, 3)}})
    with self.assertRaisesRegex(ValueError, "'linear/w' is .* in grads"):
      scores.saliency(theta, {'linear': {'w': jnp.ones(3)}})
    with self.assertRaises(ValueError):
      scores.saliency(theta, {})
