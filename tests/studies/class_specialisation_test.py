"""Sums by class and shares are those of slow loops over the features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.class_specialisation import features


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


def _forward(theta, x):
  """A network without a library, and what its layers read."""
  conv = jax.lax.conv_general_dilated(
    x,
    theta['conv']['w'],
    (2, 2),
    'SAME',
    dimension_numbers=('NCHW', 'HWIO', 'NHWC'),
  )
  images = jnp.tanh(conv)
  again = jax.lax.conv_general_dilated(
    images,
    theta['again']['w'],
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  vectors = jax.nn.relu(again).mean((1, 2)) + theta['again']['b'][jnp.newaxis]
  result = vectors @ theta['last']['w']
  return result, {
    'conv/w': x.transpose(0, 2, 3, 1),
    'again/w': images,
    'last/w': vectors,
    'output': result,
  }


def _network():
  w = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
  theta = {
    'conv': {'w': w(3, 3, 2, 4)},
    'again': {'w': w(2, 2, 4, 5), 'b': jnp.full(5, 0.5)},
    'last': {'w': w(5, 3)},
  }
  # A feature without a connection into it: 0.5 for every example.
  theta['again']['w'] = theta['again']['w'].at[..., 1].set(0)
  return theta


class ByLayerTest:
  @pytest.mark.parametrize('compile', _COMPILE)
  def test_features_are_what_the_layers_of_any_function_read(self, compile):
    theta = _network()
    x, labels = _labelled((20, 2, 6, 8), 3)
    fn = compile(lambda theta, x: _forward(theta, x)[0])
    batches = [(x[:12], labels[:12]), (x[12:], labels[12:])]
    found = features.specialisation_by_layer(fn, theta, batches, 3)
    read = _forward(theta, jnp.asarray(x))[1]
    assert list(found) == list(read)
    for layer, values in read.items():
      expected = _oracle(values, labels, 3)
      if layer == 'last/w':
        expected[:, 1] = 0
      np.testing.assert_allclose(
        found[layer].activity, expected, rtol=1e-4, atol=1e-5
      )
      alive = expected.sum(axis=0) > 0
      np.testing.assert_allclose(
        found[layer].specialisation[alive],
        _shares(expected[:, alive]),
        rtol=1e-4,
      )
      assert np.isnan(found[layer].specialisation[~alive]).all()
    table = features.specialisation_table(found)
    assert table[2]['dead'] == 1
    records = features.specialisation_records(found)
    assert [r['feature'] for r in records if r['layer'] == 'output'] == [
      0,
      1,
      2,
    ]

  def test_a_layer_that_is_applied_twice_counts_all_that_it_reads(self):
    x, labels = _labelled((20, 3), 2)
    w = jax.random.normal(jax.random.key(0), (3, 3))
    twice = lambda theta, x: x @ theta['w'] @ theta['w']
    found = features.specialisation_by_layer(twice, {'w': w}, [(x, labels)], 2)
    expected = _oracle(x, labels, 2) + _oracle(x @ w, labels, 2)
    np.testing.assert_allclose(found['w'].activity, expected, rtol=1e-5)

  def test_layers_of_a_scan_have_their_features_side_by_side(self):
    x, labels = _labelled((20, 3), 2)
    w = jax.random.normal(jax.random.key(0), (2, 3, 3))
    layers = lambda theta, x: jax.lax.scan(
      lambda h, w: (h @ w, None), x, theta['w']
    )[0]
    found = features.specialisation_by_layer(layers, {'w': w}, [(x, labels)], 2)
    both = _oracle(x, labels, 2), _oracle(x @ w[0], labels, 2)
    np.testing.assert_allclose(
      found['w'].activity, np.concatenate(both, axis=1), rtol=1e-5
    )

  def test_bad_arguments_are_refused(self):
    x, labels = _labelled((4, 3), 2)
    fn = lambda theta, x: x @ theta['w']

    def measure(batches):
      theta = {'w': jnp.ones((3, 3))}
      return features.specialisation_by_layer(fn, theta, batches, 2)

    for batches, message in (
      ([], 'at least one batch'),
      ([(x, np.array([0, 1, 2, 0]))], r'in \[0, 2\), got 0 to 2'),
      ([(x, np.zeros(4))], 'integers'),
      ([(x, labels[:3])], r'\[N, ..., C\] and labels \[N\]'),
      ([(x[0], labels)], r'\[N, ..., C\] and labels \[N\]'),
    ):
      with pytest.raises(ValueError, match=message):
        measure(batches)
