"""Training on a mesh of devices: the numbers of a single one."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import optax
import pytest
from sklearn import datasets
import stream_runs

from powerprop_jax.nets import layers
from powerprop_jax.optim import aliases, powerprop
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import fusing, sharding

NUM_STEPS, BATCH = 20, 32
MIN_SIZE = 16
BOTH = ('model', 'data')


def forward(images, is_training):
  x = layers.conv(16, 3, 'stem', with_bias=False)(images)
  x = jax.nn.relu(layers.norm('norm_0')(x, is_training))
  y = layers.conv(16, 3, 'conv', stride=2, with_bias=False)(x)
  y = layers.norm('norm_1')(y, is_training)
  x = layers.conv(16, 1, 'shortcut', stride=2, with_bias=False)(x)
  x = jax.nn.relu(x + y)
  return layers.linear(10, 'logits')(jnp.mean(x, axis=(1, 2)))


@functools.cache
def make_problem():
  """A residual network, RigL around powerprop, and batches in order."""
  net = hk.transform_with_state(forward)
  inner = powerprop.powerprop(optax.sgd(0.05, 0.9), 2.0)
  tx = aliases.rigl(inner, 0.7, stop=100, period=5)
  create = functools.partial(
    step_lib.create, net, tx, jax.random.key(0), jnp.zeros((1, 8, 8, 1))
  )
  digits = datasets.load_digits()
  num = NUM_STEPS * BATCH
  images = (digits.images[:num, ..., None] / 16).astype(np.float32)
  return net, tx, create, Arrays(images, digits.target[:num].astype(np.int32))


@functools.cache
def alone():
  """Initial state, losses and last state on a single device."""
  net, tx, create, arrays = make_problem()
  step = jax.jit(step_lib.make_step(net, tx))
  state = first = jax.jit(create)()
  losses = []
  for i in range(NUM_STEPS):
    rows = slice(i * BATCH, (i + 1) * BATCH)
    state, found = step(state, arrays.images[rows], arrays.labels[rows])
    losses.append(float(found['loss']))
  return stream_runs.to_host(first), losses, stream_runs.to_host(state)


@functools.cache
def cached_state(data, model, explicit):
  _, _, create, _ = make_problem()
  mesh = sharding.make_mesh(data, model, explicit=explicit)
  return mesh, sharding.create_sharded(create, mesh, min_size=MIN_SIZE)


def make_state(data=8, model=1, explicit=False):
  """Mesh, a state of its own, and where its leaves lie."""
  mesh, state = cached_state(data, model, explicit)
  shardings = sharding.state_shardings(state, mesh, min_size=MIN_SIZE)
  return mesh, jax.tree.map(lambda x: x.copy(), state), shardings


def assert_same_run(state, losses, every=1):
  first, losses_alone, state_alone = alone()
  means = np.reshape(losses_alone, (-1, every)).mean(axis=1)
  np.testing.assert_allclose(losses, means, rtol=0, atol=1e-5)
  stream_runs.assert_near(state, state_alone)
  # Batch norm sees the whole batch.
  moved = jax.tree.map(
    lambda a, b: int(np.sum(a != b)),
    state_alone.opt_state.masks,
    first.opt_state.masks,
  )
  assert sum(jax.tree.leaves(moved)) > 50


class MeshTest:
  def test_all_devices_share_a_batch_by_default(self):
    assert dict(sharding.make_mesh().shape) == {'data': 8, 'model': 1}
    mesh = sharding.make_mesh(model=2)
    assert dict(mesh.shape) == {'data': 4, 'model': 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    mesh = sharding.make_mesh(4, 2, explicit=True)
    assert set(mesh.axis_types) == {AxisType.Explicit}

  def test_what_cannot_be_is_named(self):
    mesh, three = sharding.make_mesh(4, 2), jax.devices()[:3]
    for function, args, message in (
      (sharding.make_mesh, (3, 2), 'data 3 × model 2 needs 6.*are 8'),
      (sharding.make_mesh, (None, 9), 'needs 9 devices, there are 8'),
      (sharding.make_mesh, (0,), 'data 0 and model 1'),
      (sharding.make_mesh, (4, 1, three), 'needs 4 .* there are 3'),
      (sharding.check_batch, (30, mesh), '30 examples.*4.*such as 28 or 32'),
      (sharding.check_batch, (3, mesh), '3 examples.*of 4, such as 4'),
      (sharding.check_batch, (0, mesh), 'a batch of 0'),
      (sharding.state_shardings, ({}, mesh, 'split'),
       "replicated, sharded, got 'split'"),
    ):  # fmt: skip
      with pytest.raises(UserError, match=message):
        function(*args)
    with pytest.raises(UserError, match='min_size must be at least 1, got 0'):
      sharding.state_shardings({}, mesh, min_size=0)


class StateShardingsTest:
  @pytest.mark.parametrize(
    ('shape', 'data_only', 'both'),
    [
      ((3, 3, 16, 48), (None, None, None, 'data'), (*[None] * 3, BOTH)),
      ((3, 3, 64, 16), (None, None, 'data'), (None, None, 'data', 'model')),
      ((64, 64), (None, 'data'), ('data', 'model')),
      ((64, 10), ('data',), ('data', 'model')),
      ((64, 9), ('data',), ('data',)),
      ((64,), ('data',), (BOTH,)),
      ((9, 7), (), ()),
      ((8,), (), ()),
      ((), (), ()),
    ],
  )
  def test_longest_axis_that_fits_is_split(self, shape, data_only, both):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    for mesh, spec in (
      (sharding.make_mesh(8), data_only),
      (sharding.make_mesh(4, 2), both),
    ):
      found = sharding.state_shardings(leaf, mesh, min_size=16)
      assert found.spec == PartitionSpec(*spec)
      found.shard_shape(shape)  # refuses what cannot be divided
      whole = sharding.state_shardings(leaf, mesh, 'replicated')
      assert whole.spec == PartitionSpec()

  def test_all_that_belongs_to_a_weight_lies_with_it(self):
    _, state, _ = make_state()
    slots = state.opt_state.inner_state.inner_state[0].trace
    for module, leaves in state.phi.items():
      for name, leaf in leaves.items():
        assert leaf.sharding.spec or leaf.size < MIN_SIZE or leaf.size == 10
        for tree in (state.opt_state.masks, slots):
          assert tree[module][name].sharding == leaf.sharding
    averages = jax.tree.leaves(state.net_state)
    assert {x.sharding.spec for x in averages if x.size == 16} == {
      PartitionSpec(None, None, None, 'data')
    }


class TrainingTest:
  @pytest.mark.parametrize(
    ('data', 'model', 'explicit', 'is_fused'),
    [(8, 1, False, False), (4, 2, True, False), (4, 2, True, True)],
  )
  @pytest.mark.slow
  def test_steps_are_those_of_one_device(self, data, model, explicit, is_fused):
    net, tx, _, arrays = make_problem()
    mesh, state, shardings = make_state(data, model, explicit=explicit)
    step = sharding.on_mesh(
      step_lib.make_step(net, fusing.fused(tx) if is_fused else tx),
      shardings,
      mesh,
    )
    losses = []
    for parts in zip(
      *(np.split(array, NUM_STEPS) for array in arrays), strict=True
    ):
      batch = jax.device_put(parts, sharding.batch_sharding(mesh))
      state, found = step(state, *batch)
      losses.append(float(found['loss']))
    stream_runs.assert_lies(state, shardings)
    assert_same_run(state, losses)

  @pytest.mark.slow
  def test_many_steps_in_a_dispatch_with_data_parallelism(self):
    net, tx, _, arrays = make_problem()
    mesh, state, _ = make_state()
    shardings = sharding.state_shardings(state, mesh, 'replicated')
    state = jax.device_put(state, shardings)
    advance = sharding.on_mesh(
      step_lib.make_advance(net, tx),
      shardings,
      mesh,
      (sharding.replicated(mesh), sharding.batch_sharding(mesh, axis=1)),
    )
    rows = np.arange(NUM_STEPS * BATCH, dtype=np.int32).reshape(-1, 4, BATCH)
    losses = []
    for indices in rows:
      state, found = advance(state, arrays, indices)
      losses.append(float(found['loss']))
    assert_same_run(state, losses, every=4)
