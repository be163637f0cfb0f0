"""Training with a race over α, or with controllers between dispatches."""

import dataclasses
import functools
import tempfile

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adaptive_alpha import (
  control as alpha_control,
)
from experiments.adaptive_alpha import (
  evaluation,
  results,
)
from experiments.adaptive_alpha import (
  runs as alpha_runs,
)
from experiments.adaptive_alpha.control import Problem
from experiments.adaptive_alpha.runs import (
  BranchConfig,
  ControlConfig,
  RaceConfig,
)
from powerprop_jax import nets
from powerprop_jax.optim import adaptive, powerprop, views
from powerprop_jax.train import ensemble, optimizers
from powerprop_jax.train import state as state_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.folder import RunFolder

KEYS = (0, 3)
# 240 examples to train on: an epoch is four steps.
PROBLEM = Problem(
  net=nets.make('mlp', 10),
  splits=splits.load(splits.DataConfig(num_validation=1_197)),
  optimizer=OptimizerConfig(learning_rate=0.1),
  loop=LoopConfig(
    num_steps=24, batch_size=60, eval_every=8, steps_per_dispatch=4
  ),
  keys=KEYS,
  epsilon=0.01,
)
EVERY_EPOCH = ControlConfig(period=1)


def lane(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


RACE = RaceConfig()
BRANCH = BranchConfig()


@functools.cache
def published(name):
  return train(name)


def train(name, alpha=None, *, problem=PROBLEM, race=RACE, branch=BRANCH):
  with tempfile.TemporaryDirectory() as path:
    folder = RunFolder(path, {}, program='test')
    return alpha_runs.train(
      problem, name, alpha, folder, EVERY_EPOCH, race, branch
    )


class RaceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # With this step size a large power diverges.
    self.problem = PROBLEM._replace(
      optimizer=OptimizerConfig(learning_rate=2.0, schedule='cosine'),
      keys=(3,),
    )

  def check_like_fixed(self, found, alpha, steps):
    """The winner is the network that its power alone gives."""
    self.assertEqual(found.steps, 24)
    self.assertEqual(found.own_steps, steps)
    alone = self.problem._replace(
      loop=dataclasses.replace(self.problem.loop, num_steps=steps)
    )
    one = train('fixed', alpha, problem=alone)
    np.testing.assert_array_equal(found.lanes.alpha, [alpha])
    chex.assert_trees_all_close(
      lane(one.state, 0).theta, lane(found.state, 0).theta, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(found.state.step, [steps])
    won, lost = found.verdicts
    self.assertTrue(won['survives'] and np.isfinite(won['loss']))
    self.assertFalse(lost['survives'])

  def test_the_winner_of_a_race_is_like_a_network_with_its_power(self):
    race = RaceConfig((1.0, 16.0))
    found = train('race', problem=self.problem, race=race)
    self.check_like_fixed(found, 1.0, 20)
    self.assertTrue(np.isnan(found.verdicts[1]['accuracy']))
    self.assertEqual([r['step'] for r in found.looks], [0, 4, 12, 20])

  def test_a_branch_with_the_power_of_the_trunk_is_its_continuation(self):
    branch = BranchConfig(1.5, 0.5, (1.5, 32.0), 0.5)
    found = train('branch', problem=self.problem, branch=branch)
    # Of the other twelve steps two lanes have three, the last one six.
    self.check_like_fixed(found, 1.5, 21)
    self.assertEqual([r['step'] for r in found.looks], [0, 8, 12, 15, 21])

  def test_branches_keep_phi(self):
    runs = ensemble.product([1.5], KEYS)
    state = alpha_control.initial_state(PROBLEM, runs, 24)
    branches, found = alpha_control.branch(PROBLEM, state, runs, (1.5, 3.0))
    np.testing.assert_array_equal(found.alpha, [1.5, 1.5, 3.0, 3.0])
    np.testing.assert_array_equal(found.key, [*KEYS, *KEYS])
    np.testing.assert_array_equal(powers(branches.train), found.alpha)
    for index in range(4):
      before, after = lane(state.train, index % 2), lane(branches.train, index)
      chex.assert_trees_all_equal(after.phi, before.phi)
      share = [
        evaluation.share_near_zero(s.theta, PROBLEM.epsilon)
        for s in (before, after)
      ]
      np.testing.assert_allclose(
        branches.jump[index], share[1] - share[0], atol=1e-7
      )
    self.assertEqual(branches.jump[0], 0)
    self.assertGreater(branches.jump[2], 0.1)


class ControlTest(parameterized.TestCase):
  @parameterized.parameters('published_phi', 'per_leaf')
  def test_between_dispatches_it_does_what_the_wrapper_does(self, name):
    found = published(name)
    control = alpha_runs.control_of(PROBLEM, name, EVERY_EPOCH)
    start = jnp.float32(EVERY_EPOCH.initial_alpha)
    if control.per_leaf:
      start = jax.tree.map(
        lambda a: jnp.float32(1.25), lane(powers(found.state), 0)
      )
    tx = adaptive.adaptive_alpha(
      optimizers.make_tx(PROBLEM.optimizer, start, 24),
      control.controller,
      period=control.period,
      hold=control.hold,
    )
    images = splits.to_float(PROBLEM.splits.train.images[:1])
    state = state_lib.create(PROBLEM.net, tx, jax.random.key(KEYS[0]), images)
    rows = splits.batch_indices(KEYS[0], 0, 23, 60, 240)
    advance = jax.jit(step_lib.make_advance(PROBLEM.net, tx))
    # Without the last step, after which only the wrapper has a control point.
    state, _ = advance(state, PROBLEM.splits.train, rows)
    chex.assert_trees_all_close(
      powers(state), lane(powers(found.state), 0), rtol=1e-6
    )

  def test_the_mechanical_gain_is_that_of_the_formula(self):
    generator = np.random.default_rng(0)
    theta = {'m': {'w': generator.normal(0, 0.05, (40, 50)).astype('f4')}}
    tx = powerprop.powerprop(optax.sgd(0.1), jnp.float32(1.5))
    phi, opt_state = views.init(tx, theta)
    control = alpha_runs.control_of(PROBLEM, 'published_phi', EVERY_EPOCH)
    for hold, new in (('phi', 1.75), ('theta', 1.5)):
      state = alpha_control.Controlled(
        state_lib.TrainState(jnp.int32(0), phi, {}, opt_state, None),
        control.controller.init(jnp.float32(1.5)),
        jnp.float32(0),
      )
      changed = alpha_control.change_alpha(
        state, control._replace(hold=hold), 0.01
      )
      np.testing.assert_allclose(powers(changed.train), 1.75)
      size = np.abs(theta['m']['w'].astype(float))
      expected = np.mean(size ** (new / 1.5) < 0.01) - np.mean(size < 0.01)
      # One weight in 2,000 may be on the other side by rounding.
      np.testing.assert_allclose(changed.jump, expected, atol=0.0006)
      self.assertEqual(expected > 0.05, hold == 'phi')

  def test_the_summary_tells_the_mechanical_gain(self):
    found = published('published_phi')
    records = results.results(PROBLEM, found, (1.0,), (0.01,))
    ends = [record for record in records if 'own_steps' in record]
    self.assertEqual([record['key'] for record in ends], list(KEYS))
    for record in ends:
      key, power = record['key'], record['power']
      looks = [r for r in found.looks if r['key'] == key]
      self.assertEqual([r['step'] for r in looks], [0, 8, 16, 24])
      gain = looks[-1]['near_zero'] - looks[0]['near_zero']
      self.assertEqual(record['gain'], gain)
      self.assertGreater(record['mechanical'], 0.02)
      self.assertGreater(power, 1.25)
      (counted,) = (
        r['near_zero']
        for r in records
        if r['key'] == key and r.get('leaf') == 'total' and 'epsilon' in r
      )
      # ≤ there, < here.
      self.assertAlmostEqual(counted, record['near_zero'], places=3)

  def test_a_network_that_diverged_has_no_gain(self):
    look = {'key': 0, 'near_zero': 0.1, 'jump': 0.0, 'power': 1.25}
    end = {'key': 0, 'near_zero': None, 'jump': 0.7, 'power': 9.0}
    found = results.summary(
      alpha_runs.Trained(None, None, [look, end], [], 8, 8), 0
    )
    self.assertTrue(np.isnan(found['gain']))
    self.assertEqual(found['mechanical'], 0.7)

  def test_the_share_near_zero_is_counted_over_weights_alone(self):
    theta = {
      'a': {'w': jnp.array([[0.001, 0.5], [-0.002, 3.0]]), 'b': jnp.zeros(4)},
      'b': {'w': jnp.array([[0.0, 7.0, -0.01, 0.1]])},
    }
    found = evaluation.share_near_zero(theta, 0.01)
    self.assertEqual(found, np.float32(3 / 8))
    theta['b']['w'] = theta['b']['w'].at[0, 1].set(jnp.inf)
    self.assertTrue(jnp.isnan(evaluation.share_near_zero(theta, 0.01)))

  @parameterized.parameters(
    ({'period': 0}, 'period must be at least 1'),
    ({'warm_up': -1}, 'warm_up must be at least 0'),
    ({'initial_alpha': 1.0}, 'must start in'),
    ({'epsilon': 0.0}, 'epsilon must be positive'),
    ({'alpha_max': 100.0}, 'alpha_max must be at most'),
  )
  def test_settings_of_the_rule_are_checked(self, changes, message):
    config = ControlConfig(**changes)
    with self.assertRaisesRegex(ValueError, message):
      alpha_runs.check(PROBLEM, ('published_theta',), config, RACE, BRANCH)
    with self.assertRaisesRegex(ValueError, message):
      alpha_runs.check(PROBLEM, ('per_leaf',), config, RACE, BRANCH)

  @parameterized.parameters(
    ({'candidates': ()}, 'at least one candidate'),
    ({'candidates': (2.0, 2.0)}, 'must differ'),
    ({'candidates': (0.5, 2.0)}, 'at least 1, got 0.5'),
    ({'kept': 0.0}, 'to keep'),
    ({'final_share': 1.5}, 'final_share'),
    ({'candidates': tuple(range(1, 20))}, 'too few'),
  )
  def test_settings_of_the_race_are_checked(self, changes, message):
    race = RaceConfig(**changes)
    with self.assertRaisesRegex(ValueError, message):
      alpha_runs.check(PROBLEM, ('race',), EVERY_EPOCH, race, BRANCH)


def powers(state):
  return evaluation.power_of(state.opt_state)
