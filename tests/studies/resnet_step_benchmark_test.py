"""The benchmark of steps of ResNet-50 runs; no time is asserted."""

import dataclasses

import jax
import pytest

from experiments.benchmarks import resnet_step
from powerprop_jax.train.cli import timing

TINY = resnet_step.Config(
  methods=('static',),
  alphas=(1.5,),
  batch=2,
  image_size=32,
  depth=10,
  width=1 / 16,
  num_classes=10,
  steps=1,
  repeats=1,
  peak=1.0,
)


@pytest.mark.slow
def test_prints_a_row_for_each_step(capsys):
  resnet_step.main(TINY)
  printed = capsys.readouterr().out
  assert 'batch 2 of 32×32' in printed
  for name in ('plain', 'dense', 'static, α = 1.5'):
    assert f'\n{name}  ' in printed


def test_ratios_and_shares_are_those_of_the_times():
  times = {
    'plain': timing.Times(9.0, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
    'dense': timing.Times(9.0, [1.0, 2.0, 4.0], [2.0, 2.0, 2.0]),
    'rigl': timing.Times(9.0, [1.0, 2.2, 4.0], [2.0, 2.5, 3.0]),
    'rigl, rewires': timing.Times(9.0, [2.0, 4.2, 8.0], [2.0, 2.0, 2.0]),
  }
  config = dataclasses.replace(TINY, image_size=224, period=100)
  found = {row['step']: row for row in resnet_step.rows(config, times)}
  assert found['plain']['/ dense'] == 0.5
  assert found['rigl']['/ dense'] == 1.0
  assert found['rigl']['cpu / dense'] == 1.25
  assert found['rigl']['ms'] == 2200.0
  assert found['rigl, rewires']['amortised'] == 0.01
  assert found['rigl']['amortised'] is None
  # 2 images in 2 seconds, 3 · 8.178 GFLOP each, of 1 TFLOP/s.
  assert found['dense']['images/s'] == 1.0
  assert found['dense']['of peak'] == pytest.approx(0.025, abs=1e-3)


def test_says_so_where_there_is_no_gpu(capsys):
  if jax.default_backend() == 'gpu':
    pytest.skip('this machine has a GPU')
  resnet_step.main(dataclasses.replace(TINY, device='gpu'))
  assert 'There is no GPU here' in capsys.readouterr().out
