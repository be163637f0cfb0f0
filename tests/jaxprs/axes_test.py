"""What the axes of weights are, read off the functions of four libraries."""

import equinox as eqx
from flax import nnx
import flax.linen as nn
import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import pytest

from powerprop_jax.core.layouts import Axes
from powerprop_jax.jaxprs import moves, walk

X = jnp.ones((5, 8))
IMAGES = jnp.ones((2, 8, 8, 4))


def _haiku(make):
  net = hk.without_apply_rng(hk.transform(lambda x: make()(x)))
  return lambda x: (net.apply, net.init(jax.random.key(0), x))


def _linen(module):
  return lambda x: (module.apply, module.init(jax.random.key(0), x))


def _nnx(make):
  graph, state = nnx.split(make(nnx.Rngs(0)))
  return lambda x: (lambda state, x: nnx.merge(graph, state)(x), state)


def _eqx(make):
  arrays, rest = eqx.partition(make(key=jax.random.key(0)), eqx.is_array)
  fn = lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x)
  return lambda x: (fn, arrays)


def _to_channels_first(make):
  built = _eqx(make)
  return lambda x: built(x.transpose(0, 3, 1, 2))


IN_OUT, OUT_IN = Axes((0,), (1,)), Axes((1,), (0,))
KERNEL = Axes((2,), (3,), (0, 1))
# Layer, its input, and the axes of its weight.
LAYERS = {
  'haiku': (_haiku(lambda: hk.Linear(3)), X, IN_OUT),
  'linen': (_linen(nn.Dense(3)), X, IN_OUT),
  'nnx': (_nnx(lambda rngs: nnx.Linear(8, 3, rngs=rngs)), X, IN_OUT),
  'equinox': (_eqx(lambda key: eqx.nn.Linear(8, 3, key=key)), X, OUT_IN),
  'haiku conv': (_haiku(lambda: hk.Conv2D(3, 3)), IMAGES, KERNEL),
  'linen conv': (_linen(nn.Conv(3, (3, 3))), IMAGES, KERNEL),
  'haiku transposed': (
    _haiku(lambda: hk.Conv2DTranspose(3, 3, 2)),
    IMAGES,
    Axes((3,), (2,), (0, 1)),
  ),
  'haiku groups': (
    _haiku(lambda: hk.Conv2D(6, 3, feature_group_count=2)),
    IMAGES,
    KERNEL._replace(groups=2),
  ),
}


@pytest.mark.parametrize('name', LAYERS)
def test_axes_of_layers(name):
  build, x, axes = LAYERS[name]
  fn, theta = build(x)
  (found,) = walk.leaf_axes(fn, theta, x).values()
  assert found == axes


def test_attention_of_flax_has_heads():
  make = lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
  fn, theta = _nnx(make)(X[jnp.newaxis])
  found = walk.leaf_axes(fn, theta, X[jnp.newaxis])
  assert found['query/kernel'] == Axes((0,), (1, 2))
  assert found['out/kernel'] == Axes((0, 1), (2,))


def test_images_may_come_channels_first():
  fn, theta = _to_channels_first(lambda key: eqx.nn.Conv2d(4, 3, 3, key=key))(
    IMAGES
  )
  images = IMAGES.transpose(0, 3, 1, 2)
  assert walk.leaf_axes(fn, theta, images) == {
    'weight': Axes((1,), (0,), (2, 3))
  }


def _scan(theta, x):
  layer = lambda h, w: (jnp.tanh(h @ w), None)
  return lax.scan(jax.checkpoint(layer), x, theta['w'])[0]


def _experts(theta, x):
  return jnp.einsum('eio,bei->beo', theta['w'], x)


@pytest.mark.parametrize(
  ('fn', 'x'), [(_scan, X), (_experts, jnp.ones((5, 4, 8)))]
)
def test_stacked_layers_are_repeats(fn, x):
  theta = {'w': jnp.ones((4, 8, 8))}
  assert walk.leaf_axes(fn, theta, x) == {'w': Axes((1,), (2,), (), (0,))}


def test_moves_on_the_way_are_followed():
  def fn(theta, x):
    w = theta['w'].reshape(4, 2, 3).transpose(2, 0, 1).astype(jnp.bfloat16)
    return jnp.einsum('oab,nab->no', w, x.reshape(-1, 4, 2))

  assert walk.leaf_axes(fn, {'w': jnp.ones((8, 3))}, X)['w'] == IN_OUT


def test_an_axis_that_is_two_things_has_none():
  fn = lambda theta, x: jnp.einsum(
    'abo,na->nbo', theta['w'].reshape(4, 2, 3), x
  )
  theta = {'w': jnp.ones((8, 3))}
  (product,) = walk.products(fn, theta, X[:, :4])['w'].products
  assert product.axes is None
  with pytest.raises(ValueError, match="'w' disagree about its axes"):
    walk.leaf_axes(fn, theta, X[:, :4])


def test_tied_embeddings_are_two_uses():
  def fn(theta, tokens):
    h = theta['embed'][tokens]
    return h @ theta['embed'].T

  uses = walk.products(fn, {'embed': jnp.ones((9, 4))}, jnp.arange(3))['embed']
  assert [product.axes for product in uses.products] == [OUT_IN]
  assert uses.others == ('gather',)


@pytest.mark.parametrize(
  ('use', 'primitive'),
  [
    (lambda w, x: x @ (w / jnp.linalg.norm(w)), 'div'),
    (lambda w, x: x @ jnp.round(w), 'round'),
    (lambda w, x: x * jnp.sum(w @ w.T), 'dot_general'),
  ],
)
def test_what_mixes_entries_is_named(use, primitive):
  fn = lambda theta, x: use(theta['w'], x)
  assert primitive in walk.products(fn, {'w': jnp.ones((8, 8))}, X)['w'].others


def test_a_closed_over_weight_is_used_by_nothing():
  w = jnp.ones((8, 3))
  found = walk.products(lambda theta, x: x @ w, {'w': w}, X)
  assert found == {'w': walk.Uses((), ())}


def test_reshape_keeps_track_of_parts():
  view = moves.view('w', (6, 4))
  eqn = jax.make_jaxpr(lambda w: w.reshape(2, 12))(jnp.ones((6, 4))).eqns[0]
  first, second = moves.moved(eqn, view).axes
  assert first == (moves.Piece(0, 2, 3),)
  assert second == (moves.Piece(0, 3, 1), moves.Piece(1, 4, 1))
  eqn = jax.make_jaxpr(lambda w: w.reshape(8, 3))(jnp.ones((6, 4))).eqns[0]
  assert moves.moved(eqn, view) is None
