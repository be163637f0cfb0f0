"""Masks at initialisation: counts, steps, what is refused, and training."""

import itertools

from absl.testing import parameterized
import chex
import digits_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.prune import at_init, one_shot

SIZES = (6, 10, 8, 4)


def random_mlp(seed=0):
  shapes = enumerate(itertools.pairwise(SIZES))
  layers = {f'linear_{i}': {'w': s, 'b': s[1:]} for i, s in shapes}
  return small.normal(layers, seed)


def random_batch(seed=1):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(16, SIZES[0])).astype(np.float32)
  return images, rng.integers(0, SIZES[-1], 16)


def logits_of(theta, images):
  x = images
  for name in sorted(theta)[:-1]:
    x = jax.nn.relu(x @ theta[name]['w'] + theta[name]['b'][None])
  last = theta[sorted(theta)[-1]]
  return x @ last['w'] + last['b'][None]


LOSS = at_init.classification_loss(logits_of)
BATCHES = [random_batch(1), random_batch(2)]
SHAPE = (1, SIZES[0])
METHODS = ('iterative_snip', 'force', 'synflow')


def in_steps(method, theta, sparsity, **settings):
  if method == 'synflow':
    return at_init.synflow_masks(logits_of, theta, SHAPE, sparsity, **settings)
  return getattr(at_init, method)(LOSS, theta, BATCHES, sparsity, **settings)


def num_kept(masks):
  return {name: int(masks[name]['w'].sum()) for name in sorted(masks)}


def oracle_in_steps(theta, final, steps, revives):
  """The methods with SNIP's score, sorted in NumPy."""
  kept, size = masks_lib.full_masks(theta), 60 + 80 + 32
  for step in range(steps):
    count = round(size * (final / size) ** ((step + 1) / steps))
    pruned = masks_lib.apply_masks(theta, kept)
    grads = at_init.mean_gradient(LOSS, pruned, BATCHES)
    names = sorted(theta)
    scores = [jnp.abs(theta[n]['w'] * grads[n]['w']) for n in names]
    among = None if revives else [kept[n]['w'] for n in names]
    new = small.largest_of_all(scores, count, among)
    for name, mask in zip(names, new, strict=True):
      kept = {**kept, name: {**kept[name], 'w': jnp.asarray(mask)}}
  return kept


class InStepsTest(parameterized.TestCase):
  @parameterized.product(
    method=METHODS,
    sparsity=(0.0, 0.5, 0.9),
    schedule=('exponential', 'linear'),
    scope=('global', 'layer'),
  )
  def test_keep_exactly_as_many_as_prune(
    self, method, sparsity, schedule, scope
  ):
    theta = random_mlp()
    masks = in_steps(
      method, theta, sparsity, steps=4, schedule=schedule, scope=scope
    )
    expected = one_shot.prune(theta, sparsity, scope=scope)
    counts, others = num_kept(masks), num_kept(expected)
    if scope == 'layer':
      self.assertEqual(counts, others)
    self.assertEqual(sum(counts.values()), sum(others.values()))
    for leaves in masks.values():
      self.assertTrue(bool(jnp.all(leaves['b'])))

  @parameterized.parameters('iterative_snip', 'force')
  def test_one_step_is_snip(self, method):
    theta = random_mlp()
    snip = at_init.masks_from_scores(at_init.snip(LOSS, theta, BATCHES), 0.8)
    chex.assert_trees_all_equal(in_steps(method, theta, 0.8, steps=1), snip)

  @parameterized.product(revives=(False, True), seed=(0, 1))
  def test_agree_with_sorting(self, revives, seed):
    theta = random_mlp(seed)
    method = 'force' if revives else 'iterative_snip'
    masks = in_steps(method, theta, 0.8, steps=5)
    chex.assert_trees_all_equal(masks, oracle_in_steps(theta, 35, 5, revives))

  def test_weights_return_with_force_only(self):
    # The first step keeps weights 0 and 1, the second has a use for 2.
    inputs = jnp.array([[[8.0, 4.0, 2.0, 1.0]], [[1.0, 2.0, 8.0, 4.0]]])
    loss_fn = lambda theta, x: jnp.mean((x @ theta['a']['w']) ** 2)
    batches = lambda step: [(inputs[step],)]
    theta = {'a': {'w': jnp.ones((4, 1))}}
    for method, expected in ((at_init.iterative_snip, 1), (at_init.force, 2)):
      masks = method(loss_fn, theta, batches, 0.75, steps=2)
      self.assertEqual(np.flatnonzero(masks['a']['w']).tolist(), [expected])

  def test_every_step_may_have_its_own_batches(self):
    asked = []

    def batches(step):
      asked.append(step)
      return [random_batch(step)]

    fresh = at_init.force(LOSS, random_mlp(), batches, 0.8, steps=4)
    same = at_init.force(LOSS, random_mlp(), [random_batch(0)], 0.8, steps=4)
    self.assertEqual(asked, [0, 1, 2, 3])
    self.assertTrue(jnp.any(fresh['linear_0']['w'] != same['linear_0']['w']))

  def test_an_iterator_serves_every_step(self):
    got = at_init.force(LOSS, random_mlp(), iter(BATCHES), 0.8, steps=3)
    expected = at_init.force(LOSS, random_mlp(), BATCHES, 0.8, steps=3)
    chex.assert_trees_all_equal(got, expected)

  def test_many_steps_are_one_program(self):
    traces = []
    loss_fn = lambda *args: traces.append(1) or LOSS(*args)
    at_init.iterative_snip(loss_fn, random_mlp(), BATCHES, 0.8, steps=8)
    at_init.force(loss_fn, random_mlp(), BATCHES, 0.9, steps=8)
    self.assertLen(traces, 1)

  @parameterized.parameters(*METHODS)
  def test_overrides_are_kept(self, method):
    given = dict(steps=3, overrides={'linear_2': 0.5})
    counts = num_kept(in_steps(method, random_mlp(), 0.9, **given))
    self.assertEqual(counts['linear_2'], 16)
    self.assertEqual(sum(counts.values()), 16 + 14)

  def test_synflow_in_steps_empties_no_layer(self):
    # 172 weights to 6: a single ranking would leave a layer without any.
    masks = in_steps('synflow', random_mlp(), 1 - 6 / 172, steps=100)
    self.assertGreater(min(num_kept(masks).values()), 0)


class BadInputTest(parameterized.TestCase):
  @parameterized.product(
    method=METHODS,
    case=(
      # Less than one weight in a layer.
      (1 - 1.5 / 172, {}, '2 weights for 3 layers'),
      (0.98, dict(scope='layer'), "'linear_2/w' has 32 weights"),
      (0.5, dict(overrides={'linear_2': 0.99}), "'linear_2/w'.*sparsity 0.99"),
      (0.5, dict(steps=0), 'steps must be at least 1, got 0'),
      (0.5, dict(schedule='cosine'), "got 'cosine'"),
      (1.0, {}, r'\[0, 1\), got 1'),
    ),
  )
  def test_impossible_settings_are_refused(self, method, case):
    sparsity, settings, message = case
    with self.assertRaisesRegex(ValueError, message):
      in_steps(method, random_mlp(), sparsity, **settings)

  def test_exactly_one_weight_per_layer_is_not(self):
    scores = {'a': {'w': jnp.ones((10, 10))}}
    masks = at_init.masks_from_scores(scores, 0.99, scope='layer')
    self.assertEqual(num_kept(masks), {'a': 1})

  def test_a_layer_without_connections_is_named(self):
    scores = {'a': {'w': jnp.ones((4, 4))}, 'b': {'w': jnp.zeros((4, 4))}}
    named = 'no connection is left in b/w'
    with pytest.warns(at_init.LayerCollapseWarning, match=named):
      masks = at_init.masks_from_scores(scores, 0.5)
    self.assertEqual(num_kept(masks), {'a': 16, 'b': 0})

  def test_scores_that_are_not_finite_are_refused(self):
    scores = {'a': {'w': jnp.full((4, 4), jnp.nan)}}
    with self.assertRaisesRegex(ValueError, "not finite in 'a/w'"):
      at_init.masks_from_scores(scores, 0.5)


def digits_masks(method, loss_fn, net, theta, batches):
  if method == 'force':
    return at_init.force(loss_fn, theta, batches, 0.95, steps=5)
  if method == 'synflow':
    return at_init.synflow_masks(net.apply, theta, (1, 8, 8, 1), 0.95, steps=30)
  score = at_init.snip
  if method == 'grasp':
    score = at_init.grasp
    loss_fn = at_init.classification_loss(net.apply, temperature=200.0)
  return at_init.masks_from_scores(score(loss_fn, theta, batches), 0.95)


class DigitsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('snip', 1.0),
    ('snip', 2.0),
    ('grasp', 1.0),
    ('synflow', 1.0),
    ('force', 2.0),
  )
  @pytest.mark.slow
  def test_what_is_left_of_lenet_300_100_learns_digits(self, method, alpha):
    net, theta, loss_fn, examples, train, accuracy = digits_run.make(
      alpha, sizes=(300, 100, 10), learning_rate=0.05
    )
    batches = [
      (examples.images[i : i + 128], examples.labels[i : i + 128])
      for i in range(0, 512, 128)
    ]
    kept = digits_masks(method, loss_fn, net, theta, batches)
    self.assertEqual(
      sum(num_kept(kept).values()),
      masks_lib.num_kept(64 * 300 + 300 * 100 + 100 * 10, 0.95),
    )
    trained = train(masks_lib.apply_masks(theta, kept), kept, 0)
    chex.assert_trees_all_equal(trained, masks_lib.apply_masks(trained, kept))
    self.assertGreater(accuracy(trained), 0.85)
