"""Scores at initialisation: SNIP, GraSP and SynFlow against slow oracles."""

import itertools

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax.core import select as select_lib
from powerprop_jax.nets import layers
from powerprop_jax.prune import at_init

SIZES = (3, 4, 5, 3)


def random_mlp(sizes=SIZES, seed=0):
  shapes = enumerate(itertools.pairwise(sizes))
  return small.normal({f'linear_{i}': {'w': s} for i, s in shapes}, seed)


def random_batch(num_examples=6, seed=1):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(num_examples, SIZES[0])).astype(np.float32)
  return images, rng.integers(0, SIZES[-1], num_examples)


def tanh_logits(theta, images):
  x = images
  for name in sorted(theta)[:-1]:
    x = jnp.tanh(x @ theta[name]['w'])
  return x @ theta[sorted(theta)[-1]]['w']


LOSS = at_init.classification_loss(tanh_logits)


def oracle_loss(weights, batch, temperature=1.0, nll=False):
  """The same loss in float64, of a list of matrices."""
  images, labels = batch
  x = images.astype(np.float64)
  for w in weights[:-1]:
    x = np.tanh(x @ w)
  logits = x @ weights[-1] / temperature
  at_label = logits[np.arange(len(labels)), labels]
  if nll:
    return -at_label.mean()
  return (np.log(np.exp(logits).sum(1)) - at_label).mean()


def oracle_gradient(loss, weights, h=1e-5):
  """∂L/∂θ by central differences, one weight at a time."""
  grads = [np.zeros_like(w) for w in weights]
  for i, w in enumerate(weights):
    for index in np.ndindex(w.shape):
      values = []
      for sign in (1, -1):
        moved = [v.copy() for v in weights]
        moved[i][index] += sign * h
        values.append(loss(moved))
      grads[i][index] = (values[0] - values[1]) / (2 * h)
  return grads


def as_list(theta):
  return [np.asarray(theta[n]['w'], np.float64) for n in sorted(theta)]


class SnipTest(parameterized.TestCase):
  @parameterized.product(temperature=(1.0, 3.0), nll=(False, True))
  def test_agrees_with_finite_differences(self, temperature, nll):
    theta, batch = random_mlp(), random_batch()
    loss_fn = at_init.classification_loss(
      tanh_logits, temperature=temperature, published_nll=nll
    )
    got = at_init.snip(loss_fn, theta, [batch])
    loss = lambda weights: oracle_loss(weights, batch, temperature, nll)
    grads = oracle_gradient(loss, as_list(theta))
    expected = [
      np.abs(w * g) for w, g in zip(as_list(theta), grads, strict=True)
    ]
    chex.assert_trees_all_close(as_list(got), expected, atol=1e-5)

  @parameterized.parameters((1, 1, 1, 1, 1, 1), (4, 2), (1, 5), (3, 2, 1))
  def test_how_the_data_is_cut_up_does_not_matter(self, *lengths):
    theta, (images, labels) = random_mlp(), random_batch()
    ends = np.cumsum(lengths)
    batches = [
      (images[end - n : end], labels[end - n : end])
      for n, end in zip(lengths, ends, strict=True)
    ]
    whole = [(images, labels)]
    for method in (at_init.snip, at_init.grasp):
      expected = method(LOSS, theta, whole)
      # As an iterator, which can be gone through only once.
      got = method(LOSS, theta, iter(batches))
      chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)

  def test_each_shape_of_a_batch_is_traced_once(self):
    traces = []

    def loss_fn(theta, images, labels):
      traces.append(images.shape)
      return LOSS(theta, images, labels)

    batches = [random_batch(n) for n in (6, 6, 2, 6, 2)]
    for seed in range(3):
      at_init.snip(loss_fn, random_mlp(seed=seed), batches)
    self.assertEqual(traces, [(6, 3), (2, 3)])

  def test_inside_jit_and_vmap_it_is_the_same(self):
    batches = [random_batch(seed=seed) for seed in (1, 2)]
    lanes = [random_mlp(seed=seed) for seed in (0, 5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *lanes)

    def masks_of(theta):
      return at_init.masks_from_scores(at_init.snip(LOSS, theta, batches), 0.5)

    got = jax.jit(jax.vmap(masks_of))(stacked)
    for i, theta in enumerate(lanes):
      chex.assert_trees_all_equal(
        jax.tree.map(lambda m, i=i: m[i], got), masks_of(theta)
      )

  def test_half_precision_gives_float32_scores(self):
    theta = jax.tree.map(lambda t: t.astype(jnp.bfloat16), random_mlp())
    scores = at_init.snip(LOSS, theta, [random_batch()])
    exact = at_init.snip(
      LOSS,
      jax.tree.map(lambda t: t.astype(jnp.float32), theta),
      [random_batch()],
    )
    chex.assert_trees_all_equal_dtypes(scores, exact)
    chex.assert_trees_all_close(scores, exact, atol=0.02)

  def test_leaves_that_are_not_selected_score_0(self):
    only_last = select_lib.by_regex('linear_2/w')
    scores = at_init.snip(
      LOSS, random_mlp(), [random_batch()], select=only_last
    )
    self.assertEqual(float(jnp.sum(scores['linear_0']['w'])), 0.0)
    self.assertGreater(float(jnp.sum(scores['linear_2']['w'])), 0.0)


class GraspTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 200.0)
  def test_agrees_with_finite_differences(self, temperature):
    theta, batch = random_mlp(), random_batch()
    loss_fn = at_init.classification_loss(tanh_logits, temperature=temperature)
    got = at_init.grasp(loss_fn, theta, [batch])
    loss = lambda weights: oracle_loss(weights, batch, temperature)
    weights = as_list(theta)
    g = oracle_gradient(loss, weights)
    # Along g, the gradient changes by H g.
    h = 1e-3 / max(np.abs(x).max() for x in g)
    ahead, behind = (
      oracle_gradient(
        loss, [w + s * h * x for w, x in zip(weights, g, strict=True)]
      )
      for s in (1, -1)
    )
    expected = [
      w * (a - b) / (2 * h)
      for w, a, b in zip(weights, ahead, behind, strict=True)
    ]
    scale = max(np.abs(x).max() for x in expected)
    chex.assert_trees_all_close(
      [x / scale for x in as_list(got)],
      [x / scale for x in expected],
      atol=1e-4,
    )

  def test_other_leaves_are_not_part_of_the_gradient_it_preserves(self):
    def logits(theta, images):
      hidden = jnp.tanh(images @ theta['a']['w'] + theta['a']['b'])
      return hidden @ theta['b']['w']

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    theta = {'a': {'w': draw(3, 4), 'b': draw(1, 4)}, 'b': {'w': draw(4, 3)}}
    fixed = theta['a']['b']

    def fixed_logits(weights, images):
      return logits(
        {'a': {'w': weights['a'], 'b': fixed}, 'b': {'w': weights['b']}}, images
      )

    got = at_init.grasp(
      at_init.classification_loss(logits), theta, [random_batch()]
    )
    expected = at_init.grasp(
      at_init.classification_loss(fixed_logits),
      {'a': theta['a']['w'], 'b': theta['b']['w']},
      [random_batch()],
      select=select_lib.by_regex('.'),
    )
    for name in 'ab':
      np.testing.assert_allclose(
        got[name]['w'], expected[name], rtol=1e-5, atol=1e-6
      )

  def test_convolutions_without_a_forward_mode_can_be_scored(self):
    def make(conv):
      def forward(x):
        x = conv(
          4, 3, stride=2, padding='SAME', w_init=layers.WEIGHT_INIT, name='conv'
        )(x)
        return hk.Linear(3, name='logits')(layers.flatten(jax.nn.relu(x)))

      return hk.without_apply_rng(hk.transform(forward))

    images = np.random.default_rng(0).normal(size=(5, 6, 6, 2))
    batch = (images.astype(np.float32), np.arange(5) % 3)
    nets = make(layers.Conv2D), make(hk.Conv2D)
    theta = nets[0].init(jax.random.key(0), batch[0])
    ours, haiku = (
      at_init.grasp(at_init.classification_loss(net.apply), theta, [batch])
      for net in nets
    )
    chex.assert_trees_all_close(ours, haiku, rtol=1e-4, atol=1e-6)

  def test_a_loss_without_second_derivative_is_refused(self):
    linear = random_mlp((3, 3))
    logits = lambda theta, images: images @ theta['linear_0']['w']
    nll = at_init.classification_loss(logits, published_nll=True)
    absolute = lambda theta, x, y: jnp.mean(jnp.abs(logits(theta, x)))
    for loss_fn in (nll, absolute):
      with self.assertRaisesRegex(ValueError, 'no second derivative'):
        at_init.grasp(loss_fn, linear, [random_batch()])

  def test_a_loss_that_ignores_the_weights_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'gradient is zero everywhere'):
      at_init.grasp(
        lambda theta, x, y: jnp.mean(x), random_mlp(), [random_batch()]
      )


def relu_outputs(theta, images):
  x = images
  for name in sorted(theta)[:-1]:
    x = jax.nn.relu(x @ theta[name]['w'])
  return x @ theta[sorted(theta)[-1]]['w']


def oracle_synflow(weights):
  """Scores of a chain without biases: inflow times |θ| times outflow."""
  weights = [np.abs(w) for w in weights]
  ahead = [np.ones(weights[0].shape[0])]
  for w in weights:
    ahead.append(ahead[-1] @ w)
  behind = np.ones(weights[-1].shape[1])
  scores = []
  for x, w in reversed(list(zip(ahead[:-1], weights, strict=True))):
    scores.append(x[:, None] * w * behind)
    behind = w @ behind
  largest = max(s.max() for s in scores)
  return [s / largest for s in reversed(scores)]


class SynFlowTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_agrees_with_the_flow_through_each_weight(self, seed):
    theta = random_mlp(seed=seed)
    scores = at_init.synflow(relu_outputs, theta, (1, 3))
    chex.assert_trees_all_close(
      as_list(scores), oracle_synflow(as_list(theta)), rtol=1e-5
    )

  def test_a_deep_network_does_not_overflow(self):
    # R is about 1e48, beyond float32.
    theta = jax.tree.map(lambda w: 10 * w, random_mlp((30,) * 21))
    names = [f'linear_{i}' for i in range(20)]

    def outputs(theta, x):
      for name in names:
        x = jax.nn.relu(x @ theta[name]['w'])
      return x

    scores = at_init.synflow(outputs, theta, (1, 30))
    weights = [np.asarray(theta[n]['w'], np.float64) for n in names]
    chex.assert_trees_all_close(
      [np.asarray(scores[n]['w'], np.float64) for n in names],
      oracle_synflow(weights),
      rtol=1e-4,
    )
    self.assertEqual(scores['linear_0']['w'].dtype, jnp.float32)

  def test_inside_jit_it_is_the_same(self):
    theta = random_mlp()
    inside = jax.jit(lambda t: at_init.synflow(relu_outputs, t, (1, 3)))(theta)
    outside = at_init.synflow(relu_outputs, theta, (1, 3))
    chex.assert_trees_all_close(inside, outside, rtol=1e-4)

  def test_norms_with_a_neutral_state_are_the_identity(self):
    def forward(images, is_training):
      x = layers.conv(4, 3, 'conv_0', with_bias=False)(images)
      x = jax.nn.relu(layers.norm('norm')(x, is_training))
      x = layers.conv(6, 3, 'conv_1', with_bias=False, padding='VALID')(x)
      return jnp.mean(jax.nn.relu(x), (1, 2))

    net = hk.transform_with_state(forward)
    shape = (1, 6, 6, 2)
    theta, fresh = net.init(jax.random.key(0), jnp.ones(shape), True)
    neutral = at_init.neutral_norm_state(fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(neutral, fresh)

    def apply_fn(theta, images):
      return net.apply(theta, neutral, None, images, False)[0]

    scores = at_init.synflow(apply_fn, theta, shape)
    totals = [float(jnp.sum(scores[f'conv_{i}']['w'])) for i in (0, 1)]
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-4)

    def normalise_by_batch(theta, images):
      return net.apply(theta, fresh, None, images, True)[0]

    with self.assertRaisesRegex(ValueError, 'neutral_norm_state'):
      at_init.synflow(normalise_by_batch, theta, shape)

  @parameterized.named_parameters(
    ('softmax', lambda theta, x: jax.nn.softmax(relu_outputs(theta, x)) ** 2),
    ('sign_dependent', lambda theta, x: -relu_outputs(theta, x)),
  )
  def test_parts_that_depend_on_signs_are_refused(self, apply_fn):
    with self.assertRaisesRegex(ValueError, 'depend on signs'):
      at_init.synflow(apply_fn, random_mlp(), (1, 3))

  def test_a_flow_that_is_not_a_number_is_refused(self):
    broken = lambda theta, x: relu_outputs(theta, x) * jnp.nan
    with self.assertRaisesRegex(ValueError, 'R, is nan'):
      at_init.synflow(broken, random_mlp(), (1, 3))

  def test_outputs_with_a_state_are_refused(self):
    pair = lambda theta, x: (relu_outputs(theta, x), {})
    with self.assertRaisesRegex(TypeError, 'got a tuple'):
      at_init.synflow(pair, random_mlp(), (1, 3))


class BadInputTest(parameterized.TestCase):
  def test_weights_of_zero_are_refused(self):
    zeros = jax.tree.map(jnp.zeros_like, random_mlp())
    for method in (
      lambda: at_init.snip(
        lambda t, x, y: jnp.mean((relu_outputs(t, x) - 1) ** 2),
        zeros,
        [random_batch()],
      ),
      lambda: at_init.synflow(relu_outputs, zeros, (1, 3)),
    ):
      with self.assertRaisesRegex(ValueError, 'that start at zero'):
        method()

  def test_weights_that_are_not_finite_are_refused(self):
    theta = random_mlp()
    theta['linear_1']['w'] = theta['linear_1']['w'].at[0, 0].set(jnp.nan)
    with self.assertRaisesRegex(ValueError, "SNIP are not finite in 'linear_"):
      at_init.snip(LOSS, theta, [random_batch()])

  def test_no_data_is_refused(self):
    used_up = iter([random_batch()])
    list(used_up)
    for batches in ([], used_up):
      with self.assertRaisesRegex(ValueError, 'batches is empty'):
        at_init.snip(LOSS, random_mlp(), batches)

  def test_a_batch_that_is_not_a_tuple_is_refused(self):
    images, labels = random_batch()
    with self.assertRaisesRegex(TypeError, r'pass \[\(images, labels\)\]'):
      at_init.snip(LOSS, random_mlp(), (images, labels))
    with self.assertRaisesRegex(ValueError, r'got the shape \(0, 3\)'):
      at_init.snip(LOSS, random_mlp(), [(images[:0], labels[:0])])

  def test_a_temperature_of_zero_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'temperature must be above 0'):
      at_init.classification_loss(tanh_logits, temperature=0.0)
