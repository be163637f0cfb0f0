"""The benchmark programs run and print their tables; no time is asserted."""

import pytest

from experiments import benchmark_psi, benchmark_step, benchmark_topk


def test_psi(capsys):
  benchmark_psi.main(benchmark_psi.Config(size=1000, alphas=(2.0,), repeats=1))
  printed = capsys.readouterr().out
  assert 'scaled copy' in printed and 'ψ, α = 2 ' in printed


def test_step(capsys):
  benchmark_step.main(
    benchmark_step.Config(
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
  benchmark_topk.main(
    benchmark_topk.Config(sizes=(1000,), resnet=False, repeats=1, out=out)
  )
  assert 'top_k_masks' in capsys.readouterr().out
  written = out.read_text()
  with pytest.raises(ValueError, match='exists already'):
    benchmark_topk.main(benchmark_topk.Config(sizes=(10,), out=out))
  assert out.read_text() == written
