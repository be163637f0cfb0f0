"""A layer that the optimiser leaves alone is named before it loses weights."""

import warnings

import aliases_test
import optax
import pytest
import small

import powerprop_jax as pp


def make_theta():
  return small.two_layers((6, 5), (5, 4))


def frozen(names):
  labels = {'a': {'w': 'train', 'b': 'train'}, 'n': {'w': 'train'}}
  for module, name in names:
    labels[module][name] = 'freeze'
  return optax.multi_transform(
    {'train': optax.adam(0.1), 'freeze': optax.set_to_zero()}, labels
  )


METHODS = {n: aliases_test.ALL[n] for n in ('rigl', 'static', 'gradual')}


@pytest.mark.parametrize('alpha', [None, 2.0])
@pytest.mark.parametrize('method', METHODS)
def test_a_frozen_layer_that_is_masked_is_named(method, alpha):
  inner = frozen([('n', 'w')])
  if alpha is not None:
    inner = pp.powerprop(inner, alpha)
  with pytest.warns(UserWarning, match="never moves 'n/w'.*exclude"):
    pp.init(METHODS[method](inner, 0.5), make_theta())


@pytest.mark.parametrize('method', METHODS)
def test_no_warning_where_nothing_is_lost(method):
  left_out = {'select': pp.exclude(pp.is_weight, '^n/')}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    pp.init(METHODS[method](frozen([('a', 'b')]), 0.5), make_theta())
    pp.init(
      METHODS[method](frozen([('n', 'w')]), 0.5, **left_out), make_theta()
    )
    pp.init(METHODS[method](frozen([]), 0.5), make_theta())


def test_an_optimiser_that_wants_the_loss_starts():
  weights = lambda tree: {'a': {'w': True, 'b': False}, 'n': {'w': True}}
  inner = optax.chain(
    optax.masked(optax.add_decayed_weights(0.1), weights), optax.polyak_sgd()
  )
  pp.init(pp.rigl(inner, 0.5, stop=900), make_theta())
