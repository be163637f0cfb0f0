"""States survive what people store states with."""

import io
import pickle

import chex
import contracts_test
import equinox as eqx
from flax import serialization
import inners
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.train.checkpoints import checkpoint


def selective(make_select, key=0):
  power = pp.powerprop(optax.adam(0.1), 2.0, make_select())
  moves = {'stop': 90, 'period': 2, 'select': make_select()}
  return pp.rigl(power, 0.5, regrow='redraw', key=key, **moves)


# Functions and keys that states hold.
HELD = {
  'default': lambda: selective(lambda: pp.is_weight),
  'regex': lambda: selective(lambda: pp.by_regex('w$', '^n/')),
  'exclude': lambda: selective(lambda: pp.exclude(pp.is_weight, '^n/')),
  'key': lambda: selective(lambda: pp.is_weight, jax.random.key(3, impl='rbg')),
}


def build(name, inner):
  return HELD[name]() if name in HELD else contracts_test.build(name, inner)


def by_checkpoint(state, template, path):
  with checkpoint.Checkpoints(path / 'checkpoints') as checkpoints:
    checkpoints.save(7, state, {})
    checkpoints.wait()
    shapes = jax.eval_shape(lambda: template)
    restored, step, _ = checkpoints.restore_latest(shapes)
  assert step == 7
  return restored


def by_pickle(state, template, path):
  return pickle.loads(pickle.dumps(state))


def by_flax(state, template, path):
  return serialization.from_bytes(template, serialization.to_bytes(state))


def by_equinox(state, template, path):
  eqx.tree_serialise_leaves(path / 'state', state)
  return eqx.tree_deserialise_leaves(path / 'state', template)


def by_numpy(state, template, path):
  file = io.BytesIO()
  np.savez(file, *jax.tree.leaves(state))
  file.seek(0)
  arrays = np.load(file)
  leaves = [jnp.asarray(arrays[name]) for name in arrays.files]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


@pytest.mark.parametrize(
  ('transformation', 'inner'),
  inners.cases(
    [*contracts_test.FEWER_PAIRS, *((name, 'adam') for name in HELD)]
  ),
)
def test_a_stored_state_comes_back(transformation, inner, tmp_path):
  # From another process: a transformation that was built again.
  state, template = (
    pp.init(build(transformation, inner), small.weights()) for _ in range(2)
  )
  numbered = lambda x: (
    jnp.arange(1, 1 + x.size).reshape(x.shape).astype(x.dtype)
  )
  state = jax.tree.map(numbered, state)
  for store in (by_checkpoint, by_pickle, by_flax, by_equinox, by_numpy):
    restored = store(state, template, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)


@pytest.mark.parametrize(
  'transformation',
  [*HELD, 'powerprop', 'powerprop_tree', 'snfs', 'rigl_adaptive'],
)
def test_building_twice_traces_once(transformation):
  look = jax.jit(chex.assert_max_traces(pp.effective_params, n=1))
  for _ in range(2):
    look(*pp.init(build(transformation, 'adam'), small.weights()))
