"""A training step does what its formula says; an evaluation counts exactly."""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stream_runs

from powerprop_jax import nets
from powerprop_jax.optim import aliases, ema, powerprop, views
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import step
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.scale import fusing

MLP = nets.make('mlp', 3)
TX = powerprop.powerprop(optax.sgd(0.1, momentum=0.9), 2.0)


def make_arrays(size, seed=0, dtype=np.float32):
  generator = np.random.default_rng(seed)
  images = generator.random((size, 4, 4, 1), np.float32)
  if dtype == np.uint8:
    images = (255 * images).astype(np.uint8)
  labels = generator.integers(0, 3, size).astype(np.int32)
  return Arrays(images, labels)


def make_state(net, tx=TX, seed=0):
  images = make_arrays(1).images
  return step.create(net, tx, jax.random.key(seed), jnp.asarray(images))


@hk.transform_with_state
def batch_norm_net(images, is_training):
  x = hk.Linear(5)(images.reshape(images.shape[0], -1))
  x = hk.BatchNorm(True, True, decay_rate=0.5)(x, is_training)
  return hk.Linear(3, name='logits')(jax.nn.relu(x))


@hk.transform_with_state
def dropout_net(images, is_training):
  x = hk.Linear(20)(images.reshape(images.shape[0], -1))
  if is_training:
    x = hk.dropout(hk.next_rng_key(), 0.5, x)
  return hk.Linear(3, name='logits')(jax.nn.relu(x))


class StateTest:
  @pytest.mark.parametrize('alpha', [1.0, 1.3, 2.0, 4.0])
  def test_a_key_gives_the_same_function_for_every_power(self, alpha):
    tx = powerprop.powerprop(optax.sgd(0.1), alpha)
    start = make_state(MLP, tx)
    theta, _ = MLP.init(jax.random.key(0), make_arrays(1).images, True)
    chex.assert_trees_all_close(start.theta, theta, rtol=1e-5)
    assert start.step.dtype == jnp.int32
    assert start.step == 0


class StepTest:
  def test_step_is_the_chain_rule_for_plain_sgd(self):
    tx = powerprop.powerprop(optax.sgd(0.1), 2.0)
    before, arrays = make_state(MLP, tx), make_arrays(6)

    def loss_of_phi(phi):
      theta = views.effective_params(phi, before.opt_state)
      logits, _ = MLP.apply(theta, {}, None, arrays.images, True)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, arrays.labels
      ).mean()

    loss, slope = jax.value_and_grad(loss_of_phi)(before.phi)
    after, metrics = step.make_step(MLP, tx)(before, *arrays)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.phi, slope)
    chex.assert_trees_all_close(after.phi, expected, rtol=1e-5, atol=1e-6)
    assert after.step == 1
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)

  @pytest.mark.slow
  def test_batch_norm_averages_move_in_training_only(self):
    start, arrays = make_state(batch_norm_net), make_arrays(20)
    after, _ = step.make_step(batch_norm_net, TX)(start, *arrays)
    x = arrays.images.reshape(20, -1)
    linear = jax.device_get(start.theta['linear'])
    mean = (x @ linear['w'] + linear['b']).mean(0)
    name = 'batch_norm/~/mean_ema'
    np.testing.assert_allclose(
      after.net_state[name]['average'][0], mean, rtol=1e-4, atol=1e-6
    )
    evaluate = evaluate_lib.make_evaluate(batch_norm_net, batch_size=7)
    whole = evaluate(after.theta, after.net_state, arrays)
    single = evaluate_lib.make_evaluate(batch_norm_net, batch_size=1)(
      after.theta, after.net_state, arrays
    )
    # Were it in training mode, a batch would see its own statistics.
    chex.assert_trees_all_close(whole, single, rtol=1e-5)


class AdvanceTest:
  @pytest.mark.parametrize(
    ('row', 'net'),
    [
      *((row, MLP) for row in ('dense', '1', '1.5', 'traced', 'rigl', 'ema')),
      *((row, batch_norm_net) for row in ('1', '2')),
    ],
  )
  @pytest.mark.slow
  def test_many_steps_are_the_steps_one_by_one(self, row, net):
    inner = optax.chain(
      optax.add_decayed_weights(1e-3), optax.sgd(0.1, 0.9, nesterov=True)
    )
    alpha = {'1': 1.0, '2': 2.0, 'traced': jnp.float32(1.7)}.get(row, 1.5)
    tx = inner if row == 'dense' else powerprop.powerprop(inner, alpha)
    if row in ('rigl', 'ema'):
      tx = aliases.rigl(tx, 0.5, stop=8, period=3)
    # Its update once and twice.
    tx, twice = (
      ema.with_ema(t, 0.9) if row == 'ema' else t
      for t in (tx, fusing.fused(tx))
    )
    arrays = jax.tree.map(jnp.asarray, make_arrays(30))
    rows = splits.batch_indices(0, 0, 8, 5, 30)
    one, each = make_state(net, tx), []
    one_step = jax.jit(step.make_step(net, tx))
    for batch in rows:
      one, metrics = one_step(one, arrays.images[batch], arrays.labels[batch])
      each.append(metrics)
    one = stream_runs.to_host(one)
    for advance in (
      step.make_advance(net, tx),
      step.make_advance(net, twice),
      fusing.make_advance(net, twice),
    ):
      many, means = jax.jit(advance)(make_state(net, tx), arrays, rows)
      many = stream_runs.to_host(many)
      chex.assert_trees_all_close(many, one, rtol=1e-4, atol=1e-5)
      chex.assert_trees_all_equal_shapes_and_dtypes(many, one)
      chex.assert_trees_all_equal(
        *(views.current_masks(s.phi, s.opt_state) for s in (many, one))
      )
      for name, mean in means.items():
        np.testing.assert_allclose(
          mean, np.mean([metrics[name] for metrics in each]), rtol=1e-5
        )

  @pytest.mark.parametrize(
    ('module', 'tx'), [(step, TX), (fusing, fusing.fused(TX))]
  )
  def test_state_is_donated_and_compiled_for_once(self, module, tx):
    net = batch_norm_net
    advance = chex.assert_max_traces(n=1)(module.make_advance(net, tx))
    advance = jax.jit(advance, donate_argnums=0)
    arrays = jax.tree.map(jnp.asarray, make_arrays(30))
    before = make_state(net)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), before)
    after = before
    for start in (0, 4, 8):
      rows = splits.batch_indices(0, start, 4, 5, 30)
      after, _ = advance(after, arrays, rows)
    assert after.step == 12
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.phi))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == shapes


class RandomTest:
  """What is random in a step depends on the key and on the step alone."""

  def test_key_is_of_the_run_and_does_not_change(self):
    before = make_state(MLP, seed=3)
    after, _ = step.make_step(MLP, TX)(before, *make_arrays(6))
    assert after.key == before.key
    assert before.key != make_state(MLP, seed=4).key
    # The initial weights were drawn with the other one.
    assert before.key != jax.random.key(3)

  def test_network_gets_a_new_key_at_every_step(self):
    net, arrays = dropout_net, make_arrays(6)
    first_step = step.make_step(net, TX)
    before = make_state(net)
    _, first = first_step(before, *arrays)
    _, again = first_step(before, *arrays)
    _, later = first_step(before._replace(step=before.step + 1), *arrays)
    _, other = first_step(before._replace(key=jax.random.key(9)), *arrays)
    assert first['loss'] == again['loss']
    assert len({float(m['loss']) for m in (first, later, other)}) == 3

  def test_images_are_augmented_then_prepared_in_training(self):
    net, arrays = MLP, make_arrays(6, dtype=np.uint8)
    seen = []

    def augment(key, images):
      seen.append((key, images.dtype))
      return images[::-1]

    prepare = lambda images: 1 - splits.to_float(images)
    changed = step.make_step(net, TX, prepare=prepare, augment=augment)
    found, _ = changed(make_state(net), *arrays)
    # Without being told, bytes are scaled and floats are not.
    plain, images = step.make_step(net, TX), 255 - arrays.images[::-1]
    for expected in images, images.astype(np.float32) / 255:
      chex.assert_trees_all_close(
        found.phi,
        plain(make_state(net), expected, arrays.labels)[0].phi,
        rtol=1e-5,
        atol=1e-6,
      )
    assert [dtype for _, dtype in seen] == [np.uint8]

  def test_random_images_are_the_same_in_one_dispatch_and_in_many(self):
    net, arrays = MLP, make_arrays(30)
    augment = lambda key, images: images + jax.random.normal(key, images.shape)
    advance = jax.jit(step.make_advance(net, TX, augment=augment))
    on_device = jax.tree.map(jnp.asarray, arrays)
    rows = splits.batch_indices(0, 0, 6, 5, 30)
    whole, _ = advance(make_state(net), on_device, rows)
    parts = make_state(net)
    for start in (0, 2, 4):
      parts, _ = advance(parts, on_device, rows[start : start + 2])
    chex.assert_trees_all_close(whole.phi, parts.phi, rtol=1e-4, atol=1e-5)

  def test_evaluation_sees_prepared_images(self):
    net, arrays = MLP, make_arrays(6)
    theta = make_state(net).theta
    prepare = lambda images: 3 * images - 1
    found = evaluate_lib.make_evaluate(net, prepare=prepare)(theta, {}, arrays)
    arrays = Arrays(3 * arrays.images - 1, arrays.labels)
    expected = evaluate_lib.make_evaluate(net)(theta, {}, arrays)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


class EvaluateTest:
  @pytest.mark.parametrize('size', [1, 6, 7, 8, 14, 20])
  def test_every_example_counts_once(self, size):
    net, arrays = MLP, make_arrays(size)
    theta = make_state(net).theta
    logits, _ = net.apply(theta, {}, None, arrays.images, False)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, arrays.labels
    )
    correct = np.argmax(np.asarray(logits), -1) == arrays.labels
    found = jax.jit(evaluate_lib.make_evaluate(net, batch_size=7))(
      theta, {}, arrays
    )
    np.testing.assert_allclose(
      found['accuracy'] * size, correct.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(found['loss'], losses.mean(), rtol=1e-5)
