"""Sums by class and shares are those of slow loops over the features."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.class_specialisation import features
from experiments.common import activations
from powerprop_jax import nets
from powerprop_jax.nets import layers


def _oracle(values, labels, num_classes):
  """Sums by class, one number at a time."""
  values = np.asarray(values, np.float64)
  sums = np.zeros((num_classes, values.shape[-1]))
  for example, label in zip(values, labels, strict=True):
    for index in np.ndindex(example.shape):
      sums[label, index[-1]] += max(0.0, example[index])
  return sums


def _labelled(shape, num_classes, seed=0):
  generator = np.random.default_rng(seed)
  values = generator.normal(size=shape).astype(np.float32)
  return values, generator.integers(0, num_classes, shape[:1])


def _shares(activity):
  return activity.max(axis=0) / activity.sum(axis=0)


def _transform(fn):
  return hk.without_apply_rng(hk.transform(fn))


_COMPILE = [jax.jit, lambda fn: fn]


class ClassActivityTest:
  @pytest.mark.parametrize('compile', _COMPILE)
  @pytest.mark.parametrize(
    ('shape', 'num_classes'),
    [((7, 5), 3), ((4, 6, 3), 10), ((9, 4, 4, 2), 2), ((1, 1), 1)],
  )
  def test_sums_are_those_of_a_loop(self, compile, shape, num_classes):
    values, labels = map(jnp.asarray, _labelled(shape, num_classes))
    sums = functools.partial(features.class_activity, num_classes=num_classes)
    activity = compile(sums)(values, labels)
    assert activity.dtype == jnp.float32
    expected = _oracle(values, labels, num_classes)
    np.testing.assert_allclose(activity, expected, rtol=1e-5)

  def test_batches_add_up_but_for_examples_of_no_class(self):
    values, labels = _labelled((20, 3, 4), 5)
    whole = features.class_activity(values[:18], labels[:18], 5)
    labels[18:] = [-1, 5]
    parts = [
      features.class_activity(values[part], labels[part], 5)
      for part in (slice(0, 3), slice(3, 20))
    ]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)

    # Small integers do not wrap around.
    labels = np.array([0, 255], np.uint8)
    activity = features.class_activity(np.ones((2, 1)), labels, 300)
    assert activity.sum() == 2

    for shape in ((3, 2), (4,)):
      with pytest.raises(ValueError, match=r'\[N, ..., C\]'):
        features.class_activity(np.ones(shape), np.zeros(4, np.int32), 2)


class ClassSpecialisationTest:
  @pytest.mark.parametrize('compile', _COMPILE)
  @pytest.mark.parametrize(
    ('classes', 'size', 'scale'),
    [(2, 4, 1.0), (10, 30, 1e-30), (10, 30, 1e30), (1, 3, 1.0)],
  )
  def test_shares_are_those_of_numpy_at_any_scale(
    self, compile, classes, size, scale
  ):
    activity = np.random.default_rng(0).exponential(size=(classes, size))
    activity[:, 0] = np.eye(classes)[0]  # of one class
    activity[:, 1] = 1.0  # all alike
    scaled = jnp.asarray(scale * activity, jnp.float32)
    found = compile(features.class_specialisation)(scaled)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _shares(activity), rtol=1e-5)

  def test_dead_and_broken_features_are_left_out(self):
    activity = np.array([[0.0, np.nan, np.inf, 1.0], [0.0, 1.0, 1.0, 0.0]])
    shares = np.asarray(features.class_specialisation(activity))
    np.testing.assert_array_equal(shares, [np.nan, np.nan, np.nan, 1.0])
    found = {'layer': features.LayerFeatures(activity, shares)}
    (row,) = features.specialisation_table(found)
    counts = {'features': 4, 'dead': 1, 'not_finite': 2}
    means = {'mean': 1.0, 'median': 1.0}
    assert row == {'layer': 'layer', **counts, **means}


class LayerOutputsTest:
  @pytest.mark.parametrize('module', [layers.Conv2D, hk.Conv2D])
  def test_outputs_are_those_that_the_network_computed(self, module):
    options = {'stride': 2, 'padding': 'SAME', 'name': 'b_conv'}
    init = hk.initializers.RandomNormal()

    def forward(x):
      conv = module(4, 3, w_init=init, **options)(x)
      hidden = hk.Linear(5, name='a_linear')(jax.nn.relu(conv).mean((1, 2)))
      return {'b_conv': conv, 'a_linear': hidden}

    net = _transform(forward)
    x = jnp.asarray(_labelled((3, 8, 8, 2), 2)[0])
    theta = net.init(jax.random.key(0), x)
    found = activations.layer_outputs(net.apply, theta, x)
    assert list(found) == ['b_conv', 'a_linear']
    for layer, expected in net.apply(theta, x).items():
      np.testing.assert_array_equal(found[layer][0], expected)

  def test_a_normalisation_that_follows_directly_belongs_to_the_layer(self):
    def forward(x):
      norm = hk.BatchNorm(True, True, decay_rate=0.9)
      first = norm(hk.Linear(4, name='first')(x), is_training=True)
      second = hk.Linear(4, name='second')(jax.nn.relu(first))
      norm(jax.nn.relu(second), is_training=True)
      return first, second

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    x = jnp.asarray(_labelled((6, 3), 2)[0])
    theta, state = net.init(jax.random.key(0), x)
    apply = lambda theta, x: net.apply(theta, state, x)
    found = activations.layer_outputs(apply, theta, x)
    (first, second), _ = net.apply(theta, state, x)
    assert list(found) == ['first', 'second']
    np.testing.assert_array_equal(found['first'][0], first)
    np.testing.assert_array_equal(found['second'][0], second)

  def test_channels_first_become_last(self):
    def forward(x):
      x = hk.Conv2D(4, 3, data_format='NCHW', name='conv')(x)
      norm = hk.BatchNorm(True, True, 0.9, data_format='NCHW')
      return norm(x, is_training=True)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    x = jnp.ones((2, 3, 8, 6))
    theta, state = net.init(jax.random.key(0), x)
    apply = lambda theta, x: net.apply(theta, state, x)
    found = activations.layer_outputs(apply, theta, x)
    assert found['conv'][0].shape == (2, 8, 6, 4)

  def test_a_network_that_is_not_seen_is_an_error(self):
    theta = {'linear': {'w': jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r'apply ran none.*linear'):
      activations.layer_outputs(lambda theta, x: x, theta, jnp.ones((1, 3)))


class ByLayerTest:
  @pytest.mark.parametrize('name', ['lenet_300_100', 'mnist_cnn'])
  @pytest.mark.slow
  def test_every_layer_of_our_networks_is_measured(self, name):
    net = nets.make(name, 10)
    images, labels = _labelled((20, 8, 8, 3), 10)
    theta, state = net.init(jax.random.key(0), jnp.asarray(images[:1]), True)

    def apply(theta, images):
      return net.apply(theta, state, None, images, False)

    batches = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    found = features.specialisation_by_layer(apply, theta, batches, 10)
    outputs = activations.layer_outputs(apply, theta, jnp.asarray(images))
    assert list(found) == list(outputs)
    assert set(found) == {
      module for module, leaf in theta.items() if 'w' in leaf
    }
    for layer, (activity, specialisation) in found.items():
      expected = _oracle(outputs[layer][0], labels, 10)
      np.testing.assert_allclose(activity, expected, rtol=1e-3, atol=1e-3)
      alive = activity.sum(axis=0) > 0
      np.testing.assert_array_equal(alive, np.isfinite(specialisation))
      np.testing.assert_allclose(
        specialisation[alive], _shares(activity[:, alive]), rtol=1e-5
      )

  def test_dead_features_and_layers_applied_twice_are_counted(self):
    def forward(x):
      layer = hk.Linear(3)
      return layer(layer(x))

    net = _transform(forward)
    x, labels = _labelled((20, 3), 2)
    theta = net.init(jax.random.key(0), x)
    theta['linear']['w'] = theta['linear']['w'].at[:, 1].set(0)
    outputs = activations.layer_outputs(net.apply, theta, x)['linear']
    assert len(outputs) == 2
    found = features.specialisation_by_layer(net.apply, theta, [(x, labels)], 2)
    np.testing.assert_allclose(
      found['linear'].activity,
      sum(_oracle(output, labels, 2) for output in outputs),
      rtol=1e-5,
    )
    is_dead = np.isnan(found['linear'].specialisation)
    np.testing.assert_array_equal(is_dead, [False, True, False])
    (row,) = features.specialisation_table(found)
    assert (row['features'], row['dead']) == (3, 1)
    records = features.specialisation_records(found)
    assert [record['feature'] for record in records] == [0, 1, 2]

  def test_bad_arguments_are_refused(self):
    net = _transform(lambda x: hk.Linear(3)(x))
    x, labels = _labelled((4, 3), 2)
    theta = net.init(jax.random.key(0), x)

    def measure(batches, apply=net.apply):
      return features.specialisation_by_layer(apply, theta, batches, 2)

    for batches, message in (
      ([], 'at least one batch'),
      ([(x, np.array([0, 1, 2, 0]))], r'in \[0, 2\), got 0 to 2'),
      ([(x, np.zeros(4))], 'integers'),
      ([(x, labels[:3])], 'linear must have an entry'),
      ([(x[0], labels)], 'linear must be an array'),
    ):
      with pytest.raises(ValueError, match=message):
        measure(batches)
    with pytest.raises(TypeError, match='must not be compiled'):
      measure([(x, labels)], jax.jit(net.apply))
