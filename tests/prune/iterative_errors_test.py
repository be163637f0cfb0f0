"""Iterative pruning refuses what cannot be right, and says what it is."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks
from powerprop_jax.core import select as select_lib
from powerprop_jax.prune import iterative, one_shot
from powerprop_jax.prune.iterative import Rewind


def make_theta():
  rng = np.random.default_rng(0)
  leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    'net/conv': {'w': leaf(3, 3, 2, 5), 'b': leaf(5)},
    'net/logits': {'w': leaf(17, 1), 'b': leaf(1)},
  }


def halve(theta, existing, step):
  return jax.tree.map(lambda t: t / 2, theta)


class ErrorTest(parameterized.TestCase):
  """Mistakes that are seen before anything is trained."""

  def refuse(self, message, error=ValueError, **changes):
    arguments = {
      'theta': make_theta(),
      'sparsities': (0.5, 0.8),
      'rewind': Rewind(0),
    } | changes
    with self.assertRaisesRegex(error, message):
      iterative.iterative_pruning(halve, **arguments)

  @parameterized.parameters(
    ((), 'at least one sparsity'),
    ((0.5, 0.5), 'must increase .* got 0.5 after 0.5'),
    ((0.5, 0.8, 0.7), 'must increase .* got 0.7 after 0.8'),
    ((0.5, 1.0), r'sparsity must be in \[0, 1\), got 1.0'),
    ((-0.1, 0.5), r'sparsity must be in \[0, 1\), got -0.1'),
    ((0.1, float('nan')), r'sparsity must be in \[0, 1\), got nan'),
  )
  def test_sparsities_must_increase_within_the_unit_interval(
    self, sparsities, message
  ):
    self.refuse(message, sparsities=sparsities)

  def test_no_leaf_may_become_denser(self):
    first = {'net/conv/w': 0.5, 'net/logits/w': 0.5}
    later = {'net/conv/w': 0.8, 'net/logits/w': 0.4}
    self.refuse(
      "11 weights in 'net/logits/w', but only 9", sparsities=(first, later)
    )
    self.refuse('must increase', sparsities=(first, dict(first)))
    self.refuse(
      "11 weights in 'net/logits/w'",
      overrides=lambda s: {'logits': 0.5 if s == 0.5 else 0.4},
    )

  def test_the_masks_must_leave_enough_weights(self):
    theta = make_theta()
    for scope, where in (('layer', "'net/conv/w'"), ('global', 'all leaves')):
      self.refuse(
        f'weights in {where}, but only',
        scope=scope,
        masks=one_shot.prune(theta, 0.6, scope=scope),
      )

  def test_what_does_not_fit_theta_names_the_leaf(self):
    smaller = make_theta() | {'net/logits': {'w': jnp.ones((16, 1))}}
    self.refuse(
      "'net/logits/w' is .16, 1. in rewind", rewind=Rewind(0, smaller)
    )
    self.refuse(
      "'net/logits/w' is .16, 1. in masks", masks=masks.full_masks(smaller)
    )
    self.refuse("'net/conv/b' is float32", TypeError, masks=make_theta())

  @parameterized.parameters(jnp.nan, jnp.inf)
  def test_weights_that_are_not_finite_name_the_leaf(self, number):
    diverged = make_theta()
    diverged['net/conv']['b'] = diverged['net/conv']['b'].at[1].set(number)
    self.refuse("rewind.theta: leaf 'net/conv/b'", rewind=Rewind(0, diverged))
    self.refuse("theta: leaf 'net/conv/b' .* not finite", theta=diverged)

  def test_a_step_is_a_natural_number(self):
    self.refuse('at least 0, got -1', rewind=Rewind(-1))
    self.refuse('an integer, got 0.5', TypeError, rewind=Rewind(0.5))

  def test_an_unknown_scope_or_selection_is_named(self):
    self.refuse("got 'tree'", scope='tree')
    self.refuse('chose none', select=select_lib.by_regex('kernel'))
    self.refuse(
      'fix the same leaves',
      scope='global',
      overrides=lambda s: {'logits': 0.5} if s > 0.6 else {},
    )


class TrainErrorTest(parameterized.TestCase):
  """Mistakes that only the training can show."""

  def refuse(self, message, train, **arguments):
    cycles = iterative.iterative_pruning(
      train, make_theta(), (0.5, 0.8), Rewind(0), **arguments
    )
    with self.assertRaisesRegex(ValueError, message):
      list(cycles)

  def test_weights_of_other_shapes(self):
    def train(theta, kept, step):
      return {**theta, 'net/logits': {'w': jnp.ones((1, 17))}}

    self.refuse(
      r"at sparsity 0.5 and .* leaf 'net/logits/w' is \(1, 17\)", train
    )

  def test_weights_that_are_not_finite(self):
    def train(theta, kept, step):
      return jax.tree.map(lambda t: t / 0, theta)

    self.refuse("at sparsity 0.5: leaf 'net/conv/b' .* not finite", train)

  def test_weights_that_were_not_masked(self):
    def train(theta, kept, step):
      return jax.tree.map(lambda t: t + 1, theta)

    self.refuse(
      "not zero at 45 of the 45 pruned weights of 'net/conv/w'", train
    )

  def test_a_leaf_that_would_lose_all_its_weights(self):
    def train(theta, kept, step):
      logits = jax.tree.map(lambda t: t * 1e-6, theta['net/logits'])
      return {**theta, 'net/logits': logits}

    self.refuse(
      "at sparsity 0.8 no weight of 'net/logits/w'", train, scope='global'
    )

  def test_cycles_before_the_mistake_are_not_lost(self):
    def train(theta, kept, step):
      scale = (
        0 if masks.sparsity(kept, select=select_lib.is_weight) > 0.7 else 1
      )
      return jax.tree.map(lambda t: t / scale, theta)

    theta = make_theta()
    done = []
    with self.assertRaisesRegex(ValueError, 'at sparsity 0.8'):
      for cycle in iterative.iterative_pruning(
        train, theta, (0.5, 0.8), Rewind(0)
      ):
        done.append(cycle)
    (rest,) = iterative.iterative_pruning(
      halve, done[0].theta, (0.8,), Rewind(0), masks=done[0].masks
    )
    self.assertEqual(rest.sparsity, 0.8)
