"""Scores at initialisation: SNIP, GraSP and SynFlow against slow oracles."""

import functools
import itertools

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small

from powerprop_jax.core import select as select_lib
from powerprop_jax.nets import layers
from powerprop_jax.prune import at_init

SIZES = (3, 4, 5, 3)


def random_mlp(sizes=SIZES, seed=0):
  shapes = enumerate(itertools.pairwise(sizes))
  return small.normal({f'linear_{i:02}': {'w': s} for i, s in shapes}, seed)


def random_batch(num_examples=6, seed=1):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(num_examples, SIZES[0])).astype(np.float32)
  return images, rng.integers(0, SIZES[-1], num_examples)


def tanh_logits(theta, images, activation=jnp.tanh):
  x = images
  for name in sorted(theta)[:-1]:
    x = activation(x @ theta[name]['w'])
  return x @ theta[sorted(theta)[-1]]['w']


relu_outputs = functools.partial(tanh_logits, activation=jax.nn.relu)
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
    weights = as_list(theta)
    grads = oracle_gradient(loss, weights)
    expected = [np.abs(w * g) for w, g in zip(weights, grads, strict=True)]
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
    loss_fn = lambda *args: traces.append(args[1].shape) or LOSS(*args)
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
    cast = optax.tree.cast
    theta = cast(random_mlp(), jnp.bfloat16)
    scores, exact = (
      at_init.snip(LOSS, weights, [random_batch()])
      for weights in (theta, cast(theta, jnp.float32))
    )
    chex.assert_trees_all_equal_dtypes(scores, exact)
    chex.assert_trees_all_close(scores, exact, atol=0.02)

  def test_leaves_that_are_not_selected_score_0(self):
    select = select_lib.by_regex('linear_02/w')
    scores = at_init.snip(LOSS, random_mlp(), [random_batch()], select=select)
    self.assertFalse(jnp.any(scores['linear_00']['w']))
    self.assertTrue(jnp.any(scores['linear_02']['w']))


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
    atol = 1e-4 * scale
    chex.assert_trees_all_close(as_list(got), expected, rtol=0, atol=atol)

  def test_other_leaves_are_not_part_of_the_gradient_it_preserves(self):
    theta = small.normal({'a': {'w': (3, 4)}, 'b': {'w': (4, 3)}})
    bias = small.normal({'bias': {'b': (1, 4)}})

    def logits(theta, images):
      hidden = jnp.tanh(images @ theta['a']['w'] + theta['bias']['b'])
      return hidden @ theta['b']['w']

    with_bias = at_init.classification_loss(logits)
    weights_alone = lambda weights, *batch: with_bias(weights | bias, *batch)
    got = at_init.grasp(with_bias, theta | bias, [random_batch()])
    expected = at_init.grasp(weights_alone, theta, [random_batch()])
    got.pop('bias')
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)

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

  def test_a_loss_without_derivatives_is_refused(self):
    nll = at_init.classification_loss(tanh_logits, published_nll=True)
    absolute = lambda theta, x, y: jnp.mean(jnp.abs(tanh_logits(theta, x)))
    constant = lambda theta, x, y: jnp.mean(x)
    for loss_fn, message in (
      (nll, 'no second derivative'),
      (absolute, 'no second derivative'),
      (constant, 'gradient is zero everywhere'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        at_init.grasp(loss_fn, random_mlp((3, 3)), [random_batch()])


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
  # R is about 1e48 in the deep network, beyond float32.
  @parameterized.parameters((SIZES, 1.0), ((30,) * 21, 10.0))
  def test_agrees_with_the_flow_through_each_weight(self, sizes, factor):
    theta = jax.tree.map(lambda w: factor * w, random_mlp(sizes))
    synflow = lambda theta: at_init.synflow(relu_outputs, theta, (1, sizes[0]))
    expected = oracle_synflow(as_list(theta))
    for scores in [synflow(theta)] + [jax.jit(synflow)(theta)] * (factor == 1):
      chex.assert_trees_all_close(as_list(scores), expected, rtol=1e-4)
      chex.assert_trees_all_equal_dtypes(scores, theta)

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

  @parameterized.parameters(
    (lambda y: jax.nn.softmax(y) ** 2, 'depend on signs'),
    (lambda y: -y, 'depend on signs'),
    (lambda y: y * jnp.nan, 'R, is nan'),
    (lambda y: y * 0, 'that start at zero'),
    (lambda y: (y, {}), 'got a tuple', TypeError),
  )
  def test_outputs_without_a_flow_are_refused(
    self, change, message, error=ValueError
  ):
    outputs = lambda theta, x: change(relu_outputs(theta, x))
    with self.assertRaisesRegex(error, message):
      at_init.synflow(outputs, random_mlp(), (1, 3))


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, [random_batch()], 'that start at zero'),
    (jnp.nan, [random_batch()], "SNIP are not finite in 'linear_"),
    (1, [], 'batches is empty'),
    (1, iter(()), 'batches is empty'),
    (1, random_batch(), r'pass \[\(images, labels\)\]', TypeError),
    (1, [random_batch(0)], r'got the shape \(0, 3\)'),
  )
  def test_weights_and_batches_without_scores_are_refused(
    self, factor, batches, message, error=ValueError
  ):
    theta = jax.tree.map(lambda w: factor * w, random_mlp())
    with self.assertRaisesRegex(error, message):
      at_init.snip(LOSS, theta, batches)
    with self.assertRaisesRegex(ValueError, 'temperature must be above 0'):
      at_init.classification_loss(tanh_logits, temperature=0.0)
