"""Iterative pruning refuses what cannot be right, and says what it is."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import small

from powerprop_jax.core import masks
from powerprop_jax.core import select as select_lib
from powerprop_jax.prune import iterative, one_shot
from powerprop_jax.prune.iterative import Rewind


def make_theta():
  conv = {'w': (3, 3, 2, 5), 'b': (5,)}
  return small.normal(
    {'net/conv': conv, 'net/logits': {'w': (17, 1), 'b': (1,)}}
  )


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
