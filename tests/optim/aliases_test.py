"""The short forms: schedules, keys, and what all of them refuse."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import schedules
from powerprop_jax.optim import sparsify
from powerprop_jax.optim.topologies import drop_grow
from powerprop_jax.optim.topologies.neuron_ablation import Ablation

_SGD = optax.sgd(0.1, momentum=0.9)
_MOVES = {'stop': 6, 'period': 2}
ALL = {
  'static': pp.static,
  'gradual': functools.partial(pp.gradual_pruning, start=1, stop=5),
  'one_shot': functools.partial(pp.one_shot_pruning, step=3),
  'set': functools.partial(pp.sparse_evolution, **_MOVES),
  'rigl': functools.partial(pp.rigl, **_MOVES),
  'snfs': functools.partial(pp.snfs, **_MOVES),
  'dsr': functools.partial(pp.dsr, num_dropped=3, **_MOVES),
  'top_kast': functools.partial(pp.top_kast, backward_sparsity=0.1),
}


def _theta():
  return small.two_layers((9, 8), (8, 5))


def _run(tx):
  return small.history(tx, _theta(), 7)[-1]


class AliasesTest(parameterized.TestCase):
  @parameterized.parameters('set', 'rigl')
  def test_a_schedule_is_taken_as_it_is(self, name):
    cosine = lambda step: 0.2 * (1 + jnp.cos(jnp.pi * step / 6))
    number, given, constant = (
      _run(ALL[name](_SGD, 0.7, drop_fraction=fraction))[1].masks
      for fraction in (0.4, cosine, schedules.constant(0.4))
    )
    chex.assert_trees_all_equal(number, given)
    self.assertFalse(np.array_equal(number['a']['w'], constant['a']['w']))

  def test_same_start_for_methods_of_one_key(self):
    """So that comparisons start from the same network."""
    erk = {'distribution': pp.erk, 'key': 2}
    starts = [
      ALL[name](_SGD, 0.7, **erk).init(_theta()).masks
      for name in ('static', 'rigl', 'set', 'snfs')
    ]
    chex.assert_trees_all_equal(*starts)

  def test_which_rewirings_need_finite_gradients(self):
    topologies = {
      name: sparsify.parts(make(_SGD, 0.7)).topology
      for name, make in ALL.items()
    }
    needs = [n for n, t in topologies.items() if t.rewire and t.needs_grads]
    self.assertEqual(needs, ['rigl', 'snfs'])
    unknown = drop_grow.drop_grow(0.5, schedules.never, 0.3, lambda r: r.grads)
    self.assertTrue(unknown.needs_grads)

  @parameterized.parameters('static', 'rigl', 'top_kast')
  def test_powerprop_at_one_changes_nothing(self, name):
    plain, powered = (
      _run(ALL[name](inner, 0.7)) for inner in (_SGD, pp.powerprop(_SGD, 1.0))
    )
    chex.assert_trees_all_equal(powered[1].masks, plain[1].masks)
    chex.assert_trees_all_close(powered[0], plain[0], rtol=1e-6)

  @parameterized.parameters('lenet_300_100', 'lenet_5')
  @pytest.mark.slow
  def test_masks_do_not_depend_on_weights_of_the_same_key(self, name):
    # From one stream, the tenth that is kept would be the largest weights.
    net = nets.make(name, 10)
    theta, _ = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), True)
    masks = pp.static(optax.sgd(0.1), 0.9, key=0).init(theta).masks
    for module, leaves in theta.items():
      kept = leaves['w'][masks[module]['w']]
      error = jnp.std(leaves['w']) / kept.size**0.5
      assert abs(jnp.mean(kept)) < 5 * error
      assert 0.7 < jnp.std(kept) / jnp.std(leaves['w']) < 1.3


NAN = float('nan')
_FAN_IN = {'structure': 'constant_fan_in'}
_STEPS = [
  ({'stop': 2}, 'nothing would ever be rewired.*stop=2'),
  ({'start': 6}, 'start=6, stop=6'),
  ({'start': 9}, 'start=9, stop=6'),
  ({'start': 3, 'stop': 4}, 'Choose a later stop or a shorter period'),
  ({'period': 0}, 'period must be at least 1, got 0'),
  ({'start': -1}, 'start must be at least 0, got -1'),
  ({'stop': -1}, 'stop must be at least 0, got -1'),
]
# What is not refused with a sparsity of 0.7 and these options is.
BAD = {
  'static': [
    ({'structure': 'blocks'}, "must be 'unstructured' or"),
    ({'masks': _theta()}, 'got both'),
    ({'sparsity': None}, 'got neither'),
    ({'sparsity': None, 'masks': _theta(), **_FAN_IN}, 'needs a sparsity, got'),
  ],
  'gradual': [
    ({'start': 5}, 'start=5.*stop=5'),
    ({'start': 9}, 'start=9.*stop=5'),
    ({'start': -1}, 'start must be at least 0, got -1'),
    ({'period': 0}, 'period must be at least 1, got 0'),
    ({'power': 0}, 'power must be a positive.*got 0'),
    ({'scope': 'tree'}, "'global', got 'tree'"),
  ],
  'one_shot': [
    ({'step': -2}, 'step must be at least 0, got -2'),
    ({'structure': 'blocks'}, "must be 'unstructured' or"),
    ({'scope': 'global', **_FAN_IN}, r"scope='global'\. Use scope='layer'"),
    ({'scope': 'global', 'sparsity': {'a/w': 0.5}}, 'takes one sparsity for'),
    ({'scope': 'global', 'sparsity': 0.995}, 'would keep 1 weights for 2'),
  ],
  'set': [
    *_STEPS,
    *(
      ({'drop_fraction': share}, r'drop_fraction must be in \(0, 1\)')
      for share in (0.0, 1.0, -0.3, 1.5, NAN)
    ),
    ({'structure': 'constant_fanin'}, "Did you mean 'constant_fan_in'"),
    ({'regrow': 'random'}, "'smallest', got 'random'"),
    ({'ablation': Ablation(pp.is_weight)}, "structure='constant_fan_in'"),
  ],
  'snfs': [
    *_STEPS,
    ({'momentum': 1.0}, 'momentum must be in .* got 1.0'),
    ({'momentum': -0.1}, 'momentum must be'),
    ({'second_moment': 1.5}, 'second_moment must be'),
    ({'drop_fraction': 1.0}, 'drop_fraction must be in'),
    ({'min_drop_fraction': 0.6}, 'min_drop_fraction must be in'),
    ({'structure': 'constant_fanin'}, "Did you mean 'constant_fan_in'"),
  ],
  'dsr': [
    *_STEPS,
    ({'num_dropped': 0}, 'num_dropped must be at least 1, got 0'),
    ({'num_dropped': 600}, 'only 32 can be dropped'),
    ({'threshold': 0.0}, 'threshold must be in .* got 0.0'),
    ({'threshold': NAN}, 'threshold must be in'),
  ],
  'top_kast': [
    ({'sparsity': 1.0}, r'forward_sparsity must be in \[0, 1\), got 1.0'),
    ({'backward_sparsity': -0.1}, r'backward_sparsity must be in .*got -0.1'),
    ({'backward_sparsity': 0.9}, 'at most forward_sparsity, got 0.9 and 0.7'),
    ({'penalty': -1.0}, 'penalty must be at least 0, got -1.0'),
    ({'penalty': NAN}, 'penalty must be at least 0, got nan'),
    ({'norm': 'l0'}, "norm must be 'l1' or 'l2', got 'l0'"),
    ({'period': 0}, 'period must be at least 1, got 0'),
    ({'stop': 0}, 'stop must be after start'),
  ],
}
BAD['rigl'] = BAD['set']


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(*BAD)
  def test_bad_options_are_told_by_name_and_value(self, name):
    for options, message in BAD[name]:
      with self.assertRaisesRegex(ValueError, message):
        ALL[name](_SGD, **({'sparsity': 0.7} | options)).init(_theta())

  @parameterized.parameters(*ALL)
  def test_options_that_there_are_not(self, name):
    unknown = {'selekt': None}, "'selekt' here. Did you mean 'select'"
    fan_in = _FAN_IN, "no option 'structure' here"
    cases = [unknown, fan_in] if name in ('dsr', 'top_kast') else [unknown]
    for options, message in cases:
      with self.assertRaisesRegex(TypeError, message):
        ALL[name](_SGD, 0.7, **options)

  @parameterized.product(name=tuple(ALL), sparsity=(-0.5, 1.0, NAN))
  def test_sparsities_outside_the_unit_interval(self, name, sparsity):
    message = rf'sparsity must be in \[0, 1\), got {sparsity}'
    with self.assertRaisesRegex(ValueError, message):
      ALL[name](_SGD, sparsity)

  @parameterized.parameters(*ALL)
  def test_a_leaf_that_would_lose_all_is_named(self, name):
    tx = ALL[name](_SGD, 0.98, distribution=pp.uniform)
    with self.assertRaisesRegex(ValueError, "'n/w' has 40 weights and would"):
      tx.init(_theta())

  @parameterized.parameters(*ALL)
  def test_unknown_keywords_are_named(self, name):
    with self.assertRaisesRegex(TypeError, 'sparsities'):
      ALL[name](_SGD, 0.5, sparsities=3)
