"""Training without zeros: the numbers of masked training, and less memory."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import nets
from powerprop_jax.core import distributions
from powerprop_jax.optim import aliases, powerprop
from powerprop_jax.train import condensed, step
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError

_SGD = optax.sgd(0.1, momentum=0.9)
_DECAYED = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(1e-3))
_EVERY_THIRD = dict(stop=100, period=3)

# Optimiser, α, method, its arguments.
_CASES = {
  'static': (_SGD, 1.0, aliases.static, {}),
  'static, power': (_SGD, 2.0, aliases.static, {}),
  'rigl': (_SGD, 1.0, aliases.rigl, _EVERY_THIRD),
  'rigl, power, adam': (
    _DECAYED, 2.0, aliases.rigl, dict(regrow='smallest', **_EVERY_THIRD),
  ),
  'set, array of powers': (
    _SGD, jnp.asarray(1.5), aliases.sparse_evolution,
    dict(regrow='redraw', **_EVERY_THIRD),
  ),
  'constant fan-in': (
    _SGD, 1.0, aliases.rigl, dict(structure='constant_fan_in', **_EVERY_THIRD),
  ),
}  # fmt: skip


def _data(shape, num_examples):
  random = np.random.default_rng(0)
  images = random.random((num_examples, *shape), np.float32)
  labels = random.integers(0, 10, num_examples)
  return Arrays(jnp.asarray(images), jnp.asarray(labels))


def _make(name, case, sparsity=0.8, shape=(8, 8, 1), num_examples=40):
  """Network, transformation and first state."""
  inner, alpha, method, arguments = _CASES[case]
  tx = method(powerprop.powerprop(inner, alpha), sparsity, **arguments)
  net = nets.make(name, 10)
  arrays = _data(shape, num_examples)
  state = step.create(net, tx, jax.random.key(0), arrays.images[:1])
  return net, tx, state, arrays


def _layout(net, tx, state, arrays, **options):
  return condensed.layout(
    state, net=net, tx=tx, images=arrays.images[:8], **options
  )


def _trained(problem, indices):
  """The layout; state and metrics of condensed steps, and of masked ones."""
  net, tx, state, arrays = problem
  layout = _layout(net, tx, state, arrays)
  assert layout
  advances = (
    condensed.make_advance(condensed.make_step(net, tx, layout), layout),
    step.make_advance(net, tx),
  )
  return layout, *(jax.jit(a)(state, arrays, indices) for a in advances)


class NumbersTest:
  @pytest.mark.parametrize(
    ('name', 'case'),
    [
      *(('lenet_300_100', case) for case in _CASES),
      ('lenet_5_small', 'static, power'),
      ('lenet_5_small', 'rigl, power, adam'),
      ('lenet_5_small', 'constant fan-in'),
    ],
  )
  @pytest.mark.slow
  def test_equal_masked_training(self, name, case):
    problem = _make(name, case)
    indices = np.random.default_rng(1).integers(0, 40, (8, 8))
    layout, (found, metrics), (expected, theirs) = _trained(problem, indices)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found.opt_state.masks, expected.opt_state.masks)
    if 'stop' in _CASES[case][3]:
      before = problem[2].opt_state.masks
      with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before, found.opt_state.masks)
    chex.assert_trees_all_close(metrics, theirs, rtol=1e-5)
    chex.assert_trees_all_close(found.phi, expected.phi, atol=1e-5)
    # What is remembered of connections that do not exist is of no use.
    found, expected = (
      condensed.condense(state, layout).opt_state.inner_state
      for state in (found, expected)
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5)

  @pytest.mark.slow
  def test_batch_norm_and_convolutions_with_strides(self):
    problem = _make('resnet_18_cifar', 'static', 0.9, (16, 16, 3), 8)
    _, (found, metrics), (expected, theirs) = _trained(
      problem, np.arange(8)[np.newaxis]
    )
    chex.assert_trees_all_close(metrics, theirs, rtol=1e-4)
    chex.assert_trees_all_close(
      found.net_state, expected.net_state, rtol=1e-3, atol=1e-4
    )
    # Gradients through so many norms make much of rounding: a relative change
    # of 1e-7 in φ changes those of the masked network by 1e-2.
    for start, one, other in zip(
      *map(jax.tree.leaves, (problem[2].phi, found.phi, expected.phi)),
      strict=True,
    ):
      moved = jnp.linalg.norm(other - start)
      assert jnp.linalg.norm(one - other) <= 0.04 * moved + 1e-6


class StateTest:
  @pytest.mark.parametrize('case', ['static, power', 'rigl, power, adam'])
  @pytest.mark.slow
  def test_expand_undoes_condense(self, case):
    net, tx, state, arrays = _make('lenet_300_100', case)
    layout = _layout(net, tx, state, arrays)
    thin = jax.jit(lambda s: condensed.condense(s, layout))(state)
    chex.assert_trees_all_equal(condensed.expand(thin, layout), state)

  def test_memory_is_that_of_the_connections(self):
    net, tx, state, arrays = _make('lenet_300_100', 'static', 0.98)
    layout = _layout(net, tx, state, arrays)
    thin = condensed.condense(state, layout)
    counts = sum(room.size for room in layout.values())
    rest = sum(
      leaf.size
      for leaf in jax.tree.leaves(state.phi)
      if leaf.shape not in {room.shape for room in layout.values()}
    )
    values = sum(leaf.size for leaf in jax.tree.leaves(thin.phi))
    assert values == counts + rest
    slots = jax.tree.leaves(thin.opt_state.inner_state)
    assert sum(slot.size for slot in slots) == values
    index = sum(leaf.size for leaf in jax.tree.leaves(thin.net_state))
    rows = sum(sum(room.shape) + 2 for room in layout.values())
    assert index == 3 * counts + rows

  def test_one_program_for_all_rewirings(self):
    net, tx, state, arrays = _make('lenet_300_100', 'rigl')
    layout = _layout(net, tx, state, arrays)
    advance = condensed.make_step(net, tx, layout)
    advance = jax.jit(chex.assert_max_traces(advance, 1))
    state = condensed.condense(state, layout)
    moved = []
    for _ in range(8):
      index = jax.device_get(state.net_state)
      state, _ = advance(state, arrays.images[:8], arrays.labels[:8])
      differ = jax.tree.map(lambda a, b: (a != b).any(), index, state.net_state)
      moved.append(any(jax.tree.leaves(differ)))
    assert moved == [False, False, False, True, False, False, True, False]

  def test_lanes_share_the_room_of_the_largest(self):
    net, tx, state, arrays = _make('lenet_300_100', 'static')
    fewer = jax.tree.map(lambda x: x, state)
    masks = fewer.opt_state.masks
    masks['lenet_300_100/linear_0']['w'] = (
      masks['lenet_300_100/linear_0']['w'].at[:2].set(False)
    )
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), fewer, state)
    alone = _layout(net, tx, state, arrays)
    assert _layout(net, tx, stacked, arrays) == alone


class ChoiceTest:
  def test_auto_takes_what_pays_and_masked_nothing(self):
    net, tx, state, arrays = _make('lenet_300_100', 'static')
    none = {}
    # Products with 64 inputs are too small to gain anything.
    for execution in ('auto', 'masked'):
      found = _layout(net, tx, state, arrays, execution=execution)
      assert found == none

  def test_what_cannot_be_condensed_is_refused_with_the_reason(self):
    refused = {
      "regrow is 'keep'": functools.partial(
        aliases.rigl, powerprop.powerprop(_SGD, 2.0), stop=10, period=2
      ),
      'dense gradients or weights': functools.partial(
        aliases.snfs, _SGD, stop=10, period=2
      ),
      'no weight that is multiplied by lacks': functools.partial(
        aliases.gradual_pruning, _SGD, start=0, stop=10, period=2
      ),
    }
    net, _, _, arrays = _make('lenet_300_100', 'static')
    for reason, make_tx in refused.items():
      tx = make_tx(sparsity=0.9)
      state = step.create(net, tx, jax.random.key(0), arrays.images[:1])
      with pytest.raises(UserError, match=reason):
        _layout(net, tx, state, arrays)
      auto = _layout(net, tx, state, arrays, execution='auto')
      assert not auto
    state = step.create(net, _SGD, jax.random.key(0), arrays.images[:1])
    with pytest.raises(UserError, match='sparsify is not the outermost'):
      _layout(net, _SGD, state, arrays)
    with pytest.raises(UserError, match="got 'fast'"):
      _layout(net, tx, state, arrays, execution='fast')

  def test_factored_moments_are_refused(self):
    net, _, _, arrays = _make('lenet_300_100', 'static')
    inner = optax.adafactor(0.1, min_dim_size_to_factor=8)
    tx = aliases.static(inner, 0.9)
    state = step.create(net, tx, jax.random.key(0), arrays.images[:1])
    layout = _layout(net, tx, state, arrays)
    with pytest.raises(ValueError, match='factored moments'):
      condensed.condense(state, layout)


def _stacked_network():
  """A network that is no Haiku network: a scan over layers, [out, in] last."""

  def init(key, images, is_training):
    del images, is_training
    keys = jax.random.split(key)
    theta = {
      'stack': {'kernel': jax.random.normal(keys[0], (3, 64, 64)) / 8},
      'last': {'weight': jax.random.normal(keys[1], (10, 64)) / 8},
    }
    return theta, {'calls': jnp.zeros([], jnp.int32)}

  def apply(theta, net_state, key, images, is_training):
    del key, is_training
    turn = lambda x, w: (jax.nn.relu(x @ w) + x, None)
    x = images.reshape(-1, 64)
    x, _ = jax.lax.scan(turn, x, theta['stack']['kernel'])
    return x @ theta['last']['weight'].T, {'calls': net_state['calls'] + 1}

  return hk.TransformedWithState(init, apply)


class AnyNetworkTest:
  @pytest.mark.parametrize('case', ['static, power', 'rigl'])
  def test_trains_as_masked(self, case):
    inner, alpha, method, arguments = _CASES[case]
    inner = powerprop.powerprop(inner, alpha)
    tx = method(inner, 0.8, distribution=distributions.uniform, **arguments)
    net, arrays = _stacked_network(), _data((8, 8, 1), 40)
    state = step.create(net, tx, jax.random.key(0), arrays.images[:1])
    indices = np.random.default_rng(1).integers(0, 40, (8, 8))
    problem = net, tx, state, arrays
    layout, (found, metrics), (expected, theirs) = _trained(problem, indices)
    # RigL may move connections from one layer of a stack to another.
    stack = {'stack/kernel'} if method is aliases.static else set()
    assert set(layout) == {'last/weight', *stack}
    chex.assert_trees_all_equal(found.opt_state.masks, expected.opt_state.masks)
    chex.assert_trees_all_close(metrics, theirs, rtol=1e-5)
    chex.assert_trees_all_close(found.phi, expected.phi, atol=1e-5)
    chex.assert_trees_all_equal(found.net_state, expected.net_state)
