"""Iterative pruning: nested masks, exact counts, and where a cycle starts."""

import functools

from absl.testing import parameterized
import chex
import digits_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax.core import distributions, masks, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.prune import iterative, one_shot
from powerprop_jax.prune.iterative import Rewind

SPARSITIES = (0.0, 0.29, 0.5, 0.75)


def make_theta(seed=0):
  shapes = {
    'net/conv': {'w': (3, 3, 2, 5), 'b': (5,)},
    'net/logits': {'w': (17, 1), 'b': (1,)},
    'net/norm': {'scale': (1, 1, 5)},
  }
  return small.normal(shapes, seed)


def shake(theta, existing, step):
  """Training that changes every weight that is left, and its rank."""
  noise = make_theta(seed=step + 100)
  moved = jax.tree.map(lambda t, n: 0.5 * t + n, theta, noise)
  return masks.apply_masks(moved, existing)


def recorded(calls):
  """The same, which remembers what it was called with."""
  copy = lambda args: jax.tree.map(jnp.array, args)
  return lambda *args: calls.append(copy(args)) or shake(*args)


def oracle(theta, sparsities, scope, early=None):
  """Masks and weights of each cycle by sorting in NumPy, trained by shake."""
  names = [name for name in trees.by_path(theta) if name.endswith('/w')]
  alive = {
    name: np.ones(x.shape, bool) for name, x in trees.by_path(theta).items()
  }
  groups = [[name] for name in names] if scope == 'layer' else [names]
  for sparsity in sparsities:
    values = trees.by_path(theta)
    for group in groups:
      sizes = [np.abs(values[name]) for name in group]
      count = masks.num_kept(sum(x.size for x in sizes), sparsity)
      left = small.largest_of_all(sizes, count, [alive[n] for n in group])
      alive.update(zip(group, left, strict=True))
    kept = trees.map_named(
      lambda m, n, x: jnp.asarray(alive[f'{m}/{n}']), theta
    )
    start = theta if early is None else early
    theta = shake(masks.apply_masks(start, kept), kept, 0)
    yield kept, theta


class MasksTest(parameterized.TestCase):
  @parameterized.product(
    scope=('layer', 'global'), early=(None, make_theta(seed=5))
  )
  def test_masks_and_weights_agree_with_sorting(self, scope, early):
    """So survivors return to early weights, and the pruned ones never."""
    theta = make_theta()
    cycles = iterative.iterative_pruning(
      shake, theta, SPARSITIES, Rewind(0, early), scope=scope
    )
    expected = oracle(theta, SPARSITIES, scope, early)
    for cycle, (kept, trained) in zip(cycles, expected, strict=True):
      chex.assert_trees_all_equal(cycle.masks, kept)
      chex.assert_trees_all_close(cycle.theta, trained, rtol=1e-6)

  def test_any_score_ranks_the_trained_weights(self):
    theta, seen = make_theta(), []

    def score(trained):
      seen.append(trained)
      return jax.tree.map(lambda t, t0: jnp.abs(t - t0), trained, theta)

    first, _ = iterative.iterative_pruning(
      shake, theta, (0.3, 0.6), Rewind(0, theta), score=score
    )
    chex.assert_trees_all_equal(seen, [theta, first.theta])

  @parameterized.parameters(
    ([distributions.erk(make_theta(), s) for s in (0.3, 0.6, 0.8)], None),
    # The output layer at half the rate.
    ((0.3, 0.6), lambda s: {'logits/w$': 1 - (1 - s) ** 0.32}),
  )
  def test_leaves_have_sparsities_of_their_own(self, sparsities, overrides):
    theta = make_theta()
    for cycle in iterative.iterative_pruning(
      shake, theta, sparsities, Rewind(0), overrides=overrides
    ):
      given = overrides and overrides(cycle.sparsity)
      counts = one_shot.kept_counts(theta, cycle.sparsity, overrides=given)
      kept = trees.by_path(cycle.masks)
      self.assertEqual({name: kept[name].sum() for name in counts}, counts)


class RewindTest(parameterized.TestCase):
  @parameterized.parameters(0, 700)
  def test_without_weights_training_goes_on_from_the_pruned_ones(self, step):
    calls, before = [], make_theta()
    cycles = iterative.iterative_pruning(
      recorded(calls), before, (0.5, 0.8), Rewind(step)
    )
    # They are computed when the iterator comes to them.
    for number, cycle in enumerate(cycles, 1):
      self.assertLen(calls, number)
      theta, kept, given = calls[-1]
      self.assertEqual(given, step)
      chex.assert_trees_all_equal(kept, cycle.masks)
      chex.assert_trees_all_equal(theta, masks.apply_masks(before, kept))
      before = cycle.theta
    self.assertEqual(number, 2)

  @parameterized.product(
    scope=['layer', 'global'], rewind=[Rewind(9), Rewind(2, make_theta(seed=5))]
  )
  def test_going_on_after_a_cycle_gives_the_same_cycles(self, scope, rewind):
    run = functools.partial(
      iterative.iterative_pruning, shake, rewind=rewind, scope=scope
    )
    whole = list(run(make_theta(), SPARSITIES))
    for done, last in enumerate(whole[:-1], 1):
      rest = list(run(last.theta, SPARSITIES[done:], masks=last.masks))
      chex.assert_trees_all_equal(rest, whole[done:])

  def test_the_state_of_a_network_is_rewound_but_not_pruned(self):
    state = {'norm/~/mean_ema': {'counter': jnp.int32(4), 'w': jnp.ones(3)}}
    theta = (make_theta(), state)
    early = (make_theta(seed=5), jax.tree.map(lambda x: x + 1, state))

    def train(tree, kept, step):
      chex.assert_trees_all_equal(tree[1], early[1])
      return masks.apply_masks(tree, kept)

    for cycle in iterative.iterative_pruning(
      train, theta, (0.5,), Rewind(1, early)
    ):
      chex.assert_trees_all_equal(cycle.masks[1], masks.full_masks(state))
      chex.assert_trees_all_equal_dtypes(cycle.theta, theta)


class DigitsTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0)
  @pytest.mark.slow
  def test_every_procedure_beats_pruning_in_one_shot(self, alpha):
    _, theta_0, *_, train, accuracy = digits_run.make(alpha)
    everything = masks.full_masks(theta_0)
    early = train(theta_0, everything, 0, stop=25)
    trained = train(early, everything, 25)
    at_once = masks.apply_masks(trained, one_shot.prune(trained, 0.95))
    for rewind in (
      Rewind(digits_run.NUM_STEPS),
      Rewind(25),
      Rewind(25, early),
      Rewind(0, theta_0),
    ):
      *_, last = iterative.iterative_pruning(
        train, trained, (0.6, 0.85, 0.95), rewind
      )
      self.assertGreater(accuracy(last.theta), accuracy(trained) - 0.15)
      self.assertGreater(accuracy(last.theta), accuracy(at_once) + 0.1)
      density = masks.density(last.masks, select=select_lib.is_weight)
      self.assertLess(density, 0.0501)


class SparsitiesTest(parameterized.TestCase):
  @parameterized.parameters(0.01, 0.2, 0.5, 0.9)
  def test_each_cycle_removes_the_same_share_of_what_is_left(self, fraction):
    sparsities = np.array([0.0, *iterative.geometric_sparsities(9, fraction)])
    left = 1 - sparsities
    np.testing.assert_allclose(left[1:] / left[:-1], 1 - fraction, rtol=1e-2)

  def test_lottery_tickets_of_the_paper(self):
    """The shares of weights left for which the paper plots LeNet-300-100."""
    inner = iterative.geometric_sparsities(18)
    outer = iterative.geometric_sparsities(18, 0.1)
    published = {3: 51.3, 7: 21.1, 12: 7.0, 15: 3.6, 18: 1.9}
    for number, share in published.items():
      layers = (784 * 300, inner), (300 * 100, inner), (100 * 10, outer)
      left = sum(masks.num_kept(size, s[number - 1]) for size, s in layers)
      self.assertEqual(round(100 * left / 266_200, 1), share)

  @parameterized.parameters(
    (0, 0.2, 'num_cycles must be at least 1, got 0'),
    (3, 0.0, r'fraction must be in \(0, 1\), got 0.0'),
    (3, 1.0, r'fraction must be in \(0, 1\), got 1.0'),
    (3, float('nan'), r'fraction must be in \(0, 1\), got nan'),
    (200, 0.2, '200 cycles .* leave none'),
  )
  def test_impossible_cycles_are_refused(self, num_cycles, fraction, message):
    with self.assertRaisesRegex(ValueError, message):
      iterative.geometric_sparsities(num_cycles, fraction)


def _diverged(number):
  theta = make_theta()
  theta['net/conv']['b'] = theta['net/conv']['b'].at[1].set(number)
  return theta


_SMALLER = make_theta() | {'net/logits': {'w': jnp.ones((16, 1))}}
_DENSER = (
  {'net/conv/w': 0.5, 'net/logits/w': 0.5},
  {'net/conv/w': 0.8, 'net/logits/w': 0.4},
)
_FIXED = lambda s: {'logits': 0.5} if s > 0.6 else {}


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(sparsities=()), 'at least one sparsity'),
    (dict(sparsities=(0.5, 0.5)), 'must increase .* got 0.5 after 0.5'),
    (dict(sparsities=(0.5, 0.8, 0.7)), 'must increase .* got 0.7 after 0.8'),
    (dict(sparsities=(_DENSER[0],) * 2), 'must increase'),
    (dict(sparsities=(0.5, 1.0)), r'sparsity must be in \[0, 1\), got 1.0'),
    (dict(sparsities=(-0.1, 0.5)), r'sparsity must be in \[0, 1\), got -0.1'),
    (dict(sparsities=(0.1, float('nan'))), r'must be in \[0, 1\), got nan'),
    (dict(sparsities=_DENSER), "11 weights in 'net/logits/w', but only 9"),
    (
      dict(overrides=lambda s: {'logits': 0.5 if s == 0.5 else 0.4}),
      "11 weights in 'net/logits/w'",
    ),
    (dict(scope='global', overrides=_FIXED), 'fix the same leaves'),
    (
      dict(masks=one_shot.prune(make_theta(), 0.6)),
      "weights in 'net/conv/w', but only",
    ),
    (
      dict(
        masks=one_shot.prune(make_theta(), 0.6, scope='global'), scope='global'
      ),
      'weights in all leaves, but only',
    ),
    (dict(rewind=Rewind(0, _SMALLER)), "'net/logits/w' is .16, 1. in rewind"),
    (
      dict(masks=masks.full_masks(_SMALLER)),
      "'net/logits/w' is .16, 1. in mas",
    ),
    (dict(masks=make_theta()), "'net/conv/b' is float32", TypeError),
    (dict(rewind=Rewind(0, _diverged(jnp.nan))), "rewind.theta: leaf 'net/con"),
    (dict(theta=_diverged(jnp.inf)), "theta: leaf 'net/conv/b' .* not finite"),
    (dict(rewind=Rewind(-1)), 'at least 0, got -1'),
    (dict(rewind=Rewind(0.5)), 'an integer, got 0.5', TypeError),
    (dict(scope='tree'), "got 'tree'"),
    (dict(select=select_lib.by_regex('kernel')), 'chose none'),
  )
  def test_mistakes_are_seen_before_anything_is_trained(
    self, changes, message, error=ValueError
  ):
    given = dict(theta=make_theta(), sparsities=(0.5, 0.8), rewind=Rewind(0))
    with self.assertRaisesRegex(error, message):
      iterative.iterative_pruning(None, **given | changes)

  @parameterized.parameters(
    (
      lambda t: t | {'net/logits': {'w': jnp.ones((1, 17))}},
      r"at sparsity 0.5 and .* leaf 'net/logits/w' is \(1, 17\)",
    ),
    (
      lambda t: jax.tree.map(lambda x: x / 0, t),
      "at sparsity 0.5: leaf 'net/conv/b' .* not finite",
    ),
    (
      lambda t: jax.tree.map(lambda x: x + 1, t),
      "not zero at 45 of the 45 pruned weights of 'net/conv/w'",
    ),
    (
      lambda t: jax.tree.map(lambda x: x * (x.size > 17), t),
      "at sparsity 0.8 no weight of 'net/logits/w'",
      'global',
    ),
  )
  def test_mistakes_of_the_training_are_seen_after_it(
    self, train, message, scope='layer'
  ):
    done = []
    cycles = iterative.iterative_pruning(
      lambda theta, kept, step: train(theta),
      *(make_theta(), (0.5, 0.8), Rewind(0)),
      scope=scope,
    )
    with self.assertRaisesRegex(ValueError, message):
      for cycle in cycles:
        done.append(cycle)
    # Cycles before the mistake are not lost.
    self.assertLen(done, 'at sparsity 0.8' in message)
