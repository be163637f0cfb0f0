"""The benchmark programs run and print their tables; no time is asserted."""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from experiments.benchmarks import (
  dct,
  psi,
  resnet_step,
  rewiring,
  sparse_step,
  step,
  topk,
)
from powerprop_jax.optim import views
from powerprop_jax.train.cli import timing

# What is typed, and what is printed: what stands here twice, twice.
TABLES = [
  (
    step,
    '--batch-size 2 --num-steps 2 --repeats 1 --rounds 1 --alphas 2'
    ' --torch-threads',
    ['dense Haiku and Optax', 'α = 2 traced'],
  ),
  (
    sparse_step,
    '--nets lenet_300_100 --ways lanes --methods rigl --batch 2'
    ' --image-size 8 --steps 2 --repeats 1 --lanes 2 --with-flags',
    ['lenet_300_100, lanes (2 networks), batch 2 of 8×8×1']
    + ['\ndense  ', '\ndense, again  ', '\nrigl  ', '\nrigl, our flags  '],
  ),
  (
    resnet_step,
    '--methods static --alphas 1.5 --batch 2 --image-size 32 --depth 10'
    ' --width 0.0625 --num-classes 10 --steps 1 --repeats 1 --peak 1',
    ['batch 2 of 32×32', '\nplain  ', '\ndense  ', '\nstatic, α = 1.5  '],
  ),
  (
    dct,
    '--widths 8 --batches 2 --convs last --conv-batch 1 --densities 0.5'
    ' --steps 1 --repeats 1',
    ['linear 8 → 8, batch 2, density 0.5']
    + ['conv 3×3, 512 → 512, batch 1 of 1×1, density 0.5']
    + 2 * [f'\n{form}, {way}  ' for form in dct.FORMS for way in dct.METHODS],
  ),
]


@pytest.mark.parametrize(
  ('program', 'args', 'printed'),
  [
    (psi, '--size 1000 --alphas 2 --repeats 1', ['scaled copy', 'ψ, α = 2 ']),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in TABLES),
  ],
)
def test_a_table_is_printed(program, args, printed, capsys):
  assert programs.run(program, *args.split()) == 0
  shown = capsys.readouterr().out
  for words in printed:
    assert shown.count(words) >= printed.count(words), words


def test_topk_replaces_no_file_of_results(tmp_path, capsys):
  out = tmp_path / 'results.json'
  args = ['--sizes', '1000', '--no-resnet', '--repeats', '1', '--out', out]
  assert programs.run(topk, *args) == 0
  assert 'top_k_masks' in capsys.readouterr().out
  written = out.read_text()
  assert 'exists already' in programs.error(programs.run(topk, *args), capsys)
  assert out.read_text() == written


def test_the_step_keeps_the_state_of_the_network():
  def forward(images, is_training):
    norm = hk.BatchNorm(create_scale=False, create_offset=False, decay_rate=0.5)
    return hk.Linear(2)(norm(images, is_training))

  net = hk.transform_with_state(forward)
  tx = optax.sgd(0.1)
  images, labels = 1 + jnp.eye(3), jnp.array([0, 1, 1])
  theta, net_state = net.init(jax.random.key(0), images, True)
  step = sparse_step.make_step(net, tx, views.effective_params)
  carry = step((theta, tx.init(theta), net_state), images, labels)
  average = carry[2]['batch_norm/~/mean_ema']['average']
  np.testing.assert_allclose(average, jnp.full((1, 3), 4 / 3), rtol=1e-6)
  assert (carry[0]['linear']['w'] != theta['linear']['w']).any()


@pytest.mark.parametrize('name', sparse_step.METHODS)
def test_methods_of_sparse_step_have_the_sparsity_they_are_asked_for(name):
  theta = {'linear': {'w': jnp.ones((64, 64))}}
  tx = sparse_step.METHODS[name](optax.sgd(0.1), 0.75)
  masks = views.current_masks(theta, tx.init(theta))
  # Gradual pruning starts dense.
  kept = 4096 if name == 'gradual' else 1024
  assert masks['linear']['w'].sum() == kept


@pytest.mark.slow
def test_rewiring_by_counting_and_by_sorting_agree(capsys):
  methods = ('rigl', 'set', 'magnitude', 'magnitude_global', 'dsr')
  rewiring.main(rewiring.Config(net='mlp', methods=methods, repeats=2))
  lines = capsys.readouterr().out.splitlines()
  words = [line.split() for line in lines[-5:]]
  found = {row[0]: row[-1] for row in words}
  assert found == dict.fromkeys(methods, 'yes') | {'dsr': '-'}


@pytest.mark.parametrize('method', dct.METHODS)
@pytest.mark.slow
def test_forms_take_the_same_step(method):
  mask = np.eye(6, dtype=bool)
  x = jax.random.normal(jax.random.key(0), (3, 6))
  found = []
  for form in dct.FORMS:
    step, carry = dct.make_step(form, method, mask, x)
    # The same weights in both.
    start = jnp.eye(6) if form == 'masked' else jnp.ones((1, 6))
    carry[0]['layer']['w'] = 2 * start
    (phi, *_), to_inputs = step(carry, x)
    layer = phi['layer']
    assert ('transform_scale' in layer) == (method != 'none')
    w = layer['w'][mask if form == 'masked' else 0]
    found.append((w, to_inputs))
  chex.assert_trees_all_close(*found, atol=1e-6)


def test_ratios_and_shares_are_those_of_the_times():
  times = {
    'plain': timing.Times(9.0, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
    'dense': timing.Times(9.0, [1.0, 2.0, 4.0], [2.0, 2.0, 2.0]),
    'rigl': timing.Times(9.0, [1.0, 2.2, 4.0], [2.0, 2.5, 3.0]),
    'rigl, rewires': timing.Times(9.0, [2.0, 4.2, 8.0], [2.0, 2.0, 2.0]),
  }
  config = resnet_step.Config(batch=2, image_size=224, steps=1, peak=1.0)
  found = {row['step']: row for row in resnet_step.rows(config, times)}
  assert found['plain']['/ dense'] == 0.5
  expected = {'/ dense': 1.0, 'cpu / dense': 1.25, 'ms': 2200.0}
  assert found['rigl'] | expected == found['rigl']
  assert found['rigl, rewires']['amortised'] == 0.01
  assert found['rigl']['amortised'] is None
  # 2 images in 2 seconds, 3 · 8.178 GFLOP each, of 1 TFLOP/s.
  assert found['dense']['images/s'] == 1.0
  assert found['dense']['of peak'] == pytest.approx(0.025, abs=1e-3)


def test_says_so_where_there_is_no_gpu(capsys):
  if jax.default_backend() == 'gpu':
    pytest.skip('this machine has a GPU')
  resnet_step.main(resnet_step.Config(device='gpu'))
  assert 'There is no GPU here' in capsys.readouterr().out
