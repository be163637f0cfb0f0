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


def _go_on(state, *seeds):
  train = packing.make_train(state.tx, 5)
  for seed in seeds:
    args = seed, train, packing.evaluate, packing.make_task(seed)
    state, _ = packing.learn(state, packing.config(), *args)
  return state


def _saved_and_loaded(arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  file.seek(0)
  return np.load(file)


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
@pytest.mark.parametrize('heads', [None, select_lib.by_regex('^n/')])
def test_learning_goes_on_from_a_file_with_the_same_bits(private, heads):
  init = lambda: packing.init(private=private, heads=heads)
  first = _go_on(init(), 1, 2)
  arrays = continual.to_arrays(first)
  loaded = continual.from_arrays(_saved_and_loaded(arrays), init())
  assert packing.same_bits(continual.to_arrays(loaded), arrays)
  assert [t.report for t in loaded.tasks] == [t.report for t in first.tasks]
  together, apart = _go_on(first, 3), _go_on(loaded, 3)
  assert packing.same_bits(
    continual.to_arrays(apart), continual.to_arrays(together)
  )
  for task_id in (1, 2, 3):
    assert packing.same_bits(
      continual.predict(packing.apply, apart, task_id, _X),
      continual.predict(packing.apply, together, task_id, _X),
    )


def test_a_checkpoint_takes_the_arrays(tmp_path):
  arrays = continual.to_arrays(_go_on(packing.init(), 1, 2))
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(2, arrays, {})
    checkpoints.wait()
    restored, _, _ = checkpoints.restore_latest(jax.eval_shape(lambda: arrays))
  again = continual.from_arrays(restored, packing.init())
  assert packing.same_bits(continual.to_arrays(again), arrays)


def test_half_precision_survives_a_file():
  theta = {'linear': {'w': jnp.linspace(-2, 2, 12, dtype=jnp.bfloat16)[None]}}
  tx = sparsify.sparsify(optax.sgd(0.1), protected.protected())
  fresh = continual.init_pack(tx, theta, {}, 'packnet', private='per_task')
  state, _ = packing.learn(fresh, packing.config(), 'a')
  arrays = continual.to_arrays(state)
  loaded = continual.from_arrays(_saved_and_loaded(arrays), fresh)
  assert loaded.phi['linear']['w'].dtype == jnp.bfloat16
  assert packing.same_bits(continual.to_arrays(loaded), arrays)


@pytest.mark.parametrize('private', ['freeze', 'per_task'])
def test_a_task_costs_a_bit_for_each_shared_weight_and_what_is_its_own(private):
  arrays = continual.to_arrays(_go_on(packing.init(private=private), 1, 2))
  own = {'private/m/b': 20, 'net_state/norm/mean': 20, 'net_state/norm/var': 20}
  expected = {'masks/m/w': 4, 'masks/n/w': 3}  # bytes for 30 and 20 weights
  expected |= own if private == 'per_task' else {}
  for number in (0, 1):
    folder = f'tasks/{number}/'
    assert expected == {
      name.removeprefix(folder): array.nbytes
      for name, array in arrays.items()
      if name.startswith(folder)
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
    (_without('tasks/0/masks/n/w'), "'tasks/0/masks/n/w' is missing"),
    (
      _with('tasks/0/masks/n/w', lambda bits: bits[:-1]),
      r'tasks/0/masks/n/w was stored as uint8 \(2,\).* has uint8 \(3,\)',
    ),
    (_with('phi/n/w', lambda w: w.T), r'stored as float32 \(4, 5\)'),
    (_with('phi/n/w', np.float64), r'stored as float64 \(5, 4\)'),
    (_with('meta', _newer), 'in format 2, this version reads 1'),
  ],
)
def test_damaged_arrays_are_refused(damage, message):
  state, _ = packing.learn(packing.init(), packing.config(), 'a')
  with pytest.raises(ValueError, match=message):
    continual.from_arrays(damage(continual.to_arrays(state)), packing.init())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'alpha': 1.0}, r'stored with alphas \[2.0\].* \[1.0\]'),
    ({'private': 'per_task'}, r'stored with layout .*per_task'),
  ],
)
def test_arrays_of_another_network_are_refused(changes, message):
  arrays = continual.to_arrays(packing.init())
  with pytest.raises(ValueError, match=message):
    continual.from_arrays(arrays, packing.init(**changes))
