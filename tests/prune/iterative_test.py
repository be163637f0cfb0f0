"""Iterative pruning: nested masks, exact counts, and where a cycle starts."""

import functools

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from powerprop_jax.core import distributions, masks, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import powerprop, views
from powerprop_jax.prune import iterative, one_shot
from powerprop_jax.prune.iterative import Rewind
from powerprop_jax.train.data import splits as data

SPARSITIES = (0.0, 0.29, 0.5, 0.75)


def make_theta(seed=0):
  shapes = {
    'net/conv': {'w': (3, 3, 2, 5), 'b': (5,)},
    'net/logits': {'w': (17, 1), 'b': (1,)},
    'net/norm': {'scale': (1, 1, 5)},
  }
  return small.normal(shapes, seed)


def by_name(tree):
  return {
    leaf.path: np.asarray(leaf.value) for leaf in trees.named_leaves(tree)
  }


def shake(theta, existing, step):
  """Training that changes every weight that is left, and its rank."""
  noise = make_theta(seed=step + 100)
  moved = jax.tree.map(lambda t, n: 0.5 * t + n, theta, noise)
  return masks.apply_masks(moved, existing)


class Recorder:
  """A train function that remembers what it was called with."""

  def __init__(self, train=shake):
    self.calls = []
    self._train = train

  def __call__(self, theta, existing, step):
    self.calls.append((theta, existing, step))
    return self._train(theta, existing, step)


def oracle(theta, sparsities, scope, early=None):
  """Masks and weights of each cycle by sorting in NumPy, trained by shake."""
  names = [name for name in by_name(theta) if name.endswith('/w')]
  alive = {name: np.ones(x.shape, bool) for name, x in by_name(theta).items()}
  groups = [[name] for name in names] if scope == 'layer' else [names]
  for sparsity in sparsities:
    values = by_name(theta)
    for group in groups:
      entries = [
        (-abs(values[name].ravel()[i]), name, i)
        for name in group
        for i in np.flatnonzero(alive[name])
      ]
      size = sum(values[name].size for name in group)
      pruned = sorted(entries)[masks.num_kept(size, sparsity) :]
      for _, name, i in pruned:
        alive[name].ravel()[i] = False
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

    cycles = list(
      iterative.iterative_pruning(
        shake, theta, (0.3, 0.6), Rewind(0, theta), score=score
      )
    )
    chex.assert_trees_all_equal(seen[0], theta)
    chex.assert_trees_all_equal(seen[1], cycles[0].theta)

  def test_a_distribution_may_be_asked_for_in_each_cycle(self):
    theta = make_theta()
    asked = [distributions.erk(theta, s) for s in (0.3, 0.6, 0.8)]
    for cycle, sparsities in zip(
      iterative.iterative_pruning(shake, theta, asked, Rewind(0)),
      asked,
      strict=True,
    ):
      kept = by_name(cycle.masks)
      for name, sparsity in sparsities.items():
        number = masks.num_kept(kept[name].size, sparsity)
        self.assertEqual(kept[name].sum(), number)

  def test_the_output_layer_can_be_pruned_at_half_the_rate(self):
    theta = make_theta()
    half = lambda s: {'logits/w$': 1 - (1 - s) ** 0.32}
    for cycle in iterative.iterative_pruning(
      shake, theta, (0.3, 0.6), Rewind(0), overrides=half
    ):
      kept = by_name(cycle.masks)['net/logits/w']
      number = masks.num_kept(17, half(cycle.sparsity)['logits/w$'])
      self.assertEqual(kept.sum(), number)


class RewindTest(parameterized.TestCase):
  def start_of(self, rewind, sparsities=(0.5, 0.8)):
    train = Recorder()
    cycles = list(
      iterative.iterative_pruning(train, make_theta(), sparsities, rewind)
    )
    return train.calls, cycles

  @parameterized.parameters(0, 700)
  def test_without_weights_training_goes_on_from_the_pruned_ones(self, step):
    calls, cycles = self.start_of(Rewind(step))
    before = [make_theta(), cycles[0].theta]
    for (theta, kept, given), cycle, trained in zip(
      calls, cycles, before, strict=True
    ):
      self.assertEqual(given, step)
      chex.assert_trees_all_equal(kept, cycle.masks)
      chex.assert_trees_all_equal(theta, masks.apply_masks(trained, kept))

  def test_a_first_sparsity_of_zero_does_the_first_training_too(self):
    theta = make_theta()
    train = Recorder()
    cycles = iterative.iterative_pruning(
      train, theta, (0.0, 0.5), Rewind(0, theta)
    )
    next(cycles)
    chex.assert_trees_all_equal(train.calls[0][0], theta)

  def test_cycles_are_computed_when_they_are_asked_for(self):
    train = Recorder()
    cycles = iterative.iterative_pruning(
      train, make_theta(), SPARSITIES, Rewind(0)
    )
    for number in range(len(SPARSITIES)):
      self.assertLen(train.calls, number)
      next(cycles)
    self.assertRaises(StopIteration, lambda: next(cycles))

  @parameterized.product(
    scope=['layer', 'global'], rewind=[Rewind(9), Rewind(2, make_theta(seed=5))]
  )
  def test_going_on_after_a_cycle_gives_the_same_cycles(self, scope, rewind):
    run = functools.partial(
      iterative.iterative_pruning, shake, rewind=rewind, scope=scope
    )
    whole = list(run(make_theta(), SPARSITIES))
    for done in range(1, len(SPARSITIES)):
      last = whole[done - 1]
      rest = list(run(last.theta, SPARSITIES[done:], masks=last.masks))
      chex.assert_trees_all_equal(rest, whole[done:])

  def test_train_may_donate_the_weights_it_is_given(self):
    theta, early = make_theta(), make_theta(seed=5)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(theta, existing):
      moved = jax.tree.map(lambda t: t * 0.5 - 1, theta)
      return masks.apply_masks(moved, existing)

    for rewind in (Rewind(0), Rewind(0, early)):
      cycles = iterative.iterative_pruning(
        lambda theta, kept, step: train(theta, kept), theta, SPARSITIES, rewind
      )
      for cycle in cycles:
        jax.block_until_ready(cycle)
    jax.block_until_ready((theta, early))

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


NUM_STEPS, EARLY = 250, 25


def make_digits_run(alpha):
  """A small network on digits: (theta_0, train, accuracy)."""
  splits = data.load(data.DataConfig('digits'))
  arrays = jax.device_put(splits.train)
  net = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([100, 10])(hk.Flatten()(x)))
  )
  rate = optax.piecewise_constant_schedule(0.2, {200: 0.2})

  def loss_fn(theta, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      net.apply(theta, arrays.images[batch]), arrays.labels[batch]
    )
    return jnp.mean(losses)

  @jax.jit
  def run(theta, kept, start_step, batches):
    from_there = lambda step: rate(step + start_step)
    sgd = optax.sgd(from_there, momentum=0.9)
    tx = powerprop.powerprop(sgd, alpha)

    def step(carry, batch):
      phi, opt_state = carry
      theta = views.effective_params(phi, opt_state)
      grads = masks.apply_masks(jax.grad(loss_fn)(theta, batch), kept)
      updates, opt_state = tx.update(grads, opt_state, phi)
      return (optax.apply_updates(phi, updates), opt_state), None

    (phi, opt_state), _ = jax.lax.scan(step, views.init(tx, theta), batches)
    return views.effective_params(phi, opt_state)

  def train(theta, kept, start_step, stop=NUM_STEPS):
    # Fine-tuning starts at the end: as many steps again, at the last rate.
    num_steps = (stop - start_step) or NUM_STEPS
    batches = data.batch_indices(0, start_step, num_steps, 60, 1197)
    return run(theta, kept, start_step, batches)

  def accuracy(theta):
    logits = net.apply(theta, splits.test.images)
    return float(jnp.mean(jnp.argmax(logits, -1) == splits.test.labels))

  return net.init(jax.random.key(0), arrays.images[:1]), train, accuracy


class DigitsTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 2.0)
  @pytest.mark.slow
  def test_every_procedure_beats_pruning_in_one_shot(self, alpha):
    theta_0, train, accuracy = make_digits_run(alpha)
    everything = masks.full_masks(theta_0)
    early = train(theta_0, everything, 0, stop=EARLY)
    trained = train(early, everything, EARLY)
    at_once = masks.apply_masks(trained, one_shot.prune(trained, 0.95))
    for rewind in (
      Rewind(NUM_STEPS),
      Rewind(EARLY),
      Rewind(EARLY, early),
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

  @pytest.mark.slow
  def test_lottery_tickets_of_the_paper(self):
    """The shares of weights left for which the paper plots LeNet-300-100."""
    theta = {
      'linear_0': {'w': jnp.ones((784, 300))},
      'linear_1': {'w': jnp.ones((300, 100))},
      'logits': {'w': jnp.ones((100, 10))},
    }
    sparsities = [
      {'linear_0/w': inner, 'linear_1/w': inner, 'logits/w': outer}
      for inner, outer in zip(
        iterative.geometric_sparsities(18),
        iterative.geometric_sparsities(18, 0.1),
        strict=True,
      )
    ]
    left = [
      round(100 * float(masks.density(cycle.masks)), 1)
      for cycle in iterative.iterative_pruning(
        lambda theta, kept, step: theta, theta, sparsities, Rewind(0, theta)
      )
    ]
    published = {3: 51.3, 7: 21.1, 12: 7.0, 15: 3.6, 18: 1.9}
    self.assertEqual({i: left[i - 1] for i in published}, published)

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


def _smaller():
  return make_theta() | {'net/logits': {'w': jnp.ones((16, 1))}}


_tiny = lambda x: x * 1e-6
_DENSER = (
  {'net/conv/w': 0.5, 'net/logits/w': 0.5},
  {'net/conv/w': 0.8, 'net/logits/w': 0.4},
)


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: {'sparsities': ()}, 'at least one sparsity'),
    (lambda: {'sparsities': (0.5, 0.5)}, 'must increase .* got 0.5 after 0.5'),
    (
      lambda: {'sparsities': (0.5, 0.8, 0.7)},
      'must increase .* got 0.7 after 0.8',
    ),
    (lambda: {'sparsities': (_DENSER[0],) * 2}, 'must increase'),
    (
      lambda: {'sparsities': (0.5, 1.0)},
      r'sparsity must be in \[0, 1\), got 1.0',
    ),
    (
      lambda: {'sparsities': (-0.1, 0.5)},
      r'sparsity must be in \[0, 1\), got -0.1',
    ),
    (
      lambda: {'sparsities': (0.1, float('nan'))},
      r'must be in \[0, 1\), got nan',
    ),
    (
      lambda: {'sparsities': _DENSER},
      "11 weights in 'net/logits/w', but only 9",
    ),
    (
      lambda: {'overrides': lambda s: {'logits': 0.5 if s == 0.5 else 0.4}},
      "11 weights in 'net/logits/w'",
    ),
    (
      lambda: {
        'scope': 'global',
        'overrides': lambda s: {'logits': 0.5} if s > 0.6 else {},
      },
      'fix the same leaves',
    ),
    (
      lambda: {'masks': one_shot.prune(make_theta(), 0.6)},
      "weights in 'net/conv/w', but only",
    ),
    (
      lambda: {
        'masks': one_shot.prune(make_theta(), 0.6, scope='global'),
        'scope': 'global',
      },
      'weights in all leaves, but only',
    ),
    (
      lambda: {'rewind': Rewind(0, _smaller())},
      "'net/logits/w' is .16, 1. in rewind",
    ),
    (
      lambda: {'masks': masks.full_masks(_smaller())},
      "'net/logits/w' is .16, 1. in mas",
    ),
    (lambda: {'masks': make_theta()}, "'net/conv/b' is float32"),
    (
      lambda: {'rewind': Rewind(0, _diverged(jnp.nan))},
      "rewind.theta: leaf 'net/conv",
    ),
    (
      lambda: {'theta': _diverged(jnp.inf)},
      "theta: leaf 'net/conv/b' .* not finite",
    ),
    (lambda: {'rewind': Rewind(-1)}, 'at least 0, got -1'),
    (lambda: {'rewind': Rewind(0.5)}, 'an integer, got 0.5'),
    (lambda: {'scope': 'tree'}, "got 'tree'"),
    (lambda: {'select': select_lib.by_regex('kernel')}, 'chose none'),
  )
  def test_mistakes_are_seen_before_anything_is_trained(self, changes, message):
    arguments = {
      'theta': make_theta(),
      'sparsities': (0.5, 0.8),
      'rewind': Rewind(0),
    } | changes()
    of_types = ('is float32' in message) or ('integer' in message)
    with self.assertRaisesRegex(TypeError if of_types else ValueError, message):
      iterative.iterative_pruning(None, **arguments)

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
      lambda t: t | {'net/logits': jax.tree.map(_tiny, t['net/logits'])},
      "at sparsity 0.8 no weight of 'net/logits/w'",
    ),
  )
  def test_mistakes_of_the_training_are_seen_after_it(self, train, message):
    cycles = iterative.iterative_pruning(
      lambda theta, kept, step: train(theta),
      make_theta(),
      (0.5, 0.8),
      Rewind(0),
      scope='global' if 'no weight' in message else 'layer',
    )
    with self.assertRaisesRegex(ValueError, message):
      list(cycles)

  def test_cycles_before_the_mistake_are_not_lost(self):
    def train(theta, kept, step):
      is_late = masks.sparsity(kept, select=select_lib.is_weight) > 0.7
      return jax.tree.map(lambda t: t / (0 if is_late else 1), theta)

    cycles = iterative.iterative_pruning(
      train, make_theta(), (0.5, 0.8), Rewind(0)
    )
    done = next(cycles)
    with self.assertRaisesRegex(ValueError, 'at sparsity 0.8'):
      next(cycles)
    (rest,) = iterative.iterative_pruning(
      lambda theta, kept, step: theta,
      done.theta,
      (0.8,),
      Rewind(0),
      masks=done.masks,
    )
    self.assertEqual(rest.sparsity, 0.8)
