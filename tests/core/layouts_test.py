"""Layouts: what axes are by their names, and sparse training in any of them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import powerprop_jax as pp
from powerprop_jax.core import distributions, layouts
from powerprop_jax.core.layouts import Axes


@pytest.mark.parametrize(
  ('path', 'shape', 'layer'),
  [
    ('fc/w', (8, 4), (8, 4)),
    ('fc/weight', (4, 8), (8, 4)),
    ('conv/weight', (4, 8, 3, 2), (3, 2, 8, 4)),
    ('conv/kernel', (3, 2, 8, 4), (3, 2, 8, 4)),
    ('attention/query/kernel', (8, 2, 5), (8, 10)),
    ('attention/out/kernel', (2, 5, 8), (10, 8)),
    ('wave/kernel', (3, 8, 4), (3, 8, 4)),
    ('fc/b', (4,), (4,)),
    ('scale', (), ()),
  ],
)
def test_names_say_what_axes_are(path, shape, layer):
  found = layouts.layout(path, shape, None)
  assert found.axes.layer(shape) == layer


@pytest.mark.parametrize(
  ('name', 'is_weight'),
  [
    ('fc/weight', True),
    ('layers/0/kernel', True),
    ('LayerNorm_0/kernel', False),
    ('bn1/weight', False),
    ('embedding/weight', False),
    ('tok_embed/weight', False),
    ('wte/weight', False),
    ('ebnf/weight', True),
    ('fc/scale', False),
  ],
)
def test_weights_are_told_from_norms_and_embeddings(name, is_weight):
  module, _, leaf = name.rpartition('/')
  assert pp.is_weight(module, leaf, jnp.zeros((2, 2))) == is_weight


@pytest.mark.parametrize(
  'distribution',
  [pp.erk, pp.distributions.er, distributions.equal_per_filter],
)
def test_budgets_do_not_depend_on_the_layout(distribution):
  haiku = {'a': {'w': (3, 3, 4, 8)}, 'b': {'w': (32, 10)}, 'c': {'w': (10, 6)}}
  torch = {
    'a': {'weight': (8, 4, 3, 3)},
    'b': {'weight': (10, 32)},
    'c': {'weight': (6, 10)},
  }
  share = lambda shapes: list(
    distribution(
      jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
      ),
      0.8,
    ).values()
  )
  assert share(haiku) == share(torch)


def test_a_stack_has_the_sparsity_of_its_layers():
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  alone = {f'l{i}': {'w': struct(16, 16)} for i in range(4)}
  alone['head'] = stack_head = {'w': struct(16, 4)}
  stack = {'l': {'w': struct(4, 16, 16)}, 'head': stack_head}
  axes = {'l/w': Axes((1,), (2,), repeats=(0,))}
  wanted = pp.erk(alone, 0.6)
  found = pp.erk(stack, 0.6, axes=axes)
  assert found['l/w'] == pytest.approx(wanted['l0/w'])
  assert found['head/w'] == pytest.approx(wanted['head/w'])


METHODS = {
  'static': lambda tx, **options: pp.static(tx, 0.7, **options),
  'rigl': lambda tx, **options: pp.rigl(tx, 0.7, period=2, stop=9, **options),
  'set': lambda tx, **options: pp.sparse_evolution(
    tx, 0.7, period=2, stop=9, **options
  ),
  'snfs': lambda tx, **options: pp.snfs(tx, 0.7, period=2, stop=9, **options),
  'gradual': lambda tx, **options: pp.gradual_pruning(
    tx, 0.7, start=0, stop=6, period=2, **options
  ),
  'ablation': lambda tx, **options: pp.rigl(
    tx, 0.7, period=2, stop=9, ablation=pp.Ablation(pp.is_weight), **options
  ),
}


def _trained(method, theta, loss, **options):
  tx = METHODS[method](optax.sgd(0.1), structure='constant_fan_in', **options)

  @jax.jit
  def step(phi, state):
    grads = jax.grad(loss)(pp.effective_params(phi, state))
    updates, state = tx.update(grads, state, phi)
    return optax.apply_updates(phi, updates), state

  phi, state = pp.init(tx, theta)
  for _ in range(10):
    phi, state = step(phi, state)
  return pp.current_masks(phi, state)


@pytest.mark.parametrize('method', METHODS)
def test_neurons_are_outputs_whatever_the_layout(method):
  key = jax.random.key(0)
  theta = {'fc': {'weight': jax.random.normal(key, (6, 10))}}
  x = jax.random.normal(jax.random.key(1), (7, 10))
  loss = lambda theta: jnp.mean((x @ theta['fc']['weight'].T - 1) ** 2)
  masks = _trained(method, theta, loss)['fc']['weight']
  fan_ins = set(masks.sum(axis=1).tolist()) - {0}
  assert len(fan_ins) == 1
  assert method == 'ablation' or fan_ins == {3}


def test_axes_say_what_names_do_not():
  theta = {'w': jax.random.normal(jax.random.key(0), (3, 4, 10))}
  x = jax.random.normal(jax.random.key(1), (7, 10))
  fn = lambda theta, x: jnp.einsum('loi,ni->nlo', theta['w'], x)
  axes = pp.leaf_axes(fn, theta, x)
  assert axes == {'w': Axes((2,), (0, 1))}
  loss = lambda theta: jnp.mean((fn(theta, x) - 1) ** 2)
  masks = _trained('rigl', theta, loss, axes=axes)['w']
  assert set(masks.sum(axis=2).ravel().tolist()) == {3}
