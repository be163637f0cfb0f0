"""A state is printed in a few lines, whatever it holds at the time."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp

_THETA = {'m': {'w': jnp.ones((20, 10)), 'b': jnp.zeros(10)}}


def test_a_state_has_a_few_lines_that_say_what_matters():
  tx = pp.rigl(pp.powerprop(optax.adamw(0.1), 2.0), 0.9, stop=1000)
  _, state = pp.init(tx, _THETA)
  lines = repr(state).splitlines()
  assert len(lines) == 3 and max(map(len, lines)) < 160, lines
  for words in ('step=0', '30 of 210 True', "regrow='keep'", 'alpha=2.0'):
    assert words in repr(state), repr(state)
  # As one of several, too.
  assert len(repr((optax.EmptyState(), state)).splitlines()) == 3


def test_it_is_a_state_like_any_other():
  tx = pp.gradual_pruning(
    pp.powerprop(optax.sgd(0.1), jnp.float32(1.5)), 0.9, start=0, stop=1000
  )
  _, state = pp.init(tx, _THETA)
  again = pickle.loads(pickle.dumps(state))
  assert repr(again) == repr(state)
  assert jax.tree.structure(again) == jax.tree.structure(state)


def test_a_state_without_values_is_printed_all_the_same():
  tx = pp.rigl(pp.powerprop(optax.adam(0.1), jnp.float32(2)), 0.9, stop=1000)
  _, state = pp.init(tx, _THETA)
  said = []

  @jax.jit
  def look(state):
    said.append(repr(state))
    return state

  look(state)
  shapes = jax.eval_shape(lambda: state)
  for found in (said[0], repr(shapes)):
    assert '2 arrays, 210 numbers' in found, found
  for change in (
    lambda leaf: None,
    lambda leaf: 'a sharding',
    lambda leaf: np.asarray(leaf),
  ):
    assert 'SparseState(' in repr(jax.tree.map(change, state))
