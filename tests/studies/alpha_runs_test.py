"""Training with a race over α, or with controllers between dispatches."""

import dataclasses
import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.adaptive_alpha import control as control_lib
from experiments.adaptive_alpha import evaluation, methods, runs
from experiments.adaptive_alpha.config import (
  BranchConfig,
  Config,
  ControlConfig,
  RaceConfig,
)
from powerprop_jax.optim import powerprop, views
from powerprop_jax.optim.alphas import adaptive
from powerprop_jax.train import ensemble, optimizers
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.folder import RunFolder

KEYS = (0, 3)
# 240 examples to train on: an epoch is four steps.
CONFIG = Config(
  data=splits.DataConfig(num_validation=1_197),
  keys=KEYS,
  epochs=6,
  look_every=2,
  control=ControlConfig(period=1),
)
PROBLEM = runs.make_problem(CONFIG, 'mlp')


@functools.cache
def published(method):
  return train(CONFIG, method)


def train(config, method, alpha=None, problem=PROBLEM):
  with tempfile.TemporaryDirectory() as path:
    folder = RunFolder(path, {}, program='test')
    return methods.train(config, problem, method, alpha, folder)


class RaceTest:
  # Of the twelve steps after a trunk two networks have three, the last one six.
  @pytest.mark.parametrize(
    ('method', 'alpha', 'evaluated'),
    [
      ('race', 1.0, [0, 4, 12, 20]),
      pytest.param('branch', 1.5, [0, 8, 12, 15, 21], marks=pytest.mark.slow),
    ],
  )
  def test_the_winner_is_like_a_network_with_its_power_from_the_start(
    self, method, alpha, evaluated
  ):
    # With this step size a large power diverges.
    optimizer = OptimizerConfig(learning_rate=2.0, schedule='cosine')
    problem = PROBLEM._replace(optimizer=optimizer, keys=(3,))
    config = Config(
      race=RaceConfig((1.0, 16.0)),
      branch=BranchConfig(1.5, 0.5, (1.5, 32.0), 0.5),
    )
    found = train(config, method, problem=problem)
    steps = evaluated[-1]
    assert (found.steps, found.own_steps) == (24, steps)
    assert [r['step'] for r in found.evaluations] == evaluated
    shorter = dataclasses.replace(problem.loop, num_steps=steps)
    one = train(CONFIG, 'fixed', alpha, problem._replace(loop=shorter))
    np.testing.assert_array_equal(found.members.alpha, [alpha])
    alone, won = (ensemble.take(x.state, 0).theta for x in (one, found))
    chex.assert_trees_all_close(alone, won, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.state.step, [steps])
    won, lost = found.verdicts
    assert won['survives'] and np.isfinite(won['loss'])
    assert not lost['survives']
    assert np.isnan(lost['accuracy']) or method == 'branch'

  def test_branches_keep_phi(self):
    members = ensemble.product([1.5], KEYS)
    state = control_lib.initial_state(PROBLEM, members, 24)
    branches, found = control_lib.branch(PROBLEM, state, members, (1.5, 3.0))
    np.testing.assert_array_equal(found.alpha, [1.5, 1.5, 3.0, 3.0])
    np.testing.assert_array_equal(found.key, [*KEYS, *KEYS])
    np.testing.assert_array_equal(powers(branches.train), found.alpha)
    for index in range(4):
      before = ensemble.take(state.train, index % 2)
      after = ensemble.take(branches.train, index)
      chex.assert_trees_all_equal(after.phi, before.phi)
      old, new = (
        evaluation.share_near_zero(s.theta, PROBLEM.epsilon)
        for s in (before, after)
      )
      np.testing.assert_allclose(branches.jump[index], new - old, atol=1e-7)
    assert branches.jump[0] == 0
    assert branches.jump[2] > 0.1


class ControlTest:
  @pytest.mark.parametrize('method', ['published_phi', 'per_leaf'])
  @pytest.mark.slow
  def test_between_dispatches_it_does_what_the_wrapper_does(self, method):
    found = ensemble.take(powers(published(method).state), 0)
    control = methods.control_of(PROBLEM, method, CONFIG.control)
    start = jax.tree.map(lambda a: jnp.float32(1.25), found)
    tx = adaptive.adaptive_alpha(
      optimizers.make_tx(PROBLEM.optimizer, start, 24),
      control.controller,
      period=control.period,
      hold=control.hold,
    )
    images = splits.to_float(PROBLEM.splits.train.images[:1])
    state = step_lib.create(PROBLEM.net, tx, jax.random.key(KEYS[0]), images)
    rows = splits.batch_indices(KEYS[0], 0, 23, 60, 240)
    advance = jax.jit(step_lib.make_advance(PROBLEM.net, tx))
    # Without the last step, after which only the wrapper has a control point.
    state, _ = advance(state, PROBLEM.splits.train, rows)
    chex.assert_trees_all_close(powers(state), found, rtol=1e-6)

  def test_the_mechanical_gain_is_that_of_the_formula(self):
    generator = np.random.default_rng(0)
    theta = {'m': {'w': generator.normal(0, 0.05, (40, 50)).astype('f4')}}
    tx = powerprop.powerprop(optax.sgd(0.1), jnp.float32(1.5))
    phi, opt_state = views.init(tx, theta)
    control = methods.control_of(PROBLEM, 'published_phi', CONFIG.control)
    for hold, new in (('phi', 1.75), ('theta', 1.5)):
      state = control_lib.Controlled(
        step_lib.TrainState(jnp.int32(0), phi, {}, opt_state, None),
        control.controller.init(jnp.float32(1.5)),
        jnp.float32(0),
      )
      changed = control_lib.change_alpha(
        state, control._replace(hold=hold), 0.01
      )
      np.testing.assert_allclose(powers(changed.train), 1.75)
      size = np.abs(theta['m']['w'].astype(float))
      expected = np.mean(size ** (new / 1.5) < 0.01) - np.mean(size < 0.01)
      # One weight in 2,000 may be on the other side by rounding.
      np.testing.assert_allclose(changed.jump, expected, atol=0.0006)
      assert (expected > 0.05) == (hold == 'phi')

  @pytest.mark.slow
  def test_the_summary_tells_the_mechanical_gain(self):
    found = published('published_phi')
    records = runs.results(PROBLEM, found, (1.0,), (0.01,))
    ends = [record for record in records if 'own_steps' in record]
    assert [record['key'] for record in ends] == list(KEYS)
    totals = [r for r in records if 'epsilon' in r and r['leaf'] == 'total']
    for record, total in zip(ends, totals, strict=True):
      own = [r for r in found.evaluations if r['key'] == record['key']]
      assert [r['step'] for r in own] == [0, 8, 16, 24]
      gain = own[-1]['near_zero'] - own[0]['near_zero']
      assert record['gain'] == gain
      assert record['mechanical'] > 0.02 and record['power'] > 1.25
      # ≤ there, < here.
      assert round(total['near_zero'] - record['near_zero'], 3) == 0

  def test_a_network_that_diverged_has_no_gain(self):
    first = {'key': 0, 'near_zero': 0.1, 'jump': 0.0, 'power': 1.25}
    last = {'key': 0, 'near_zero': None, 'jump': 0.7, 'power': 9.0}
    trained = methods.Trained(None, None, [first, last], [], 8, 8)
    found = runs.summary(trained, 0)
    assert np.isnan(found['gain']) and found['mechanical'] == 0.7

  def test_the_share_near_zero_is_counted_over_weights_alone(self):
    theta = {
      'a': {'w': jnp.array([[0.001, 0.5], [-0.002, 3.0]]), 'b': jnp.zeros(4)},
      'b': {'w': jnp.array([[0.0, 7.0, -0.01, 0.1]])},
    }
    found = evaluation.share_near_zero(theta, 0.01)
    assert found == np.float32(3 / 8)
    theta['b']['w'] = theta['b']['w'].at[0, 1].set(jnp.inf)
    assert jnp.isnan(evaluation.share_near_zero(theta, 0.01))


def powers(state):
  return evaluation.power_of(state.opt_state)
