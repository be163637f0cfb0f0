"""The benchmark of layers without zeros, at a tiny size."""

import json

import jax.numpy as jnp
import numpy as np
import programs
import pytest
import scipy.sparse

from experiments.benchmarks import (
  mkl,
  sparse_gpu,
  sparse_networks,
  sparse_speed,
)


@pytest.mark.slow
def test_writes_tables_and_a_figure(tmp_path):
  args = '--parts inference accuracy --widths 16 --batches 1 32'
  args += ' --train-batch 8 --sparsities 0.8 --repeats 1 --data.name digits'
  args += ' --accuracy-width 16 --accuracy 0.99 --max-steps 200'
  out = ('--out', tmp_path / 'speed')
  assert programs.run(sparse_speed, *args.split(), *out) == 0
  records = json.loads((tmp_path / 'speed/results.json').read_text())
  ways = {(r['what'], r['way']) for r in records}
  assert {
    ('product 16, batch 32', 'BCSR'),
    ('product 16, batch 1', 'dense'),
  } < ways
  timed = [r for r in records if 'product' in r['what']]
  assert all(r['ms'] > 0 and r['speed_up'] > 0 for r in timed)
  trained = [r for r in records if 'units' in r['what']]
  found = [(r['way'], r['sparsity']) for r in trained]
  assert found == [('dense', 0.0), ('condensed', 0.8)]
  assert all(r['steps'] == 200 and r['seconds'] > 0 for r in trained)
  assert (tmp_path / 'speed/speed_ups.png').stat().st_size > 10_000


@pytest.mark.slow
def test_measures_steps_of_networks(tmp_path):
  args = '--nets perceptron lenet_5 --sparsities 0.8 0.98 --width 16 --batch 4'
  out = ('--out', tmp_path / 'nets')
  args = (*args.split(), '--repeats', '1', *out)
  assert programs.run(sparse_networks, *args) == 0
  records = json.loads((tmp_path / 'nets/results.json').read_text())
  for what in ('perceptron, batch 4', 'lenet_5, batch 4'):
    rows = [r for r in records if r['what'] == what]
    assert [(r['sparsity'], r['way']) for r in rows] == [
      (0.0, 'dense'),
      (0.8, 'masked'),
      (0.8, 'condensed'),
      (0.8, 'auto'),
      (0.98, 'condensed'),
      (0.98, 'auto'),
    ]
    assert all(r['ms'] > 0 and r['speed_up'] > 0 for r in rows)
    assert rows[4]['state_mb'] < rows[2]['state_mb'] < rows[1]['state_mb']
  assert (tmp_path / 'nets/speed_ups.png').stat().st_size > 10_000


def test_forms_for_a_gpu_multiply():
  random = np.random.default_rng(0)
  x = random.standard_normal((3, 8))
  inputs = np.array([[0, 2], [1, 3], [2, 3], [0, 1]])
  blocks = random.standard_normal((4, 2, 2, 2))
  dense = np.zeros((8, 8))
  for o, kept in enumerate(inputs):
    for k, i in enumerate(kept):
      dense[2 * i : 2 * i + 2, 2 * o : 2 * o + 2] = blocks[o, k]
  y = sparse_gpu.block_product(jnp.asarray(x), blocks, inputs)
  np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-5)
  places = np.argsort(random.random((2, 5, 4)))[..., :2]
  values = random.standard_normal((2, 5, 2))
  dense = np.zeros((2, 4, 5))
  for four, out, pair in np.ndindex(values.shape):
    dense[four, places[four, out, pair], out] = values[four, out, pair]
  y = sparse_gpu.pair_product(*map(jnp.asarray, (x, values, places)))
  np.testing.assert_allclose(y, x @ dense.reshape(8, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_forms_for_a_gpu_are_measured_on_a_cpu(tmp_path, capsys):
  args = '--width 32 --batch 4 --block 8 --sparsities 0.5 0.9 --repeats 1'
  out = ('--out', tmp_path / 'gpu')
  assert programs.run(sparse_gpu, *args.split(), *out) == 0
  assert 'There is no GPU here' in capsys.readouterr().out
  records = json.loads((tmp_path / 'gpu/results.json').read_text())
  ways = {r['way'] for r in records}
  assert ways == {'dense', 'masked', 'blocks', 'BCSR', 'pairs'}


@pytest.mark.skipif(not mkl.is_available(), reason='MKL is not installed')
@pytest.mark.parametrize('num_vectors', [1, 5])
def test_mkl_multiplies(num_vectors):
  matrix = scipy.sparse.random(7, 4, 0.5, 'csr', np.float32, random_state=0)
  x = np.arange(4.0 * num_vectors, dtype=np.float32).reshape(4, num_vectors)
  found = mkl.Matrix(matrix, num_vectors)(x)
  np.testing.assert_allclose(found, matrix @ x, rtol=1e-6)
