"""Functions without the zeros of their weights are those of masked weights."""

import math
import re

import chex
import equinox as eqx
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from powerprop_jax import nets, sparse
from powerprop_jax.core import trees
from powerprop_jax.jaxprs import observe
from powerprop_jax.sparse import kernel_choice, native, network


def _masks(theta, density=0.3):
  """Random masks of everything that has two axes or more."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (
      jnp.asarray(rng.random(x.shape) < density)
      if x.ndim > 1
      else jnp.ones(x.shape, bool)
    ),
    theta,
  )


def _check(fn, theta, *args, held=None, kernels=('native', 'loops')):
  """Compares values and gradients; returns run."""
  masks = _masks(theta)
  run = network.without_zeros(fn, masks, theta, *args, execution='condensed')
  values = network.condense(theta, masks)

  def loss(fn, *given):
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(*given)))

  masked = lambda theta: fn(jax.tree.map(jnp.multiply, theta, masks), *args)
  with kernel_choice.use(*kernels):
    y = jax.jit(lambda values: run(values, *args))(values)
    grads = jax.jit(jax.grad(lambda v: loss(run, v, *args)))(values)
  chex.assert_trees_all_close(jax.jit(masked)(theta), y, rtol=1e-4, atol=1e-5)
  wanted = network.condense(jax.grad(lambda t: loss(masked, t))(theta), masks)
  # Of some leaves, such as biases before a batch norm, it is all rounding.
  largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
  chex.assert_trees_all_close(wanted, grads, rtol=1e-3, atol=1e-4 * largest)
  found = {name for name, x in run.leaves.items() if x.held == 'condensed'}
  assert held is None or found == set(held)
  back = network.expand(values, masks)
  chex.assert_trees_all_equal(back, jax.tree.map(jnp.multiply, theta, masks))
  return run


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape) / 3


def test_attention_of_flax():
  module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  graph, state = nnx.split(module)
  names = [f'{name}/kernel' for name in ('key', 'out', 'query', 'value')]
  run = _check(
    lambda state, x: nnx.merge(graph, state)(x),
    state,
    _normal(2, 5, 8),
    held=names,
  )
  assert run.leaves['key/bias'].why == 'used by add'


def test_convolutions_and_linear_layers_of_equinox():
  key = jax.random.key(0)
  layers = [
    eqx.nn.Conv2d(3, 8, 3, stride=2, key=key),
    eqx.nn.Lambda(jax.nn.relu),
    eqx.nn.Lambda(jnp.ravel),
    eqx.nn.Linear(8 * 3 * 3, 6, key=key),
  ]
  arrays, rest = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
  fn = lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x)
  held = ['layers/0/weight', 'layers/3/weight']
  _check(fn, arrays, _normal(2, 3, 7, 7), held=held)


def _conv(w, x, **settings):
  """A convolution of images [N, ..., C], over as many axes as they have."""
  axes = 'DHW'[5 - x.ndim :]
  settings = {'window_strides': (1,) * len(axes), 'padding': 'SAME'} | settings
  return lax.conv_general_dilated(
    x, w, dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'), **settings
  )


def _of(**settings):
  return lambda w, x: _conv(w, x, **settings)


def _unrolled(w, x):
  for layer in w:
    x = jnp.tanh(x @ layer)
  return x


def _indexed(w, x):
  turn = lambda h, i: (jnp.tanh(h @ w[i]), None)
  return lax.scan(turn, x, jnp.arange(len(w)))[0]


def _stack_and_sum(w, x):
  layers = lax.scan(lambda h, w: (jnp.tanh(_conv(w, h)), None), x, w)[0]
  return layers + jnp.sum(w**2)


def _rows_of_a_matrix(w, x):
  add = lambda h, row: (h + row[jnp.newaxis], None)
  return x @ w + lax.scan(add, x, w)[0]


# What a weight and its input go through, their shapes, and why the table says
# that the weight is dense, perhaps besides.
NO_FORM = 'used by a product that has no sparse form'
FORMS = {
  'plain': (_of(), (3, 3, 4, 6), (2, 8, 8, 4), ''),
  'strides': (
    _of(window_strides=(2, 2), padding='VALID'),
    (3, 3, 4, 6),
    (2, 8, 8, 4),
    '',
  ),
  'unequal strides': (
    _of(window_strides=(1, 2)),
    (3, 3, 4, 6),
    (2, 8, 8, 4),
    NO_FORM,
  ),
  'dilated': (
    _of(rhs_dilation=(2, 2)),
    (3, 3, 4, 6),
    (2, 8, 8, 4),
    NO_FORM,
  ),
  'transposed': (
    lambda w, x: lax.conv_transpose(x, w, (2, 2), 'SAME'),
    (3, 3, 4, 6),
    (2, 8, 8, 4),
    NO_FORM,
  ),
  'groups': (
    _of(feature_group_count=2),
    (3, 3, 2, 6),
    (2, 8, 8, 4),
    'used by a convolution in groups',
  ),
  'groups of images': (
    _of(batch_group_count=2),
    (3, 3, 4, 6),
    (4, 8, 8, 4),
    NO_FORM,
  ),
  'images': (
    lambda w, x: _conv(x, w, padding='VALID'),
    (2, 8, 8, 4),
    (3, 3, 4, 6),
    NO_FORM,
  ),
  'reversed': (
    lambda w, x: _conv(w[::-1, ::-1], x),
    (3, 3, 4, 6),
    (2, 8, 8, 4),
    'used by rev',
  ),
  'one axis': (_of(window_strides=(2,)), (3, 4, 6), (2, 9, 4), ''),
  'one axis, dilated': (_of(rhs_dilation=(2,)), (3, 4, 6), (2, 9, 4), NO_FORM),
  'three axes': (_of(), (3, 3, 3, 4, 6), (2, 5, 5, 5, 4), NO_FORM),
  'experts': (
    lambda w, x: jnp.einsum('eio,bei->beo', w, x),
    (4, 8, 6),
    (5, 4, 8),
    '',
  ),
  'experts in another order': (
    lambda w, x: jnp.einsum('iofe,efbi->boef', w, x),
    (8, 6, 3, 2),
    (2, 3, 5, 8),
    '',
  ),
  'experts under vmap': (
    lambda w, x: jax.vmap(lambda w, x: w.T @ x.T, (0, 1))(w, x),
    (4, 8, 6),
    (5, 4, 8),
    '',
  ),
  'convolutions under vmap': (
    lambda w, x: jax.vmap(_conv)(w, x),
    (2, 3, 3, 4, 6),
    (2, 3, 8, 8, 4),
    'used by reshape',
  ),
  'layers of experts': (
    lambda w, x: lax.scan(
      lambda h, w: (jnp.einsum('eio,bei->beo', w, jnp.tanh(h)), None), x, w
    )[0],
    (3, 4, 8, 8),
    (5, 4, 8),
    '',
  ),
  'stack': (
    _stack_and_sum,
    (3, 3, 3, 4, 4),
    (2, 8, 8, 4),
    'and dense for integer_pow',
  ),
  'rows of a matrix': (
    _rows_of_a_matrix,
    (8, 8),
    (5, 8),
    'and dense for add',
  ),
  'slices': (_unrolled, (3, 8, 8), (5, 8), ''),
  'slices in a loop': (_indexed, (3, 8, 8), (5, 8), ''),
  'parts': (
    lambda w, x: jnp.multiply(*(x @ part for part in jnp.split(w, 2, axis=1))),
    (8, 12),
    (5, 8),
    'used by split',
  ),
}


@pytest.mark.parametrize('form', FORMS)
def test_forms_of_products(form):
  use, shape, x_shape, why = FORMS[form]
  fn = lambda theta, x: use(theta['w'], x)
  theta, x = {'w': _normal(*shape)}, _normal(*x_shape, seed=1)
  masks = _masks(theta)
  run = network.without_zeros(fn, masks, theta, x, execution='condensed')
  leaf = run.leaves['w']
  assert leaf.why == why
  assert leaf.held == ('dense' if why.startswith('used') else 'condensed')
  masked = jax.tree.map(jnp.multiply, theta, masks)
  wanted, pull_back = jax.vjp(fn, masked, x)
  to_theta, to_x = pull_back(jnp.cos(wanted))
  with kernel_choice.use('native', 'loops'):
    found, pull_back = jax.vjp(jax.jit(run), network.condense(theta, masks), x)
    grads = pull_back(jnp.cos(wanted))
  for a, b in zip(
    jax.tree.leaves((found, *grads)),
    jax.tree.leaves((wanted, network.condense(to_theta, masks), to_x)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(b).max())


def _scan(theta, x):
  layer = lambda h, w: (jnp.tanh(h @ w), jnp.sum(h))
  return lax.scan(jax.checkpoint(layer), x, theta['w'])


def _loops(theta, x):
  w = theta['w'][0]
  x = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), x)
  return lax.cond(x[0, 0] > 0, lambda h: h @ w, lambda h: h @ w.T, x)


@pytest.mark.parametrize(('fn', 'held'), [(_scan, ['w']), (_loops, [])])
def test_control_flow(fn, held):
  theta, x = {'w': _normal(3, 8, 8)}, _normal(5, 8)
  if fn is _loops:  # a while loop has a gradient in forward mode alone
    masks = _masks(theta)
    run = network.without_zeros(fn, masks, theta, x)
    masked = fn(jax.tree.map(jnp.multiply, theta, masks), x)
    values = network.condense(theta, masks)
    chex.assert_trees_all_close(run(values, x), masked, atol=1e-5)
  else:
    _check(fn, theta, x, held=held)


# How a weight may come to a product, and whether it is then condensed.
WAYS = {
  'transposed': (lambda w, x: jnp.einsum('oi,...i->...o', w, x), True),
  'heads': (
    lambda w, x: jnp.einsum('...i,ibh->...hb', x, w.reshape(8, 2, 4)),
    True,
  ),
  'inputs in parts': (
    lambda w, x: jnp.einsum(
      'abo,...ba->o...', w.reshape(2, 4, 8), x.reshape(-1, 4, 2)
    ),
    True,
  ),
  'bfloat16': (lambda w, x: x @ w.astype(jnp.bfloat16).astype(x.dtype), True),
  'rounded': (lambda w, x: x @ (w * 2), False),
  'with itself': (lambda w, x: x @ (w @ w), False),
  'twice': (lambda w, x: (x @ w) @ w.T, True),
  'over no axis': (lambda w, x: jnp.multiply.outer(x, w), False),
  'one vector': (lambda w, x: x[0] @ w, True),
  'no vector': (lambda w, x: x[:0] @ w, True),
}


@pytest.mark.parametrize('way', WAYS)
def test_ways_to_a_product(way):
  use, is_condensed = WAYS[way]
  held = ['w'] if is_condensed else []
  fn = lambda theta, x: use(theta['w'], x)
  _check(fn, {'w': _normal(8, 8)}, _normal(5, 8), held=held)


def test_the_table_says_what_else_a_leaf_is_used_for():
  def fn(theta, tokens):
    return theta['w'][tokens] @ theta['w'].T @ theta['w']

  theta = {'w': _normal(8, 8)}
  run = _check(fn, theta, jnp.arange(3), held=['w'])
  assert run.leaves['w'].why == (
    'and dense for gather, a product over other axes'
  )


@pytest.mark.parametrize('first', [lambda w: w, lambda w: w.T.T])
def test_a_rule_of_its_own_is_kept_unless_it_is_a_product(first):
  @jax.custom_vjp
  def straight_through(w):
    return jnp.round(jax.jit(first)(w))

  straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))
  theta, x = {'w': 3 * _normal(8, 4)}, _normal(5, 8)
  fn = lambda theta, x: x @ straight_through(theta['w'])
  _check(fn, theta, x, held=[])
  both = lambda theta, x: fn(theta, x) + x @ theta['w']
  _check(both, theta, x, held=['w'])


def test_parts_of_a_weight_on_many_devices_are_dense():
  mesh = jax.make_mesh((2,), ('i',), (AxisType.Auto,))
  product = jax.shard_map(
    jnp.matmul,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(None, 'i')),
    out_specs=PartitionSpec(None, 'i'),
  )
  theta, x = {'w': _normal(8, 4)}, _normal(5, 8)
  _check(lambda theta, x: product(x, theta['w']), theta, x)


def test_vmap_goes_over_what_is_given():
  theta = {'w': _normal(8, 4)}
  masks = _masks(theta)
  fn = lambda theta, x: x @ theta['w']
  x = _normal(3, 5, 8)
  run = network.without_zeros(fn, masks, theta, x[0], execution='condensed')
  values = network.condense(theta, masks)
  found = jax.vmap(run, (None, 0))(values, x)
  expected = fn(network.expand(values, masks), x)
  chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  ('use', 'shape', 'x_shape'),
  [
    (lambda w, x, **out: jnp.dot(x, w, **out), (64, 16), (5, 64)),
    (_conv, (3, 3, 4, 6), (2, 8, 8, 4)),
    (_conv, (1, 1, 64, 16), (2, 8, 8, 64)),
  ],
  ids=['matrix', 'convolution', 'pointwise'],
)
def test_half_precision(use, shape, x_shape, dtype):
  theta = {'w': _normal(*shape).astype(dtype)}
  masks, x = _masks(theta), _normal(*x_shape).astype(dtype)
  fn = lambda theta, x: use(theta['w'], x, preferred_element_type=jnp.float32)
  run = network.without_zeros(fn, masks, theta, x, execution='condensed')
  y = run(network.condense(theta, masks), x)
  assert y.dtype == jnp.float32
  masked = fn(jax.tree.map(jnp.multiply, theta, masks), x)
  chex.assert_trees_all_close(y, masked, rtol=1e-5, atol=1e-5)


def test_leaves_may_be_given_dense():
  theta = {'a': {'w': _normal(8, 8)}, 'b': {'w': _normal(8, 8)}}
  fn = lambda theta, x: x @ theta['a']['w'] @ theta['b']['w']
  masks, x = _masks(theta), _normal(5, 8)
  run = network.without_zeros(fn, masks, theta, x, execution='condensed')
  values = network.condense(theta, masks)
  dense = network.expand(values, masks)
  mixed = {'a': values['a'], 'b': dense['b']}
  chex.assert_trees_all_close(run(mixed, x), run(values, x), atol=1e-6)


def test_small_products_stay_dense_by_themselves():
  theta = {'w': _normal(8, 8)}
  run = network.without_zeros(
    lambda theta, x: x @ theta['w'], _masks(theta), theta, _normal(5, 8)
  )
  assert run.leaves['w'].why == 'faster so'


def test_auto_takes_what_has_few_connections():
  theta = {'a': _normal(512, 256), 'b': _normal(256, 512)}
  masks = {**_masks({'a': theta['a']}, 0.01), **_masks({'b': theta['b']}, 0.99)}
  fn = lambda theta, x: x @ theta['a'] @ theta['b']
  run = network.without_zeros(fn, masks, theta, _normal(64, 512))
  held = {name: leaf.held for name, leaf in run.leaves.items()}
  assert held == {'a': 'condensed', 'b': 'dense'}


@pytest.mark.parametrize('backward', [True, False])
def test_tuning_runs_every_choice_and_takes_the_fastest(backward):
  theta = {name: _normal(64, 64) for name in 'abc'}
  densities = {'a': 0.03, 'b': 0.3, 'c': 0.8}
  masks = {}
  for name, density in densities.items():
    masks |= _masks({name: theta[name]}, density)
  x = _normal(8, 64)

  def fn(theta, x):
    for name in 'abc':
      x = jnp.tanh(x @ theta[name])
    return {'x': x, 'count': jnp.array(3)}

  given = fn, masks, theta, x
  tuned = sparse.tune(*given, backward=backward, repeats=2)
  choices = {
    'dense': (),
    'condensed': ('a', 'b', 'c'),
    'of at most 5%': ('a',),
    'of at most 40%': ('a', 'b'),
  }
  assert list(tuned.seconds) == list(choices)
  fastest = min(tuned.seconds, key=tuned.seconds.get)
  assert tuned.leaves == choices[fastest]
  assert 'times as fast as dense' in str(tuned)
  run = network.without_zeros(*given, execution=('a',))
  assert [leaf.held for leaf in run.leaves.values()] == [
    'condensed',
    'dense',
    'dense',
  ]
  masked = jax.tree.map(jnp.multiply, theta, masks)
  values = network.condense(theta, masks)
  found = run({**masked, 'a': values['a']}, x)
  np.testing.assert_allclose(found['x'], fn(masked, x)['x'], atol=1e-5)
  with pytest.raises(ValueError, match='repeats must be at least 1, got 0'):
    sparse.tune(*given, repeats=0)
  with pytest.raises(ValueError, match="execution names 'd', which has no"):
    network.without_zeros(*given, execution=('d',))


def _bottleneck(theta, x):
  x = jax.nn.relu(_conv(theta['in']['w'], x))
  x = jax.nn.relu(_conv(theta['3x3']['w'], x, window_strides=(2, 2)))
  x = _conv(theta['out']['w'], x, window_strides=(2, 2))
  return x.mean((1, 2)) @ theta['logits']['w']


def _small():
  theta = {
    'in': {'w': _normal(1, 1, 12, 16)},
    '3x3': {'w': _normal(3, 3, 16, 16)},
    'out': {'w': _normal(1, 1, 16, 64)},
    'logits': {'w': _normal(64, 11)},
  }
  return _bottleneck, theta, _normal(80, 8, 8, 12)


def _resnet_50():
  net, images = nets.make('resnet_50', 11), _normal(80, 32, 32, 3)
  init = lambda key: net.init(key, images, is_training=True)
  theta, state = jax.eval_shape(init, jax.random.key(0))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  fn = lambda theta, x: net.apply(theta, state, None, x, is_training=True)[0]
  return fn, theta, images


def _dense_copies(make, *kernels):
  """Weights of whose size a step compiled with these kernels has a buffer.

  No activation has such a size: their batch is 80, in tiles of 64 and 16, and 5
  divides none.
  """
  fn, theta, x = make()
  rng = np.random.default_rng(0)
  masks = trees.map_leaves(
    lambda leaf: (
      rng.random(leaf.value.shape) < 0.1
      if leaf.name == 'w'
      else np.ones(leaf.value.shape, bool)
    ),
    theta,
  )
  run = network.without_zeros(fn, masks, theta, x, execution='condensed')
  assert {(leaf.held, leaf.why) for leaf in run.leaves.values()} == {
    ('condensed', '')
  }
  values = jax.tree.map(
    lambda leaf, mask: jax.ShapeDtypeStruct(
      leaf.shape if mask.all() else (1, mask.sum()), leaf.dtype
    ),
    theta,
    masks,
  )

  def step(values, x):
    grads = jax.grad(lambda values: jnp.sum(run(values, x) ** 2))(values)
    return jax.tree.map(lambda v, g: v - g / 10, values, grads)

  with kernel_choice.use(*kernels):
    text = jax.jit(step).lower(values, x).compile().as_text()
  sizes = {
    math.prod(map(int, shape.split(',')))
    for shape in re.findall(r'\w\[([\d,]+)\]', text)
  }
  return {name for name, leaf in run.leaves.items() if leaf.entries in sizes}


@pytest.mark.skipif(not native.is_available(), reason='no compiled kernels')
@pytest.mark.parametrize(
  'make', [_small, pytest.param(_resnet_50, marks=pytest.mark.slow)]
)
def test_a_compiled_step_has_no_dense_copy(make):
  assert not _dense_copies(make, 'native', 'loops')


def test_convolutions_without_a_compiled_kernel_have_a_dense_copy():
  assert _dense_copies(_small, 'loops') == {'3x3/w'}


def _bad(match, fn=None, masks=None, theta=None, error=ValueError):
  theta = {'w': jnp.ones((8, 8))} if theta is None else theta
  masks = {'w': jnp.eye(8, dtype=bool)} if masks is None else masks
  with pytest.raises(error, match=match):
    network.without_zeros(
      fn or (lambda theta, x: x @ theta['w']), masks, theta, jnp.ones((5, 8))
    )


def test_what_cannot_be_is_refused():
  w = jnp.ones((8, 8))
  _bad("does not use 'w'", fn=lambda theta, x: x @ w)
  _bad('masks', masks={'v': jnp.eye(8, dtype=bool)})
  _bad('shape', masks={'w': jnp.ones((4, 8), bool)})
  theta, x = {'w': w}, jnp.ones((5, 8))
  masks, fn = {'w': jnp.eye(8, dtype=bool)}, lambda theta, x: x @ theta['w']
  with pytest.raises(TypeError, match="mask of 'w' is traced"):
    jax.jit(lambda m: network.without_zeros(fn, m, theta, x)(theta, x))(masks)
  with pytest.raises(ValueError, match="execution must be 'condensed'"):
    network.without_zeros(fn, masks, theta, x, execution='masked')
  run = network.without_zeros(fn, masks, theta, x)
  with pytest.raises(ValueError, match=r"'w' have shape \(1, 9\)"):
    run({'w': jnp.ones((1, 9))}, x)
  with pytest.raises(ValueError, match=r"'w' have shape \(1, 9\)"):
    network.expand({'w': jnp.ones((1, 9))}, masks)


IMAGES = {'lenet_300_100': (2, 28, 28, 1), 'lenet_5': (2, 28, 28, 1)}


# One of each kind of layer: the others are made of the same.
FAMILIES = ['lenet_5', 'mnist_cnn', 'wrn_22_2']


@pytest.mark.parametrize(
  'name',
  [
    'lenet_300_100',
    *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES),
  ],
)
def test_networks_of_ours(name):
  net = nets.make(name, 10)
  x = _normal(*IMAGES.get(name, (2, 32, 32, 3)))
  theta, state = net.init(jax.random.key(0), x, is_training=True)
  # Evaluated with the statistics of one step: those of a batch of two images
  # would make rounding large.
  _, state = net.apply(theta, state, jax.random.key(0), x, is_training=True)
  fn = lambda theta, x: net.apply(theta, state, None, x, is_training=False)[0]
  run = _check(fn, theta, x)
  assert not any('dense' in leaf.why for leaf in run.leaves.values())


def test_observed_inputs_give_the_product_again():
  net = nets.make('lenet_5', 10)
  x = _normal(2, 28, 28, 1)
  theta, state = net.init(jax.random.key(0), x, is_training=False)
  fn = lambda theta, x: net.apply(theta, state, None, x, is_training=False)[0]
  y, seen = jax.jit(observe.observe(fn, lambda x: x))(theta, x)
  chex.assert_trees_all_equal(y, jax.jit(fn)(theta, x))
  leaves = trees.by_path(theta)
  assert len(seen) == 4
  (patches,) = seen['lenet_5/conv_0/w']
  w = leaves['lenet_5/conv_0/w']
  conv = lax.conv_general_dilated(
    x, w, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  chex.assert_trees_all_close(patches @ w.reshape(25, -1), conv, atol=1e-5)


@pytest.mark.parametrize(
  'form', ['unequal strides', 'dilated', 'transposed', 'groups', 'three axes']
)
def test_patches_are_what_a_convolution_multiplies(form):
  use, shape, x_shape, _ = FORMS[form]
  w, x = _normal(*shape), _normal(*x_shape, seed=1)
  fn = lambda theta, x: use(theta['w'], x)
  y, seen = observe.observe(fn, lambda x: x)({'w': w}, x)
  (patches,) = seen['w']
  assert observe.observe(fn, jnp.shape)({'w': w}, x[:0])[1]['w'][0][0] == 0
  groups = 2 if form == 'groups' else 1
  patches = patches.reshape(*y.shape[:-1], groups, -1)
  w = w.reshape(patches.shape[-1], groups, -1)
  found = jnp.einsum('...gi,igo->...go', patches, w).reshape(y.shape)
  chex.assert_trees_all_close(found, y, atol=1e-5)


def test_images_may_be_observed_in_the_place_of_patches():
  w, x = _normal(3, 3, 4, 6), _normal(2, 4, 8, 8)
  fn = lambda theta, x: lax.conv(x, theta['w'].T, (1, 1), 'SAME')
  _, seen = observe.observe(fn, lambda x: x, patches=False)({'w': w}, x)
  chex.assert_trees_all_equal(seen['w'], [x.transpose(0, 2, 3, 1)])


def test_what_does_not_enter_a_weight_is_refused():
  for form, match in (
    ('images', "'w' stands for the images of a convolution"),
    ('groups of images', "'w' takes part in a convolution with batch_group"),
  ):
    use, shape, x_shape, _ = FORMS[form]
    fn = observe.observe(lambda theta, x, use=use: use(theta['w'], x), jnp.sum)
    with pytest.raises(ValueError, match=match):
      fn({'w': _normal(*shape)}, _normal(*x_shape))


def test_arrays_of_numpy_are_what_jax_makes_of_them():
  theta, x = {'w': np.eye(8)}, np.ones((5, 8))
  fn = lambda theta, x: x @ theta['w']
  run = network.without_zeros(fn, {'w': theta['w'] > 0}, theta, x)
  chex.assert_trees_all_equal(run(theta, x), jnp.ones((5, 8)))
  assert observe.observe(fn, jnp.sum)(theta, x)[1] == {'w': [40.0]}


@pytest.mark.parametrize('form', ['slices', 'slices in a loop'])
def test_slices_are_observed_one_by_one(form):
  use, shape, x_shape, _ = FORMS[form]
  theta, x = {'w': _normal(*shape)}, _normal(*x_shape)
  fn = lambda theta, x: use(theta['w'], x)
  y, seen = observe.observe(fn, lambda x: (x**2).sum(axis=0))(theta, x)
  chex.assert_trees_all_equal(y, fn(theta, x))
  squares = jnp.stack(seen['w']).reshape(3, 8)
  chex.assert_trees_all_close(squares[0], (x**2).sum(axis=0), rtol=1e-6)


def test_layers_of_a_scan_are_observed_side_by_side():
  theta, x = {'w': _normal(3, 8, 8)}, _normal(5, 8)
  _, seen = observe.observe(_scan, lambda x: (x**2).sum(axis=0))(theta, x)
  (squares,) = seen['w']
  assert squares.shape == (3, 8)
  chex.assert_trees_all_close(squares[0], (x**2).sum(axis=0), rtol=1e-6)
  looped = lambda theta, x: lax.fori_loop(
    0, x[0, 0].astype(int), lambda _, h: h @ theta['w'], x
  )
  with pytest.raises(ValueError, match='inside a while loop'):
    observe.observe(looped, jnp.sum)({'w': theta['w'][0]}, x)
