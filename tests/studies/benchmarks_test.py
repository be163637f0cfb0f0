"""The benchmark programs run and print their tables; no time is asserted."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks import psi, rewiring, sparse_step, step, topk
from powerprop_jax.optim import views


def test_psi(capsys):
  psi.main(psi.Config(size=1000, alphas=(2.0,), repeats=1))
  printed = capsys.readouterr().out
  assert 'scaled copy' in printed and 'ψ, α = 2 ' in printed


@pytest.mark.slow
def test_step(capsys):
  step.main(
    step.Config(
      batch_size=2,
      num_steps=2,
      repeats=1,
      rounds=1,
      alphas=(2.0,),
      torch_threads=(),
    )
  )
  printed = capsys.readouterr().out
  assert 'dense Haiku and Optax' in printed and 'α = 2 traced' in printed


def test_topk(capsys, tmp_path):
  out = tmp_path / 'results.json'
  topk.main(topk.Config(sizes=(1000,), resnet=False, repeats=1, out=out))
  assert 'top_k_masks' in capsys.readouterr().out
  written = out.read_text()
  with pytest.raises(ValueError, match='exists already'):
    topk.main(topk.Config(sizes=(10,), out=out))
  assert out.read_text() == written


@pytest.mark.slow
def test_sparse_step(capsys):
  sparse_step.main(
    sparse_step.Config(
      nets=('lenet_300_100',),
      ways=('lanes',),
      methods=('rigl',),
      batch=2,
      image_size=8,
      steps=2,
      repeats=1,
      lanes=2,
      with_flags=True,
    )
  )
  printed = capsys.readouterr().out
  assert 'lenet_300_100, lanes (2 networks), batch 2 of 8×8×1' in printed
  for name in ('dense', 'dense, again', 'rigl', 'rigl, our flags'):
    assert f'\n{name}  ' in printed


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
  sorted_too = ('rigl', 'set', 'magnitude', 'magnitude_global')
  rewiring.main(
    rewiring.Config(net='mlp', methods=(*sorted_too, 'dsr'), repeats=2)
  )
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line for line in lines[-5:]}
  for method in sorted_too:
    assert rows[method].endswith(' yes')
  assert rows['dsr'].endswith(' -')
