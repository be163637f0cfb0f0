"""Transformers: against one written out, causal, in a scan, sparse."""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import trees

_SMALL = dict(num_blocks=2, num_heads=2, width=8, context=6)


def _gpt(**settings):
  settings = _SMALL | settings
  return hk.transform_with_state(
    lambda *args: nets.GPT(5, **settings, name='gpt')(*args)
  )


def _vit():
  return nets.make('vit_tiny', 10)


def _start(net, inputs):
  """Weights of the size of one, so that attention is sharp."""
  shapes, _ = jax.eval_shape(
    lambda key: net.init(key, inputs, True), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) / 2,
    shapes,
  )


def _logits(net, theta, inputs):
  return net.apply(theta, {}, None, inputs, False)[0]


_TOKENS = np.random.default_rng(1).integers(0, 5, (3, 6))


def _norm(x, leaves):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * leaves['scale'] + leaves['offset']


def _written_out(theta, tokens):
  """The same, position by position and head by head, in NumPy."""
  of = lambda name: jax.tree.map(np.float64, theta[f'gpt/{name}'])
  whole = jax.tree.map(np.float64, theta['gpt'])
  x = of('tokens')['embeddings'][tokens] + whole['positions'][: len(tokens)]
  for index in range(2):
    part = f'transformer/block_{index}'
    y = _norm(x, of(f'{part}/attention/norm'))
    query, key, value = (
      y @ of(f'{part}/attention/{name}')['w']
      for name in ('query', 'key', 'value')
    )
    found = np.zeros_like(x)
    for t in range(len(tokens)):
      for head in (slice(0, 4), slice(4, 8)):
        scores = key[: t + 1, head] @ query[t, head] / 2
        shares = np.exp(scores - scores.max())
        found[t, head] = shares / shares.sum() @ value[: t + 1, head]
    x = x + found @ of(f'{part}/attention/out')['w']
    y = _norm(x, of(f'{part}/feed_forward/norm'))
    y = y @ of(f'{part}/feed_forward/expand')['w']
    y = y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2
    x = x + y @ of(f'{part}/feed_forward/contract')['w']
  return _norm(x, of('transformer/norm')) @ of('logits')['w']


def test_computes_what_is_written_out():
  net = _gpt()
  theta = _start(net, _TOKENS)
  found = _logits(net, theta, _TOKENS[:, :5])
  for logits, tokens in zip(found, _TOKENS, strict=True):
    np.testing.assert_allclose(
      logits, _written_out(theta, tokens[:5]), rtol=1e-4, atol=1e-4
    )


def test_has_the_size_of_a_published_one():
  # https://github.com/DarshanFofadiya/sparselab, docs/demos/milestone_10.md
  net = nets.make('gpt_mini', 65)
  tokens = jnp.zeros((1, 128), int)
  theta, _ = jax.eval_shape(
    lambda key: net.init(key, tokens, True), jax.random.key(0)
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 10_725_888


def _stacked(theta):
  """Parameters of the scan from those of its blocks."""
  found, blocks = {}, {}
  for module, leaves in theta.items():
    first, block, rest = module.partition('/block_')
    if not block:
      found[module] = leaves
      continue
    index, _, rest = rest.partition('/')
    name = f'{first}/__layer_stack_no_per_layer/blocks/{rest}'
    blocks.setdefault(name, {})[int(index)] = leaves
  for name, parts in blocks.items():
    parts = [parts[index] for index in sorted(parts)]
    found[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  return found


def test_a_scan_is_the_same_and_its_axes_are_those_of_a_stack():
  net, scanned = _gpt(), _gpt(scan=True)
  theta = _start(net, _TOKENS)
  expected = _logits(net, theta, _TOKENS)
  shapes = _start(scanned, _TOKENS)
  stacked = {
    next(n for n in shapes if n.endswith(name.rpartition('/blocks/')[2])): x
    for name, x in _stacked(theta).items()
  }
  chex.assert_trees_all_equal_shapes(stacked, shapes)
  found = _logits(scanned, stacked, _TOKENS)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
  apply = lambda theta: _logits(scanned, theta, _TOKENS)
  for path, axes in pp.leaf_axes(apply, stacked).items():
    if '/blocks/' in path:
      assert axes == pp.Axes((1,), (2,), repeats=(0,))


@pytest.mark.parametrize('make', [_gpt, _vit])
@pytest.mark.slow
def test_does_without_its_zeros(make):
  net = make()
  inputs = _TOKENS
  if make is _vit:
    inputs = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
  theta = _start(net, inputs)
  rng = np.random.default_rng(2)
  masks = trees.map_leaves(
    lambda leaf: rng.random(leaf.value.shape) < (leaf.name != 'w') + 0.3, theta
  )
  fn = lambda theta, x: _logits(net, theta, x)
  run = pp.without_zeros(fn, masks, theta, inputs, execution='condensed')
  assert {leaf.held for leaf in run.leaves.values()} == {'condensed'}
  masked = jax.tree.map(jnp.multiply, theta, masks)
  chex.assert_trees_all_close(
    jax.jit(run)(pp.condense(theta, masks), inputs),
    jax.jit(fn)(masked, inputs),
    rtol=1e-4,
    atol=1e-4,
  )


def test_dropout_is_for_training_and_needs_a_key():
  net = _gpt(dropout=0.5)
  theta = _start(net, _TOKENS)
  run = lambda key: net.apply(theta, {}, key, _TOKENS, True)[0]
  one, other = (run(jax.random.key(key)) for key in range(2))
  assert not jnp.allclose(one, other)
  assert not jnp.allclose(one, _logits(net, theta, _TOKENS))
  with pytest.raises(ValueError, match='was given no key'):
    run(None)


@pytest.mark.parametrize(
  ('settings', 'inputs', 'match'),
  [
    ({}, np.zeros((2, 7), int), 'at most 6 tokens, got 7'),
    ({}, np.zeros((2, 3, 1), int), r'integers of shape \[N, T\], got int64'),
    ({}, np.zeros((2, 3), np.float32), r'got float32\[2, 3\]'),
    ({'num_heads': 3}, _TOKENS, 'must divide the width 8, got 3'),
    ({'num_blocks': 0}, _TOKENS, 'num_blocks must be at least 1, got 0'),
    ({'dropout': 1.0}, _TOKENS, r'dropout must be in \[0, 1\), got 1.0'),
  ],
  ids=['long', 'rank', 'floats', 'heads', 'blocks', 'dropout'],
)
def test_bad_settings_and_inputs_are_refused(settings, inputs, match):
  with pytest.raises(ValueError, match=match):
    _gpt(**settings).init(jax.random.key(0), inputs, True)
