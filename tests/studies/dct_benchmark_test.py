"""The benchmark of the cosine transform runs; no time is asserted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import dct


@pytest.mark.slow
def test_prints_a_table_for_each_layer(capsys):
  dct.main(
    dct.Config(
      widths=(8,),
      batches=(2,),
      convs=('last',),
      conv_batch=1,
      densities=(0.5,),
      steps=1,
      repeats=1,
    )
  )
  printed = capsys.readouterr().out
  assert 'linear 8 → 8, batch 2, density 0.5' in printed
  assert 'conv 3×3, 512 → 512, batch 1 of 1×1, density 0.5' in printed
  for form in dct.FORMS:
    for method in dct.METHODS:
      assert printed.count(f'\n{form}, {method}  ') == 2


@pytest.mark.parametrize('method', dct.METHODS)
@pytest.mark.slow
def test_forms_take_the_same_step(method):
  mask = np.eye(6, dtype=bool)
  x = jax.random.normal(jax.random.key(0), (3, 6))
  found = {}
  for form in dct.FORMS:
    step, carry = dct.make_step(form, method, mask, x)
    # The same weights in both.
    layer = carry[0]['layer']
    name = 'w' if form == 'masked' else 'values'
    layer[name] = 2 * jnp.eye(6) if form == 'masked' else 2 * jnp.ones(6)
    (phi, *_), to_inputs = step(carry, x)
    layer = phi['layer']
    assert ('transform_scale' in layer) == (method != 'none')
    values = layer[name][mask] if form == 'masked' else layer[name]
    found[form] = values, to_inputs
  for masked, thin in zip(*found.values(), strict=True):
    np.testing.assert_allclose(masked, thin, atol=1e-6)
