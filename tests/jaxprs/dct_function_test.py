"""with_dct of plain functions is what the layers with a transform compute."""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from powerprop_jax.core import trees
from powerprop_jax.jaxprs import dct
from powerprop_jax.nets.layers import dct as dct_layers
from powerprop_jax.sparse import kernel_choice, network

X = jax.random.normal(jax.random.key(0), (3, 20))
IMAGES = jax.random.normal(jax.random.key(1), (2, 6, 7, 4))

# A layer of Haiku, the one with a transform, and its input.
PAIRS = {
  'linear': (hk.Linear, dct_layers.DctLinear, {'output_size': 30}, X),
  'narrow': (hk.Linear, dct_layers.DctLinear, {'output_size': 5}, X),
  'conv': (
    hk.Conv2D,
    dct_layers.DctConv2D,
    {'output_channels': 6, 'kernel_shape': 3, 'stride': 2},
    IMAGES,
  ),
  'groups': (
    hk.Conv2D,
    dct_layers.DctConv2D,
    {'output_channels': 6, 'kernel_shape': 3, 'feature_group_count': 2},
    IMAGES,
  ),
}


def _pair(name, method):
  plain, layer, settings, x = PAIRS[name]
  make = lambda cls, **more: hk.without_apply_rng(
    hk.transform(lambda x: cls(**settings, name='m', **more)(x))
  )
  return make(plain), make(layer, method=method), x


@pytest.mark.parametrize('method', ['matrix', 'fft'])
@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.slow
def test_is_what_the_layer_computes(name, method):
  plain, layer, x = _pair(name, method)
  theta = plain.init(jax.random.key(2), x)
  params = dct.dct_params(theta, scale=0.7, keep=True)
  fn = dct.with_dct(plain.apply, method=method)
  with_scale = {'m': {**theta['m'], 'transform_scale': jnp.float32(0.7)}}
  loss = lambda fn: lambda *given: jnp.sum(jnp.sin(fn(*given)))
  chex.assert_trees_all_close(
    fn(params, x), layer.apply(with_scale, x), atol=1e-5
  )
  found = jax.grad(loss(fn))(params, x)
  wanted = jax.grad(loss(layer.apply))(with_scale, x)
  scale = wanted['m'].pop('transform_scale')
  chex.assert_trees_all_close(found.theta, wanted, atol=1e-4)
  chex.assert_trees_all_close(found.scales['m/w'], scale, rtol=1e-4)


@pytest.mark.parametrize('method', ['matrix', 'fft'])
def test_any_layout(method):
  fn = lambda theta, x: jnp.einsum(
    'hbi,ni->nhb', theta['weight'].reshape(2, 3, 20), x
  )
  by_rows = lambda theta, x: (x @ theta['w']).reshape(-1, 2, 3)
  w = jax.random.normal(jax.random.key(3), (20, 6))
  params = dct.WithDct({'w': w}, {'w': jnp.float32(2)})
  wanted = dct.with_dct(by_rows, method='matrix')(params, X)
  turned = dct.WithDct({'weight': w.T}, {'weight': jnp.float32(2)})
  found = dct.with_dct(fn, method=method)(turned, X)
  chex.assert_trees_all_close(found, wanted, atol=1e-5)


def _scan(w, x):
  return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def _slices(w, x):
  return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])


def _experts(w, x):
  x = jnp.stack([x, 2 * x, 3 * x])
  return jnp.einsum('ioe,ebi->boe', w.transpose(1, 2, 0), x)


@pytest.mark.parametrize('method', ['matrix', 'fft'])
@pytest.mark.parametrize('use', [_scan, _slices, _experts])
def test_every_layer_of_a_stack_has_one(use, method):
  theta = {'w': jax.random.normal(jax.random.key(3), (3, 20, 20)) / 5}
  params = dct.WithDct(theta, {'w': jnp.float32(0.5)})
  fn = lambda theta, x: use(theta['w'], x)
  found = dct.with_dct(fn, method=method)(params, X)
  rows = dct.cosine_weight(20, 20, jnp.float32)
  wanted = use(theta['w'] + rows[jnp.newaxis] / 2, X)
  chex.assert_trees_all_close(found, wanted, atol=1e-5)


def test_the_product_may_be_without_its_zeros():
  plain, _, x = _pair('linear', 'fft')
  theta = plain.init(jax.random.key(2), x)
  params = dct.dct_params(theta, keep=True)
  masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
  kept = jax.random.bernoulli(jax.random.key(4), 0.2, (20, 30))
  masks.theta['m']['w'] = kept
  fn = dct.with_dct(plain.apply, method='fft')
  run = network.without_zeros(fn, masks, params, x, execution='condensed')
  assert [leaf.held for leaf in run.leaves.values()] == ['condensed']
  values = network.condense(params, masks)
  with kernel_choice.use('native', 'loops'):
    found = run(values, x)
  masked = jax.tree.map(jnp.multiply, params, masks)
  chex.assert_trees_all_close(found, fn(masked, x), atol=1e-5)


def test_auto_goes_by_the_shapes():
  theta = {'w': jnp.zeros((64, 64))}
  fn = dct.with_dct(lambda theta, x: x @ theta['w'])
  uses_fft = lambda n: (
    'fft' in str(jax.make_jaxpr(fn)(dct.dct_params(theta), jnp.ones((n, 64))))
  )
  assert uses_fft(8) and not uses_fft(9)


def test_bad_use_is_refused():
  fn = lambda theta, x: x @ theta['w'] + jnp.sum(theta['w'])
  params = dct.dct_params({'w': jnp.ones((20, 3))})
  with pytest.raises(ValueError, match="'w' is used by reduce_sum"):
    dct.with_dct(fn)(params, X)
  with pytest.raises(ValueError, match="method must be 'auto'"):
    dct.with_dct(fn, method='fast')
  assert not trees.by_path(params.theta)['w'].any()
