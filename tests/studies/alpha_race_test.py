"""The race over α, with scores that are given."""

import itertools

import numpy as np
import pytest

from experiments.adaptive_alpha import race
from powerprop_jax.train import ensemble
from powerprop_jax.train.runs.errors import UserError


class RungsTest:
  @pytest.mark.parametrize('num_candidates', (1, 2, 6, 7, 16))
  @pytest.mark.parametrize('num_steps', (900, 41_265))
  @pytest.mark.parametrize('final_share', (0.1, 0.6, 0.9))
  def test_all_networks_together_take_the_budget(
    self, num_candidates, num_steps, final_share
  ):
    ladder = race.rungs(num_candidates, num_steps, final_share)
    spent = [rung.num_members * rung.num_steps for rung in ladder]
    assert sum(spent) == num_steps
    assert spent[-1] >= round(final_share * num_steps, 6)
    assert ladder[0].num_members == num_candidates
    assert ladder[-1].num_members == 1
    for before, after in itertools.pairwise(ladder):
      assert after.num_members == -(-before.num_members // 2)
    for rung in ladder:
      assert rung.num_steps >= 1

  def test_the_smallest_budget_is_one_step_a_lane(self):
    assert race.rungs(1, 7) == ((1, 7),)
    # 6 lanes, then 3, then 2: each rung has at least six steps.
    ladder = race.rungs(6, 45, 0.6)
    assert [rung.num_steps for rung in ladder] == [1, 2, 3, 27]
    with pytest.raises(UserError, match='too few for a race of 6'):
      race.rungs(6, 44, 0.6)

  @pytest.mark.parametrize(
    ('args', 'message'),
    [
      ((0, 100), 'at least one candidate, got 0'),
      ((2, 0), '0 training steps'),
      ((1, 0), '0 training steps'),
      ((2, 100, 0.0), 'final_share must be in .0, 1., got 0'),
      ((2, 100, 1.0), 'final_share'),
      ((2, 100, float('nan')), 'final_share'),
    ],
  )
  def test_what_cannot_be_is_refused(self, args, message):
    with pytest.raises(UserError, match=message):
      race.rungs(*args)


class SurvivorsTest:
  def test_they_are_the_first_of_a_sorted_list(self):
    generator = np.random.default_rng(0)
    for _ in range(50):
      size = int(generator.integers(1, 9))
      # Few values, so that there are many ties; some networks diverged.
      scores = generator.choice([0.1, 0.5, 0.9, np.nan], size)
      losses = generator.choice([1.0, 2.0, np.inf, np.nan], size)
      num = int(generator.integers(1, size + 1))
      found = race.survivors(scores, losses, num)
      is_lost = ~(np.isfinite(scores) & np.isfinite(losses))

      places = [
        (1, i) if is_lost[i] else (0, -scores[i], losses[i], i)
        for i in range(size)
      ]
      expected = sorted(place[-1] for place in sorted(places)[:num])
      np.testing.assert_array_equal(found, expected)

  def test_what_cannot_be_is_refused(self):
    for losses, num in (([1.0], 0), ([1.0], 2), ([], 1)):
      with pytest.raises(ValueError, match='survivors needs'):
        race.survivors([0.5], losses, num)


class RaceTest:
  def test_each_key_keeps_what_scores_best(self):
    # A network's state is its number and its steps; key 1 likes a large α, key
    # 0 one near 2.
    members = ensemble.product([1.0, 2.0, 3.0, 4.0], [0, 1])
    state = {'number': np.arange(8), 'steps': np.zeros(8, int)}
    ladder = race.rungs(4, 100, 0.6)
    used = np.zeros(2, int)

    def train(state, members, number, num_steps):
      assert num_steps == ladder[number].num_steps
      np.add.at(used, members.key, num_steps)
      return {**state, 'steps': state['steps'] + num_steps}

    def score(state, members):
      near_two = -np.abs(members.alpha - 2)
      scores = np.where(members.key == 0, near_two, members.alpha)
      return scores, np.ones(len(scores))

    found = race.run(state, members, ladder, train=train, score=score)
    np.testing.assert_array_equal(found.members.alpha, [2.0, 4.0])
    np.testing.assert_array_equal(found.members.key, [0, 1])
    np.testing.assert_array_equal(found.state['number'], [2, 7])
    own = race.own_steps(ladder)
    np.testing.assert_array_equal(found.state['steps'], [own, own])
    np.testing.assert_array_equal(used, [100, 100])
    first = [r for r in found.verdicts if r['rung'] == 0 and r['key'] == 0]
    kept = [r['candidate'] for r in first if r['survives']]
    assert len(first) == 4
    # 1 and 3 are equally far from 2: the lower index goes on.
    assert kept == [1.0, 2.0]

  def test_a_ladder_for_others_is_refused(self):
    members = ensemble.product([1.0, 2.0, 3.0], [0])
    with pytest.raises(ValueError, match='rung 0 is for 2 networks'):
      race.run({}, members, race.rungs(2, 100), train=None, score=None)
