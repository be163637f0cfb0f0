"""States survive what people store states with."""

import io
import pickle

import chex
import equinox as eqx
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax import checkpoint as ocp
import pytest
import small

import powerprop_jax as pp


def make_theta():
  return small.two_layers((6, 5), (5, 4))


def adaptive(inner):
  controller = pp.near_zero_controller(0.3)
  return pp.adaptive_alpha(inner, controller, period=3)


SELECT = {
  'default': lambda: pp.is_weight,
  'regex': lambda: pp.by_regex('w$', '^n/'),
  'exclude': lambda: pp.exclude(pp.is_weight, '^n/'),
}
MAKE = {
  'power': lambda s: pp.powerprop(optax.adam(0.1), 2.0, s()),
  'power_tree': lambda s: pp.powerprop(
    optax.sgd(0.1), {'a': {'w': 1.5}, 'n': {'w': jnp.float32(2)}}
  ),
  'rigl': lambda s: pp.rigl(
    pp.powerprop(optax.adam(0.1), 2.0, s()), 0.5, stop=90, period=2, select=s()
  ),
  'snfs': lambda s: pp.snfs(
    pp.powerprop(optax.adamw(0.1), jnp.float32(1.7), s()),
    0.5,
    stop=90,
    period=2,
    regrow='redraw',
  ),
  'adaptive': lambda s: adaptive(
    pp.dsr(
      pp.powerprop(optax.sgd(0.1, 0.9), jnp.float32(2), s()),
      0.5,
      num_dropped=4,
      threshold=0.1,
      stop=90,
      period=2,
      key=jax.random.key(3, impl='rbg'),
    )
  ),
}
CASES = [
  *((make, 'regex') for make in MAKE),
  ('rigl', 'default'),
  ('rigl', 'exclude'),
]


def trained(make, select):
  tx = MAKE[make](SELECT[select])
  return tx, *small.history(tx, make_theta(), 3)[-1]


def by_pickle(state, template):
  del template
  return pickle.loads(pickle.dumps(state))


def by_flax(state, template):
  return serialization.from_bytes(template, serialization.to_bytes(state))


def by_equinox(state, template):
  file = io.BytesIO()
  eqx.tree_serialise_leaves(file, state)
  file.seek(0)
  return eqx.tree_deserialise_leaves(file, template)


def by_numpy(state, template):
  file = io.BytesIO()
  np.savez(file, *jax.tree.leaves(state))
  file.seek(0)
  arrays = np.load(file)
  leaves = [jnp.asarray(arrays[name]) for name in arrays.files]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


@pytest.mark.parametrize(('make', 'select'), CASES)
@pytest.mark.parametrize('store', [by_pickle, by_flax, by_equinox, by_numpy])
@pytest.mark.slow
def test_a_stored_state_goes_on(make, select, store):
  tx, phi, state = trained(make, select)
  # From another process: a transformation that was built again.
  other = MAKE[make](SELECT[select])
  template = other.init(phi)
  restored = store(state, template)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  chex.assert_trees_all_equal(restored, state)
  expected, actual = (
    t.update(phi, s, phi) for t, s in ((tx, state), (other, restored))
  )
  chex.assert_trees_all_equal(actual, expected)


def test_orbax(tmp_path):
  tx, phi, state = trained('rigl', 'regex')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(tx.init, phi)
    restored = checkpointer.restore(tmp_path / 'state', shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize(('make', 'select'), CASES)
def test_building_twice_traces_once(make, select):
  traced = []

  @jax.jit
  def look(phi, state):
    traced.append(1)
    return pp.effective_params(phi, state)

  for _ in range(2):
    look(*pp.init(MAKE[make](SELECT[select]), make_theta()))
  assert len(traced) == 1
