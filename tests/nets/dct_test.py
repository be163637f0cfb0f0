"""Layers with a cosine transform, against one written out patch by patch."""

import functools
import math

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.jaxprs.dct import cosine_weight, transform
from powerprop_jax.nets.layers import dct
from powerprop_jax.sparse import network

_METHODS = ('matrix', 'fft')


def _random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _oracle(num_in, num_out):
  """The matrix of the transform, a coefficient in each column, in float64."""
  n, i, o = max(num_in, num_out), np.arange(num_in)[:, None], np.arange(num_out)
  norm = np.sqrt(np.where(o == 0, 1, 2) / n)
  return norm * np.cos(np.pi * (2 * i + 1) * o / (2 * n))


def _without_state(module, *args, **kwargs):
  net = hk.transform(lambda x: module(*args, **kwargs)(x))
  return hk.without_apply_rng(net)


def _output(module, x, *args, **kwargs):
  net = _without_state(module, *args, **kwargs)
  return net.apply(net.init(jax.random.key(0), x), x)


class TransformTest(parameterized.TestCase):
  @parameterized.product(
    sizes=(
      *((1, 1), (1, 5), (5, 1), (7, 7), (16, 16), (13, 6), (6, 13), (9, 8)),
      *((31, 31), (257, 100), (64, 300)),
    ),
    method=(*_METHODS, 'auto'),
  )
  def test_agrees_with_the_sum_in_values_and_gradients(self, sizes, method):
    num_in, num_out = sizes
    matrix = _oracle(num_in, num_out)
    x, dy = _random(2, 3, num_in), _random(2, 3, num_out, seed=1)
    f = jax.jit(lambda x: transform(x, num_out, method=method))
    y, pull_back = jax.vjp(f, x)
    _, tangent = jax.jvp(f, (x,), (x,))
    close = functools.partial(
      np.testing.assert_allclose, atol=1e-6 if max(sizes) < 20 else 1e-5
    )
    close(y, np.float64(x) @ matrix)
    close(tangent, np.float64(x) @ matrix)  # The transform is linear.
    close(pull_back(dy)[0], np.float64(dy) @ matrix.T)

  def test_long_transforms_are_as_exact_as_short_ones(self):
    far = cosine_weight(2, 3000, jnp.float32)[1]
    k = np.arange(1, 3000)
    # Modulo whole turns, so that float64 is exact enough.
    expected = np.sqrt(2 / 3000) * np.cos(np.pi * ((3 * k) % 12000) / 6000)
    np.testing.assert_allclose(far[1:], expected, atol=1e-8)

  @parameterized.product(
    dtype=(jnp.bfloat16, jnp.float16), method=(*_METHODS, 'auto')
  )
  def test_half_precision_stays_what_it_is(self, dtype, method):
    x = _random(4, 300).astype(dtype)
    y = transform(x, 300, method=method)
    assert y.dtype == dtype
    expected = transform(x.astype(jnp.float32), 300)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)

  def test_bad_arguments_are_refused(self):
    with pytest.raises(ValueError, match="'matrix' or 'fft', got 'fast'"):
      transform(jnp.ones(4), 4, method='fast')
    with pytest.raises(ValueError, match='num_out must be at least 1, got 0'):
      transform(jnp.ones(4), 0)
    with pytest.raises(ValueError, match="got 'fast'"):
      _output(dct.DctLinear, jnp.ones((1, 2)), 2, method='fast')


class LinearTest(parameterized.TestCase):
  @parameterized.product(
    sizes=((20, 30), (30, 20)), x_shape=((), (4,), (2, 3)), method=_METHODS
  )
  @pytest.mark.slow
  def test_is_a_linear_layer_plus_a_transform(self, sizes, x_shape, method):
    num_in, num_out = sizes
    x = _random(*x_shape, num_in)
    settings = dict(
      w_init=hk.initializers.RandomNormal(), b_init=jnp.ones, name='layer'
    )
    net = _without_state(
      dct.DctLinear, num_out, transform_init=0.7, method=method, **settings
    )
    plain = _without_state(hk.Linear, num_out, **settings)
    theta = net.init(jax.random.key(0), x)
    assert theta['layer'].pop('transform_scale') == jnp.float32(0.7)
    chex.assert_trees_all_equal(theta, plain.init(jax.random.key(0), x))
    expected = plain.apply(theta, x) + 0.7 * transform(x, num_out)
    theta['layer']['transform_scale'] = jnp.float32(0.7)
    np.testing.assert_allclose(net.apply(theta, x), expected, atol=1e-5)

  @parameterized.parameters((1, 64, 64), (8, 64, 64), (9, 64, 64), (1, 64, 7))
  def test_auto_goes_with_the_batch_and_the_shorter_side(
    self, batch, num_in, num_out
  ):
    x = _random(batch, num_in)
    jaxprs = {}
    for method in (*_METHODS, 'auto'):
      net = _without_state(dct.DctLinear, num_out, method=method)
      theta = net.init(jax.random.key(0), x)
      jaxprs[method] = 'fft' in str(jax.make_jaxpr(net.apply)(theta, x))
    assert jaxprs['fft'] and not jaxprs['matrix']
    assert jaxprs['auto'] == (min(num_in, num_out) >= 8 * batch)

  def test_fft_makes_nothing_of_the_size_of_a_weight_without_its_zeros(self):
    net = _without_state(dct.DctLinear, 200, method='fft')
    x = _random(2, 300)
    theta = net.init(jax.random.key(0), x)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), theta)
    rng = np.random.default_rng(0)
    masks['dct_linear']['w'] = rng.random((300, 200)) < 0.01
    run = network.without_zeros(
      net.apply, masks, theta, x, execution='condensed'
    )
    loss = lambda values, x: jnp.sum(run(values, x))
    step = jax.jit(jax.grad(loss, (0, 1)))
    values = network.condense(theta, masks)
    memory = step.lower(values, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 300 * 200


class ConvTest(parameterized.TestCase):
  @parameterized.product(
    settings=(
      dict(padding='SAME'),
      dict(padding='SAME', stride=2, rate=1, with_bias=False),
      dict(padding=[(1, 0), (0, 2)]),
      dict(padding=(hk.pad.causal, hk.pad.same), rate=(1, 2)),
      dict(padding=hk.pad.full, stride=(2, 1), feature_group_count=2),
      dict(padding='valid', data_format='NCHW', feature_group_count=4),
      # Patches are padded.
      dict(padding='VALID', kernel_shape=(1, 1)),
      dict(padding='VALID', output_channels=60, feature_group_count=2),
    ),
    batch=((), (2,)),
  )
  @pytest.mark.slow
  def test_is_a_convolution_plus_one_with_the_fixed_kernel(
    self, settings, batch
  ):
    shape = (8, 6, 7) if settings.get('data_format') == 'NCHW' else (6, 7, 8)
    x = _random(*batch, *shape)
    settings = {
      'output_channels': 12,
      'kernel_shape': (3, 2),
      'w_init': hk.initializers.RandomNormal(),
      'b_init': jnp.ones,
      'name': 'layer',
    } | settings
    plain = _without_state(hk.Conv2D, **settings)
    theta = plain.init(jax.random.key(0), x)
    w_shape = theta['layer']['w'].shape
    fixed = _oracle(math.prod(w_shape[:-1]), w_shape[-1]).reshape(w_shape)
    fixed = fixed.astype(np.float32)
    outputs = {}
    for method in _METHODS:
      net = _without_state(dct.DctConv2D, method=method, **settings)
      both = net.init(jax.random.key(0), x)
      assert both['layer'].pop('transform_scale') == 1
      chex.assert_trees_all_equal(both, theta)

      def loss(w, scale, x, net=net):
        layer = {**theta['layer'], 'w': w, 'transform_scale': scale}
        y = net.apply({'layer': layer}, x)
        return jnp.mean(jnp.sin(y)), y

      grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
      outputs[method] = grad(theta['layer']['w'], 0.7, x)

    def plain_loss(w, scale, x):
      layer = {**theta['layer'], 'w': w + scale * fixed}
      y = plain.apply({'layer': layer}, x)
      return jnp.mean(jnp.sin(y)), y

    expected = jax.grad(plain_loss, (0, 1, 2), has_aux=True)(
      theta['layer']['w'], 0.7, x
    )
    for found in outputs.values():
      chex.assert_trees_all_close(found, expected, atol=1e-5)

  @parameterized.parameters(*_METHODS)
  def test_a_mask_acts_on_the_weights_alone(self, method):
    mask = jnp.zeros((3, 3, 2, 4)).at[0, 0, 0, 0].set(1)
    x = _random(1, 5, 5, 2)
    settings = dict(mask=mask, w_init=jnp.ones, method=method)
    y = _output(dct.DctConv2D, x, 4, 3, padding='VALID', **settings)
    fixed = _output(dct.DctConv2D, x, 4, 3, padding='VALID', method=method)
    expected = fixed.at[..., 0].add(x[:, :3, :3, 0])
    np.testing.assert_allclose(y, expected, atol=1e-6)

  @parameterized.parameters(
    ((1, 4, 4, 6), 4, 'shuffle must divide its 6 input channels, got 4'),
    ((1, 4, 4, 6), 3, '4 output channels, got 3'),
    ((4, 6), 1, r'rank 3 or 4, got shape \(4, 6\)'),
  )
  def test_groups_that_do_not_divide_channels_are_refused(
    self, shape, num_groups, message
  ):
    settings = dict(feature_group_count=num_groups, name='shuffle')
    with pytest.raises(ValueError, match=message):
      _output(dct.DctConv2D, jnp.ones(shape), 4, 3, **settings)


class DtypeTest(parameterized.TestCase):
  @parameterized.product(
    layer=(
      (dct.DctLinear, (4, 30), (20,)),
      (dct.DctConv2D, (2, 5, 5, 4), (6, 3)),
    ),
    method=_METHODS,
  )
  @pytest.mark.slow
  def test_mixed_precision_is_kept(self, layer, method):
    module, x_shape, args = layer
    net = _without_state(module, *args, method=method)
    x = _random(*x_shape).astype(jnp.bfloat16)
    theta = net.init(jax.random.key(0), x)
    y = net.apply(theta, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((theta, y))} == {x.dtype}
    expected = net.apply(
      jax.tree.map(lambda p: p.astype(jnp.float32), theta),
      x.astype(jnp.float32),
    )
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)
