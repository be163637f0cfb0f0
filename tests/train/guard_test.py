"""A step that is not finite is as if it had not been."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stream_runs
from stream_runs import OPTIONS

from powerprop_jax.nets import resnet
from powerprop_jax.optim import aliases, powerprop
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.images import batches
from powerprop_jax.train.scale import guard, sharding

METHODS = {
  'rigl': lambda tx: aliases.rigl(tx, 0.5, period=2, stop=9),
  'gradual': lambda tx: aliases.gradual_pruning(
    tx, 0.5, start=0, stop=8, period=2
  ),
  'snfs': lambda tx: aliases.snfs(tx, 0.5, period=2, stop=9),
  'top_kast': lambda tx: aliases.top_kast(tx, 0.5, 0.3, period=2),
}


def batch(number, bad=()):
  return batches.make(stream_runs.make_batches(bad), number)[0]


def train(step, state, numbers, bad=()):
  metrics = []
  for number in numbers:
    state, found = step(state, *batch(number, bad))
    metrics.append(jax.device_get(found))
  return state, metrics


@functools.cache
def step_alone():
  step = step_lib.make_step(
    *stream_runs.make_net(), prepare=stream_runs.prepare
  )
  return jax.jit(step, donate_argnums=0, compiler_options=OPTIONS)


def create(net, tx):
  images = jnp.zeros((1, 8, 8, 3))
  return step_lib.create(net, tx, jax.random.key(0), images)


def counts(state):
  return int(state.num_skipped), int(state.num_in_a_row)


@functools.cache
def faulty_steps():
  """A state, and a step that is given what goes wrong, guarded or not."""
  net, _ = stream_runs.make_net()
  tx = aliases.rigl(optax.adam(0.01), 0.5, period=2, stop=9)

  def gradient(state, given, labels):
    grad, average, loss = given
    grads = jax.tree.map(jnp.ones_like, state.phi)
    grads['hidden']['w'] = grads['hidden']['w'].at[1, 2].set(grad)
    return grads, {'norm': {'average': jnp.full(3, average)}}, {'loss': loss}

  state = create(net, tx)
  state = state._replace(net_state={'norm': {'average': jnp.zeros(3)}})
  step = step_lib.TrainStep(gradient, step_lib.make_step(net, tx).update)
  return state, jax.jit(guard.guarded(step)), jax.jit(step)


class GuardedTest:
  # Number 5, the sixth step, is one that rewires.
  @pytest.mark.parametrize(
    ('bad', 'in_a_row'),
    [((), [0] * 9), ((1, 4, 5, 6), [1, 0, 0, 1, 2, 3, 0, 0, 0])],
  )
  @pytest.mark.slow
  def test_bad_batches_are_as_if_they_had_not_been(self, bad, in_a_row):
    *_, step = stream_runs.compiled(0)
    state, metrics = train(step, stream_runs.make_state(), range(9), bad)
    sound = [number for number in range(9) if number + 1 not in bad]
    alone, expected = train(step_alone(), stream_runs.make_state().train, sound)
    stream_runs.assert_same(state.train, alone)
    assert counts(state) == (len(bad), 0)
    assert [m['num_in_a_row'] for m in metrics] == in_a_row
    losses = [m['loss'] for m in metrics]
    assert np.isfinite(losses).tolist() == [n == 0 for n in in_a_row]
    assert [losses[n] for n in sound] == [m['loss'] for m in expected]
    assert metrics[-1]['num_skipped'] == len(bad)

  @pytest.mark.parametrize('name', METHODS)
  @pytest.mark.slow
  def test_any_method_stands_still(self, name):
    net, _ = stream_runs.make_net()
    tx = METHODS[name](powerprop.powerprop(optax.adam(0.01), 2.0))
    step = jax.jit(
      guard.guarded(step_lib.make_step(net, tx, prepare=stream_runs.prepare)),
      donate_argnums=0,
      compiler_options=OPTIONS,
    )
    make = jax.jit(lambda: create(net, tx), compiler_options=OPTIONS)
    state = guard.create(make())
    for number in range(3):
      state, _ = step(state, *batch(number))
      before = stream_runs.to_host(state)
      state, _ = step(state, *batch(number, (number + 1,)))
      stream_runs.assert_same(state.train, before.train)
    assert counts(state) == (3, 1)

  @pytest.mark.parametrize(
    ('grad', 'average', 'loss', 'is_made'),
    [
      (1.0, 1.0, 1.0, True),
      (1.0, 1.0, jnp.inf, False),
      (jnp.nan, 1.0, 1.0, False),
      (-jnp.inf, 1.0, 1.0, False),
      (1e20, 1.0, 1.0, False),  # Adam would keep its square for ever
      (1.0, jnp.nan, 1.0, False),
    ],
  )
  @pytest.mark.slow
  def test_update_is_made_of_finite_numbers_only(
    self, grad, average, loss, is_made
  ):
    state, guarded, alone = faulty_steps()
    before = stream_runs.to_host(state)
    given = [jnp.float32(x) for x in (grad, average, loss)]
    after, metrics = guarded(guard.create(state), given, None)
    assert counts(after) == (int(not is_made), int(not is_made))
    assert int(metrics['num_skipped']) == int(not is_made)
    if is_made:
      expected, _ = alone(state, given, None)
      chex.assert_trees_all_close(
        stream_runs.to_host(after.train),
        stream_runs.to_host(expected),
        rtol=1e-4,
        atol=1e-7,
      )
    else:
      stream_runs.assert_same(after.train, before)

  def test_weights_that_overflow_end_all_updates(self):
    net, _ = stream_runs.make_net()
    tx = optax.sgd(1e30)
    real = step_lib.make_step(net, tx, prepare=stream_runs.prepare)
    large = step_lib.TrainStep(
      real.gradient,
      lambda state, grads, net_state: real.update(
        state, jax.tree.map(lambda g: jnp.full_like(g, 1e10), grads), net_state
      ),
    )
    state = guard.create(create(net, tx))
    step = jax.jit(guard.guarded(large))
    for number in range(3):
      state, metrics = step(state, *batch(number))
      # The first one is made; the sum of both is the number of batches.
      assert counts(state) == (number, number + 1)
      assert int(state.train.step) == 1
      assert int(metrics['num_in_a_row']) == number + 1

  @pytest.mark.slow
  def test_compiled_program_stays_small(self):
    # XLA copies what leads to the decision into each select if it can: twenty
    # times the program then, and in deeper networks more.
    net = hk.transform_with_state(
      lambda x, is_training: resnet.ResNet(5, depth=10, width=0.0625)(
        x, is_training
      )
    )
    tx = optax.sgd(0.1, 0.9)
    step = step_lib.make_step(net, tx, prepare=stream_runs.prepare)
    alone = compiled(net, tx, step)
    with_guard = compiled(net, tx, guard.guarded(step), guard.create)
    count = lambda program: program.as_text().count('\n')
    assert count(with_guard) < 4 * count(alone)

  @pytest.mark.parametrize('name', METHODS)
  @pytest.mark.slow
  def test_no_second_state_is_held(self, name):
    net = hk.transform_with_state(
      lambda x, is_training: hk.nets.MLP([512, 5])(hk.Flatten()(x))
    )
    tx = METHODS[name](powerprop.powerprop(optax.sgd(0.1, 0.9), 2.0))
    step = step_lib.make_step(net, tx, prepare=stream_runs.prepare)
    weights = 4 * 192 * 512
    room = lambda program: program.memory_analysis().temp_size_in_bytes
    alone = room(compiled(net, tx, step))
    with_guard = compiled(net, tx, guard.guarded(step), guard.create)
    assert room(with_guard) < alone + weights / 10

  @pytest.mark.parametrize('explicit', [False, True])
  @pytest.mark.slow
  def test_all_devices_agree(self, explicit):
    mesh = sharding.make_mesh(4, 2, explicit=explicit)
    state = sharding.create_sharded(stream_runs.create, mesh, min_size=16)
    lies = sharding.state_shardings(state, mesh, min_size=16)
    step = sharding.on_mesh(
      guard.guarded(
        step_lib.make_step(*stream_runs.make_net(), prepare=bad_in_one_example)
      ),
      lies,
      mesh,
    )
    assert not state.train.phi['hidden']['w'].sharding.is_fully_replicated
    put = lambda number, bad=(): jax.device_put(
      one_bad(number, bad), sharding.batch_sharding(mesh)
    )
    state, _ = step(state, *put(0))
    before = stream_runs.to_host(state)
    state, _ = step(state, *put(1, (2,)))
    stream_runs.assert_same(state.train, before.train)
    for leaf in (state.num_skipped, state.num_in_a_row):
      assert [int(s.data) for s in leaf.addressable_shards] == [1] * 8
    state, _ = step(state, *put(2))
    assert counts(state) == (1, 0)
    stream_runs.assert_lies(state, lies)


def compiled(net, tx, step, wrap=lambda state: state):
  """The program of a step on two images, its state donated."""
  images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32)
  state = jax.eval_shape(lambda: wrap(create(net, tx)))
  step = jax.jit(step, donate_argnums=0, compiler_options=OPTIONS)
  return step.lower(state, images, labels).compile()


def one_bad(number, bad):
  """A batch of which only one example, on one device, is bad."""
  images, labels = batch(number)
  if bad:
    images[5] = 255
  return images, labels


def bad_in_one_example(images):
  images = images.astype(jnp.float32)
  return images / (255 - jnp.max(images, axis=(1, 2, 3), keepdims=True))
