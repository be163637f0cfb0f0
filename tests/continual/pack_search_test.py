"""The search keeps the sparsest density that meets the threshold."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.continual import search


def test_last_mask_that_meets_the_threshold_is_kept():
  """The printed loop keeps the one after it, which fails."""
  scores = {0.4: 0.98, 0.3: 0.97, 0.2: 0.95, 0.1: 0.5, 0.05: 0.99}
  found = search.sparsest(scores.__getitem__, tuple(scores), 0.95)
  assert found[:3] == (0.2, 0.95, True)
  # Stops at the first that fails, although 0.05 would pass.
  asked = [0.4, 0.3, 0.2, 0.1]
  assert [tuple(t) for t in found.trials] == [(d, scores[d]) for d in asked]


@pytest.mark.parametrize('how', ['scan', 'bisect'])
@pytest.mark.parametrize(
  ('score', 'expected'),
  [
    # The sparsest is tried too; the printed loop ends with l = 0 after it.
    (lambda density: 1.0, (0.1, 1.0, True)),
    # A tie; with the printed > and γ = 1, nothing could be pruned.
    (lambda density: 0.9, (0.1, 0.9, True)),
    # All fail.
    (lambda density: density, (0.5, 0.5, False)),
  ],
)
def test_ends_of_the_grid(how, score, expected):
  found = search.sparsest(score, (0.1, 0.5, 0.3), 0.9, how)
  assert found[:3] == expected
  assert expected[0] in [trial.density for trial in found.trials]


@pytest.mark.parametrize('num_densities', [1, 2, 3, 7, 8, 30])
def test_bisection_agrees_with_the_scan_in_fewer_evaluations(num_densities):
  densities = np.arange(1, num_densities + 1) / num_densities
  most = math.floor(math.log2(num_densities)) + 1
  for threshold in np.arange(-0.5, num_densities + 2) / num_densities:
    scan, bisect = (
      search.sparsest(lambda density: density, densities, threshold, how)
      for how in ('scan', 'bisect')
    )
    assert scan[:3] == bisect[:3]
    assert len(bisect.trials) <= most


def test_bisection_keeps_what_it_saw_pass_where_scores_are_not_monotone():
  rng = np.random.default_rng(0)
  densities = tuple((i + 1) / 16 for i in range(16))
  for _ in range(50):
    scores = dict(zip(densities, rng.random(16), strict=True))
    found = search.sparsest(scores.__getitem__, densities, 0.5, 'bisect')
    passed = [t.density for t in found.trials if t.score >= 0.5]
    assert found.met == bool(passed)
    assert found.density == min(passed, default=1.0)
    assert found.score == scores[found.density]


def test_grid_is_sorted_and_read_as_printed():
  assert search.grid(np.float32([0.3, 0.1, 0.3])) == (0.1, 0.3)


@pytest.mark.parametrize('density', [0.0, -0.1, 1.01, math.nan, math.inf])
def test_densities_outside_their_range_are_refused(density):
  with pytest.raises(ValueError, match=r'in \(0, 1\]'):
    search.grid((0.5, density, 0.1))


def test_unknown_searches_are_refused():
  with pytest.raises(ValueError, match="'bisect', got 'random'"):
    search.sparsest(lambda density: 1.0, (0.5,), 0.5, 'random')


@pytest.mark.parametrize(
  'value', [0.75, np.float64(0.75), jnp.float32(0.75), jnp.bfloat16(0.75)]
)
def test_numbers_of_all_kinds_are_scores(value):
  assert search.checked_score(value, 'a task') == 0.75


@pytest.mark.parametrize(
  ('value', 'error', 'message'),
  [
    (math.nan, ValueError, 'returned nan for task 7'),
    (jnp.float32(jnp.inf), ValueError, 'returned inf'),
    (-0.5, ValueError, r'returned -0\.5 .* positive and larger'),
    (np.ones((1,)), ValueError, r'shape \(1,\)'),
    (None, TypeError, 'returned None'),
    ('good', TypeError, "returned 'good'"),
  ],
)
def test_other_scores_are_refused(value, error, message):
  with pytest.raises(error, match=message):
    search.checked_score(value, 'task 7')
