"""A network with its tasks is saved whole and goes on elsewhere, bit by bit."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import pytest

from powerprop_jax import continual
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import sparsify
from powerprop_jax.optim.topologies import protected
from powerprop_jax.train.checkpoints import checkpoint

_X = packing.make_task(9).x


def _config(**kwargs):
  return continual.PackConfig('efficient_packnet', (0.2, 0.4), **kwargs)


def _init(config, alpha=2.0, theta=None):
  tx = packing.make_tx(optax.adam(0.03), alpha)
  return continual.init_pack(
    tx, theta or packing.theta(), packing.net_state(), config
  )


def _go_on(state, config, seeds):
  step = packing.jit(packing.make_step(state.tx))
  for seed in seeds:
    state, _ = continual.learn(
      state,
      seed,
      packing.make_task(seed),
      packing.make_train(step, 5),
      packing.evaluate,
      config,
      seed,
    )
  return state


def _saved_and_loaded(arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  file.seek(0)
  return np.load(file)


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
@pytest.mark.parametrize('heads', [None, select_lib.by_regex('^n/')])
def test_learning_goes_on_from_a_file_with_the_same_bits(private, heads):
  config = _config(private=private, heads=heads)
  first = _go_on(_init(config), config, (1, 2))
  arrays = continual.to_arrays(first)
  other = jax.tree.map(lambda t: t + 1, packing.theta())
  loaded = continual.from_arrays(
    _saved_and_loaded(arrays), _init(config, theta=other)
  )
  assert packing.same_bits(continual.to_arrays(loaded), arrays)
  assert [t.report for t in loaded.tasks] == [t.report for t in first.tasks]
  together = _go_on(first, config, (3,))
  apart = _go_on(loaded, config, (3,))
  assert packing.same_bits(
    continual.to_arrays(apart), continual.to_arrays(together)
  )
  for task_id in (1, 2, 3):
    assert packing.same_bits(
      continual.predict(packing.apply, apart, task_id, _X),
      continual.predict(packing.apply, together, task_id, _X),
    )


def test_a_checkpoint_takes_the_arrays(tmp_path):
  config = _config()
  state = _go_on(_init(config), config, (1, 2))
  arrays = continual.to_arrays(state)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(2, arrays, {})
    checkpoints.wait()
    restored, _, _ = checkpoints.restore_latest(jax.eval_shape(lambda: arrays))
  again = continual.from_arrays(restored, _init(config))
  assert packing.same_bits(continual.to_arrays(again), arrays)


def test_half_precision_survives_a_file():
  theta = {'linear': {'w': jnp.linspace(-2, 2, 12, dtype=jnp.bfloat16)[None]}}
  tx = sparsify.sparsify(optax.sgd(0.1), protected.protected())
  config = _config(private='per_task')
  fresh = continual.init_pack(tx, theta, {}, config)
  state, _ = continual.learn(
    fresh, 'a', None, lambda learner, task: learner, lambda *_: 1.0, config, 0
  )
  arrays = continual.to_arrays(state)
  loaded = continual.from_arrays(_saved_and_loaded(arrays), fresh)
  assert loaded.phi['linear']['w'].dtype == jnp.bfloat16
  assert packing.same_bits(continual.to_arrays(loaded), arrays)


def test_a_task_costs_a_bit_for_each_shared_weight():
  config = _config()
  state = _init(config)
  sizes = []
  for seed in (1, 2, 3):
    state = _go_on(state, config, (seed,))
    arrays = continual.to_arrays(state)
    sizes.append(sum(a.nbytes for name, a in arrays.items() if name != 'meta'))
  bits = 4 + 3  # bytes for 30 and for 20 weights
  assert np.diff(sizes).tolist() == [bits, bits]
  assert not any(task.private or task.net_state for task in state.tasks)


def test_private_leaves_cost_their_own_size():
  config = _config(private='per_task')
  state = _go_on(_init(config), config, (1,))
  stored = {
    name: array.nbytes
    for name, array in continual.to_arrays(state).items()
    if name.startswith('tasks/0/')
  }
  assert stored == {
    'tasks/0/masks/m/w': 4,
    'tasks/0/masks/n/w': 3,
    'tasks/0/private/m/b': 20,
    'tasks/0/net_state/norm/mean': 20,
    'tasks/0/net_state/norm/var': 20,
  }


def _without(name):
  return lambda arrays: {k: a for k, a in arrays.items() if k != name}


def _with(name, make):
  return lambda arrays: {**arrays, name: make(arrays[name])}


def _newer(meta):
  content = json.loads(meta.tobytes())
  content['format'] += 1
  return np.frombuffer(json.dumps(content).encode(), np.uint8)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_without('phi/m/w'), "'phi/m/w' is missing"),
    (_without('meta'), "'meta' is missing"),
    (_without('tasks/1/masks/n/w'), "'tasks/1/masks/n/w' is missing"),
    (
      _with('tasks/0/masks/n/w', lambda bits: bits[:-1]),
      r'tasks/0/masks/n/w: a mask of shape \(5, 4\) packs into 3 bytes, got 2',
    ),
    (_with('phi/n/w', lambda w: w.T), r'stored as float32 \(4, 5\)'),
    (_with('phi/n/w', np.float64), r'stored as float64 \(5, 4\)'),
    (_with('meta', _newer), 'in format 2, this version reads 1'),
  ],
)
def test_damaged_arrays_are_refused(damage, message):
  config = _config()
  state = _go_on(_init(config), config, (1, 2))
  arrays = damage(continual.to_arrays(state))
  with pytest.raises(ValueError, match=message):
    continual.from_arrays(arrays, _init(config))


def test_arrays_of_another_network_are_refused():
  arrays = continual.to_arrays(_init(_config()))
  with pytest.raises(ValueError, match=r'stored with alphas \[2.0\].* \[1.0\]'):
    continual.from_arrays(arrays, _init(_config(), alpha=1.0))
  with pytest.raises(ValueError, match=r'stored with layout .*per_task'):
    continual.from_arrays(arrays, _init(_config(private='per_task')))
