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
from powerprop_jax.optim import sparsify, views
from powerprop_jax.optim.topologies import protected

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
def test_earlier_tasks_keep_their_bits_and_nothing_compiles_again(inner, alpha):
  """For both methods, with and without retraining, norms frozen and not."""
  tx = packing.make_tx(inners.INNERS[inner](), alpha)
  step = packing.jit(
    chex.assert_max_traces(n=1)(packing.make_step(tx)), donate_argnums=(0, 1, 2)
  )
  train = packing.make_train(step, num_steps=5)
  for method, private, retrains in itertools.product(
    METHODS, ('freeze', 'per_task'), (False, True)
  ):
    config = packing.config(method, private=private, search='bisect', gamma=0.8)
    state = continual.init_pack(
      tx, packing.theta(), packing.net_state(), config
    )
    said, used = {}, packing.theta()
    used = jax.tree.map(lambda t: np.zeros(t.shape, bool), used)
    for name, task in _TASKS.items():
      state, _ = continual.learn(
        state,
        name,
        task,
        train,
        packing.evaluate,
        config,
        len(said),
        retrain=train if retrains else None,
      )
      said[name] = [
        continual.predict(packing.apply, state, name, _X),
        continual.task_params(state, name),
      ]
      for earlier, expected in said.items():
        again = [
          continual.predict(packing.apply, state, earlier, _X),
          continual.task_params(state, earlier),
        ]
        assert packing.same_bits(again, expected)
      mask = continual.task_masks(state, name)
      now = jax.tree.map(np.asarray, state.protected)
      for path, leaf in packing.shared(now).items():
        np.testing.assert_array_equal(
          leaf, packing.shared(used)[path] | packing.shared(mask)[path]
        )
      used = now
    outputs = [np.asarray(outputs) for outputs, _ in said.values()]
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[1], outputs[2])
    compiled = _num_programs()
    state, _ = continual.learn(
      state, 'd', _TASKS['a'], train, packing.evaluate, config, 3
    )
    assert _num_programs() == compiled


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
def test_heads_and_batch_norm_of_haiku_are_kept_for_each_task(private):
  def forward(x, is_training):
    x = jax.nn.relu(hk.Linear(16, name='hidden')(x))
    x = hk.BatchNorm(True, True, 0.9, name='norm')(x, is_training)
    return hk.Linear(4, name='logits')(x)

  net = hk.without_apply_rng(hk.transform_with_state(forward))
  theta, net_state = net.init(jax.random.key(0), _X, True)
  tx = sparsify.sparsify(optax.adamw(0.02), protected.protected())
  config = packing.config(
    heads=select_lib.by_regex('logits'), private=private, scope='global'
  )
  state = continual.init_pack(tx, theta, net_state, config)
  assert state.layout.shared == ('hidden/w',)

  @jax.jit
  def step(phi, net_state, opt_state, x, y):
    def loss(theta):
      logits, after = net.apply(theta, net_state, x, True)
      error = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return error.mean(), after

    theta = views.effective_params(phi, opt_state)
    grads, after = jax.grad(loss, has_aux=True)(theta)
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), after, opt_state

  apply = jax.jit(lambda theta, state, x: net.apply(theta, state, x, False)[0])

  def train(learner, task):
    head = packing.leaves(learner.phi)['logits/w']
    assert packing.same_bits(head, theta['logits']['w'])
    for _ in range(20):
      learner = continual.Learner(*step(*learner, task.x, task.y))
    return learner

  said = {}
  for name, task in _TASKS.items():
    state, _ = continual.learn(
      state, name, task, train, packing.perfect, config, len(said)
    )
    said[name] = continual.predict(apply, state, name, _X)
    for earlier, expected in said.items():
      again = continual.predict(apply, state, earlier, _X)
      assert packing.same_bits(again, expected)
  (first, first_norms), (last, last_norms) = (
    continual.task_params(state, name) for name in ('a', 'c')
  )
  assert not packing.same_bits(first['logits'], last['logits'])
  frozen = private == 'freeze'
  assert packing.same_bits(first['norm'], last['norm']) == frozen
  assert packing.same_bits(first['hidden']['b'], last['hidden']['b']) == frozen
  assert packing.same_bits(first_norms, last_norms) == frozen
  # Norm statistics were learned, not those of the start.
  assert not packing.same_bits(first_norms, net_state)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('alpha', [1.0, 1.5])
def test_tasks_with_one_head_and_contrary_labels_are_all_learned(method, alpha):
  def forward(x):
    return hk.nets.MLP([128, 4], name='mlp')(x)

  net = hk.without_apply_rng(hk.transform(forward))
  theta = net.init(jax.random.key(0), _X)
  tx = packing.make_tx(optax.adam(0.01), alpha)
  config = packing.config(method, densities=(0.1, 0.2, 0.3, 0.5), gamma=0.9)
  state = continual.init_pack(tx, theta, {}, config)

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
  config = packing.config(densities=(0.4,))
  state, _ = packing.learn(packing.init(config), config, 'a')
  dense = {}

  def remember(learner, task):
    dense['phi'] = jax.tree.map(np.asarray, learner.phi)
    return learner

  step = packing.jit(packing.make_step(state.tx))

  def retrain(learner, task):
    theta = views.effective_params(learner.phi, learner.opt_state)
    dense['zeros'] = sum(
      int((t == 0).sum()) for t in packing.shared(theta).values()
    )
    return packing.make_train(step)(learner, _TASKS['b'])

  after, report = packing.learn(
    state, config, 'b', train=remember, retrain=retrain
  )
  assert dense['zeros'] == 30
  mask = packing.shared(continual.task_masks(after, 'b'))
  for path, old in packing.shared(dense['phi']).items():
    new = packing.shared(after.phi)[path]
    moves = mask[path] & ~packing.shared(state.protected)[path]
    assert np.any(old != new)
    assert np.all((old == new) | moves)
  assert report.score == 1.0


def test_mask_kept_is_the_last_that_meets_gamma():
  """Scripted scores: dense 1.0, then falling below 0.9 at density 0.2."""
  densities = (0.1, 0.2, 0.4, 0.6)
  scores = iter([1.0, 0.97, 0.9, 0.8])
  _, report = packing.learn(
    packing.init(packing.config()),
    packing.config(densities=densities, gamma=0.9),
    'a',
    evaluate=lambda *_: next(scores),
  )
  assert report.dense_score == 1.0
  assert report.trials == ((0.6, 0.97), (0.4, 0.9), (0.2, 0.8))
  assert (report.density, report.score, report.met) == (0.4, 0.9, True)
  assert report.num_kept == 12 + 8
  assert report.num_kept == 50 - report.num_free


def test_the_densest_mask_is_kept_if_all_fail_and_the_report_says_so():
  scores = iter([1.0, 0.5, 0.8])
  _, report = packing.learn(
    packing.init(packing.config()),
    packing.config(),
    'a',
    evaluate=lambda *_: next(scores),
  )
  assert (report.density, report.score, report.met) == (0.4, 0.5, False)


def test_bisection_evaluates_logarithmically_often():
  calls = []
  densities = tuple((i + 1) / 32 for i in range(32))
  evaluate = lambda *_: calls.append(0) or 1.0
  packing.learn(
    packing.init(packing.config()),
    packing.config(densities=densities, search='bisect'),
    'a',
    evaluate=evaluate,
  )
  assert len(calls) <= 1 + 6


def _free_values(config, alpha=2.0):
  """φ with which a second task begins, in free weights and before."""
  state = packing.init(config, alpha=alpha)
  seen = {}

  def look(learner, task):
    seen['phi'] = jax.tree.map(np.asarray, learner.phi)
    return learner

  state, _ = packing.learn(state, config, 'a')
  packing.learn(state, config, 'b', train=look)
  return state, seen['phi']


def test_free_weights_are_drawn_anew_in_theta_space():
  state, phi = _free_values(packing.config(densities=(0.02,)))
  scale = {
    p: np.sqrt(np.mean(t**2))
    for p, t in packing.shared(packing.theta()).items()
  }
  for path, values in packing.shared(phi).items():
    owned = packing.shared(state.protected)[path]
    before = packing.shared(state.phi)[path]
    assert packing.same_bits(values[owned], before[owned])
    assert np.all(values[~owned] != before[~owned])
    drawn = np.sign(values[~owned]) * values[~owned] ** 2  # ψ at α = 2
    assert 0.6 < np.sqrt(np.mean(drawn**2)) / scale[path] < 1.5
  assert packing.same_bits(phi['m']['b'], state.phi['m']['b'])


def test_users_initial_distribution_is_drawn_from():
  fours = lambda key: jax.tree.map(
    lambda t: jnp.full(t.shape, 4.0), packing.theta()
  )
  state, phi = _free_values(packing.config(initialise=fours))
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
  state, phi = _free_values(packing.config(method, restart=restart), alpha)
  for path, values in packing.shared(phi).items():
    owned = packing.shared(state.protected)[path]
    now, before = values[~owned], packing.shared(state.phi)[path][~owned]
    assert np.all(now == 0) == (expected == 'zero')
    assert np.array_equal(now, before) == (expected == 'keep')
    assert not np.any(np.signbit(now) & (now == 0))


def test_state_of_an_earlier_call_is_untouched():
  config = packing.config()
  state = packing.init(config)
  arrays = continual.to_arrays(state)
  step = packing.jit(packing.make_step(state.tx), donate_argnums=(0, 1, 2))
  after, _ = continual.learn(
    state, 1, _TASKS['a'], packing.make_train(step), packing.evaluate, config, 0
  )
  assert packing.same_bits(continual.to_arrays(state), arrays)
  assert (state.task_ids, after.task_ids) == ((), (1,))


def test_negative_zeros_that_are_protected_keep_their_sign():
  config = packing.config(restart='keep')
  state = packing.init(config, inner=optax.sgd(0.1), alpha=1.0)
  negative = lambda learner, task: learner._replace(
    phi=jax.tree.map(lambda p: jnp.where(p > 0, p, -0.0), learner.phi)
  )
  state, _ = packing.learn(
    state, packing.config(densities=(0.9,)), 'a', train=negative
  )
  before = continual.task_params(state, 'a')
  assert any(
    np.any(np.signbit(t) & (t == 0)) for t in packing.leaves(before[0]).values()
  )
  step = packing.jit(packing.make_step(state.tx))
  state, _ = continual.learn(
    state,
    'b',
    _TASKS['b'],
    packing.make_train(step),
    packing.perfect,
    config,
    1,
  )
  assert packing.same_bits(continual.task_params(state, 'a'), before)
