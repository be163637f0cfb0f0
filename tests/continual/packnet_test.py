"""Tasks packed one after another: nothing is forgotten, budgets are kept."""

import itertools

import chex
import inners
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import pytest

from powerprop_jax import continual
from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual import weights
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.optim import views

METHODS = ('packnet', 'efficient_packnet')
_TASKS = {name: packing.make_task(i) for i, name in enumerate('abc')}
_X = packing.make_task(9).x


def _num_programs():
  """Programs compiled so far for what learn and the tests call at each task."""
  functions = (
    weights.ranked,
    weights.redrawn,
    weights.merged,
    state_lib.masked_theta,
    packing.accuracy,
  )
  return sum(function._cache_size() for function in functions)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('inner', inners.INNERS)
@pytest.mark.slow
def test_earlier_tasks_keep_their_bits_and_nothing_compiles_again(inner, alpha):
  """For both methods, with and without retraining, norms frozen and not."""
  tx = packing.make_tx(inners.INNERS[inner](), alpha)
  train = packing.make_train(tx, 5, chex.assert_max_traces(n=1))
  config = packing.config(search='bisect', gamma=0.8)
  for method, private, retrain in itertools.product(
    METHODS, ('freeze', 'per_task'), (None, train)
  ):
    state = continual.init_pack(
      tx, packing.theta(), packing.net_state(), method, private=private
    )
    said, used = {}, packing.shared(state.protected)
    for name, task in _TASKS.items():
      state, _ = packing.learn(
        *(state, config, name, train, packing.evaluate, task), retrain=retrain
      )
      said[name] = None
      for earlier, expected in said.items():
        again = [
          continual.predict(packing.apply, state, earlier, _X),
          continual.task_params(state, earlier),
        ]
        said[earlier] = again
        assert expected is None or packing.same_bits(again, expected)
      mask = packing.shared(continual.task_masks(state, name))
      now = packing.shared(state.protected)
      for path, leaf in now.items():
        np.testing.assert_array_equal(leaf, used[path] | mask[path])
      used = now
    a, b, c = (np.asarray(outputs) for outputs, _ in said.values())
    assert not np.array_equal(a, b) and not np.array_equal(b, c)
    compiled = _num_programs()
    packing.learn(state, config, 'd', train, packing.evaluate, _TASKS['a'])
    assert _num_programs() == compiled


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
def test_heads_biases_and_norms_are_kept_for_each_task(private):
  state = packing.init(heads=select_lib.by_regex('^n/'), private=private)
  assert state.layout.shared == ('m/w',)
  fit = packing.make_train(state.tx, 20)
  head = state.phi['n']['w']

  def train(learner, task):
    # Each head starts as the network was initialised.
    assert packing.same_bits(learner.phi['n']['w'], head)
    return fit(learner, task)

  said = {}
  for name, task in _TASKS.items():
    state, _ = packing.learn(state, packing.config(), name, train, task=task)
    said[name] = continual.predict(packing.apply, state, name, _X)
    for earlier, expected in said.items():
      again = continual.predict(packing.apply, state, earlier, _X)
      assert packing.same_bits(again, expected)
  (first, first_norms), (last, last_norms) = (
    continual.task_params(state, name) for name in ('a', 'c')
  )
  assert not packing.same_bits(first['n'], last['n'])
  frozen = private == 'freeze'
  assert packing.same_bits(first['m']['b'], last['m']['b']) == frozen
  assert packing.same_bits(first_norms, last_norms) == frozen
  # Norm statistics were learned, not those of the start.
  assert not packing.same_bits(first_norms, packing.net_state())


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('alpha', [1.0, 1.5])
@pytest.mark.slow
def test_tasks_with_one_head_and_contrary_labels_are_all_learned(method, alpha):
  tx = packing.make_tx(optax.adam(0.01), alpha)
  config = packing.config(0.1, 0.2, 0.3, 0.5, gamma=0.9)
  network = packing.theta(128), packing.net_state(128)
  state = continual.init_pack(tx, *network, method, private='per_task')
  train = packing.make_train(tx, 200)
  for name, task in _TASKS.items():
    state, report = packing.learn(
      *(state, config, name, train, packing.evaluate, task), retrain=train
    )
    assert report.dense_score > 0.9
  for name, task in _TASKS.items():
    score = packing.evaluate(*continual.task_params(state, name), task)
    assert score == np.float32(state_lib.find_task(state, name).report.score)
    assert score > 0.9


def test_retraining_moves_new_weights_only_and_sees_the_mask():
  config = packing.config(0.4)
  state, _ = packing.learn(packing.init(), config, 'a')
  dense, train = {}, packing.make_train(state.tx)

  def retrain(learner, task):
    dense['phi'] = packing.shared(learner.phi)
    theta = views.effective_params(learner.phi, learner.opt_state)
    zeros = (int((t == 0).sum()) for t in packing.shared(theta).values())
    assert sum(zeros) == 30
    return train(learner, task)

  after, report = packing.learn(
    state, config, 'b', task=_TASKS['b'], retrain=retrain
  )
  mask = packing.shared(continual.task_masks(after, 'b'))
  for path, old in dense['phi'].items():
    new = packing.shared(after.phi)[path]
    moves = mask[path] & ~packing.shared(state.protected)[path]
    assert np.any(old != new)
    assert np.all((old == new) | moves)
  assert report.score == 1.0


@pytest.mark.parametrize(
  ('search', 'trials', 'met'),
  [
    ('scan', ((0.6, 0.97), (0.4, 0.9), (0.2, 0.8)), True),
    ('bisect', ((0.4, 0.9), (0.2, 0.8)), True),
    # All fail, and the report says so.
    ('scan', ((0.4, 0.5),), False),
  ],
)
def test_mask_kept_is_the_last_that_meets_gamma(search, trials, met):
  densities = (0.1, 0.2, 0.4, 0.6) if met else (0.2, 0.4)
  config = packing.config(*densities, gamma=0.9, search=search)
  evaluate = packing.scripted(1.0, *(score for _, score in trials))
  _, report = packing.learn(packing.init(), config, 'a', evaluate=evaluate)
  assert (report.dense_score, report.trials) == (1.0, trials)
  assert (report.density, report.met) == (0.4, met)
  assert report.score == dict(trials)[0.4]
  assert report.num_kept == 50 - report.num_free == 12 + 8


def _second_start(state, config):
  """φ with which a second task begins, and the state before it."""
  seen = {}

  def look(learner, task):
    seen['phi'] = jax.tree.map(np.asarray, learner.phi)
    return learner

  state, _ = packing.learn(state, config, 'a')
  packing.learn(state, config, 'b', train=look)
  return state, seen['phi']


def test_free_weights_are_drawn_anew_in_theta_space():
  state, phi = _second_start(packing.init(), packing.config(0.02))
  for path, values in packing.shared(phi).items():
    owned = packing.shared(state.protected)[path]
    before = packing.shared(state.phi)[path]
    assert packing.same_bits(values[owned], before[owned])
    assert np.all(values[~owned] != before[~owned])
    drawn = np.sign(values[~owned]) * values[~owned] ** 2  # ψ at α = 2
    scale = np.sqrt(np.mean(packing.shared(packing.theta())[path] ** 2))
    assert 0.6 < np.sqrt(np.mean(drawn**2)) / scale < 1.5
  assert packing.same_bits(phi['m']['b'], state.phi['m']['b'])


def test_users_initial_distribution_is_drawn_from():
  fours = lambda key: jax.tree.map(
    lambda t: jnp.full(t.shape, 4.0), packing.theta()
  )
  state, phi = _second_start(packing.init(initialise=fours), packing.config())
  for path, values in packing.shared(phi).items():
    owned = packing.shared(state.protected)[path]
    np.testing.assert_allclose(values[~owned], 2.0, rtol=1e-6)  # ψ⁻¹(4)


@pytest.mark.parametrize(
  ('method', 'alpha', 'restart', 'expected'),
  [
    ('packnet', 1.0, None, 'zero'),
    ('packnet', 2.0, None, 'redraw'),
    ('packnet', 1.0, 'redraw', 'redraw'),
    ('efficient_packnet', 1.0, None, 'redraw'),
    ('efficient_packnet', 2.0, 'keep', 'keep'),
    ('efficient_packnet', 1.0, 'zero', 'zero'),
  ],
)
def test_free_weights_start_as_restart_says(method, alpha, restart, expected):
  config = packing.config(restart=restart)
  state, phi = _second_start(packing.init(method, alpha=alpha), config)
  for path, values in packing.shared(phi).items():
    owned = packing.shared(state.protected)[path]
    now, before = values[~owned], packing.shared(state.phi)[path][~owned]
    assert np.all(now == 0) == (expected == 'zero')
    assert np.array_equal(now, before) == (expected == 'keep')
    assert not np.any(np.signbit(now) & (now == 0))


def test_state_of_an_earlier_call_is_untouched():
  state = packing.init()
  arrays = continual.to_arrays(state)
  train = packing.make_train(state.tx)
  after, _ = packing.learn(state, packing.config(), 1, train, task=_TASKS['a'])
  assert packing.same_bits(continual.to_arrays(state), arrays)
  assert (state.task_ids, after.task_ids) == ((), (1,))


def test_negative_zeros_that_are_protected_keep_their_sign():
  state = packing.init(inner=optax.sgd(0.1), alpha=1.0)
  negative = lambda learner, task: learner._replace(
    phi=jax.tree.map(lambda p: jnp.where(p > 0, p, -0.0), learner.phi)
  )
  state, _ = packing.learn(state, packing.config(0.9), 'a', train=negative)
  before = continual.task_params(state, 'a')
  assert any(
    np.any(np.signbit(t) & (t == 0)) for t in trees.by_path(before[0]).values()
  )
  config, train = packing.config(restart='keep'), packing.make_train(state.tx)
  state, _ = packing.learn(state, config, 'b', train, task=_TASKS['b'])
  assert packing.same_bits(continual.task_params(state, 'a'), before)
