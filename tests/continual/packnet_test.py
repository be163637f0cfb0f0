"""Tasks packed one after another: nothing is forgotten, budgets are kept."""

import itertools

import chex
import haiku as hk
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
  step = packing.jit(
    chex.assert_max_traces(n=1)(packing.make_step(tx)), donate_argnums=(0, 1, 2)
  )
  train = packing.make_train(step, num_steps=5)
  config = packing.config(search='bisect', gamma=0.8)
  for method, private, retrain in itertools.product(
    METHODS, ('freeze', 'per_task'), (None, train)
  ):
    state = continual.init_pack(
      tx, packing.theta(), packing.net_state(), method, private=private
    )
    said, used = {}, packing.shared(state.protected)
    for name, task in _TASKS.items():
      state, _ = continual.learn(
        state,
        name,
        task,
        train,
        packing.evaluate,
        config,
        len(said),
        retrain=retrain,
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
    continual.learn(state, 'd', _TASKS['a'], train, packing.evaluate, config, 3)
    assert _num_programs() == compiled


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
def test_heads_biases_and_norms_are_kept_for_each_task(private):
  state = packing.init(heads=select_lib.by_regex('^n/'), private=private)
  assert state.layout.shared == ('m/w',)
  fit = packing.make_train(packing.jit(packing.make_step(state.tx)), 20)
  head = state.phi['n']['w']

  def train(learner, task):
    # Each head starts as the network was initialised.
    assert packing.same_bits(learner.phi['n']['w'], head)
    return fit(learner, task)

  said = {}
  for name, task in _TASKS.items():
    state, _ = continual.learn(
      state, name, task, train, packing.perfect, packing.config(), len(said)
    )
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
def test_tasks_with_one_head_and_contrary_labels_are_all_learned(method, alpha):
  net = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([128, 4], name='mlp')(x))
  )
  theta = net.init(jax.random.key(0), _X)
  tx = packing.make_tx(optax.adam(0.01), alpha)
  config = packing.config(0.1, 0.2, 0.3, 0.5, gamma=0.9)
  state = continual.init_pack(tx, theta, {}, method)

  @packing.jit
  def fit(phi, opt_state, x, y):
    def loss(theta):
      logits = net.apply(theta, x)
      error = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return error.mean()

    def step(_, carry):
      phi, opt_state = carry
      grads = jax.grad(loss)(views.effective_params(phi, opt_state))
      updates, opt_state = tx.update(grads, opt_state, phi)
      return optax.apply_updates(phi, updates), opt_state

    return jax.lax.fori_loop(0, 200, step, (phi, opt_state))

  @packing.jit
  def accuracy(theta, x, y):
    return (net.apply(theta, x).argmax(1) == y).mean()

  def train(learner, task):
    phi, opt_state = fit(learner.phi, learner.opt_state, task.x, task.y)
    return learner._replace(phi=phi, opt_state=opt_state)

  evaluate = lambda theta, net_state, task: accuracy(theta, task.x, task.y)
  for number, (name, task) in enumerate(_TASKS.items()):
    state, report = continual.learn(
      state, name, task, train, evaluate, config, number, retrain=train
    )
    assert report.dense_score > 0.9
  for name, task in _TASKS.items():
    score = evaluate(*continual.task_params(state, name), task)
    assert score == np.float32(state_lib.find_task(state, name).report.score)
    assert score > 0.9


def test_retraining_moves_new_weights_only_and_sees_the_mask():
  config = packing.config(0.4)
  state, _ = packing.learn(packing.init(), config, 'a')
  dense = {}
  step = packing.jit(packing.make_step(state.tx))

  def retrain(learner, task):
    dense['phi'] = packing.shared(learner.phi)
    theta = views.effective_params(learner.phi, learner.opt_state)
    zeros = (int((t == 0).sum()) for t in packing.shared(theta).values())
    assert sum(zeros) == 30
    return packing.make_train(step)(learner, _TASKS['b'])

  after, report = packing.learn(state, config, 'b', retrain=retrain)
  mask = packing.shared(continual.task_masks(after, 'b'))
  for path, old in dense['phi'].items():
    new = packing.shared(after.phi)[path]
    moves = mask[path] & ~packing.shared(state.protected)[path]
    assert np.any(old != new)
    assert np.all((old == new) | moves)
  assert report.score == 1.0


@pytest.mark.parametrize(
  ('densities', 'scores', 'kept'),
  [
    # Dense, then falling below 0.9 at density 0.2.
    ((0.1, 0.2, 0.4, 0.6), [1.0, 0.97, 0.9, 0.8], (0.4, 0.9, True)),
    # All fail, and the report says so.
    ((0.2, 0.4), [1.0, 0.5], (0.4, 0.5, False)),
  ],
)
def test_mask_kept_is_the_last_that_meets_gamma(densities, scores, kept):
  _, report = packing.learn(
    packing.init(),
    packing.config(*densities, gamma=0.9),
    'a',
    evaluate=packing.scripted(*scores),
  )
  assert report.dense_score == scores[0]
  tried = sorted(densities, reverse=True)[: len(scores) - 1]
  assert report.trials == tuple(zip(tried, scores[1:], strict=True))
  assert (report.density, report.score, report.met) == kept
  assert report.num_kept == 50 - report.num_free == 12 + 8


def test_bisection_evaluates_logarithmically_often():
  calls = []
  densities = ((i + 1) / 32 for i in range(32))
  packing.learn(
    packing.init(),
    packing.config(*densities, search='bisect'),
    'a',
    evaluate=lambda *_: calls.append(0) or 1.0,
  )
  assert len(calls) <= 1 + 6


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
  step = packing.jit(packing.make_step(state.tx), donate_argnums=(0, 1, 2))
  train = lambda learner, _: packing.make_train(step)(learner, _TASKS['a'])
  after, _ = packing.learn(state, packing.config(), 1, train)
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
  step = packing.jit(packing.make_step(state.tx))
  train = lambda learner, _: packing.make_train(step)(learner, _TASKS['b'])
  state, _ = packing.learn(state, packing.config(restart='keep'), 'b', train)
  assert packing.same_bits(continual.task_params(state, 'a'), before)
