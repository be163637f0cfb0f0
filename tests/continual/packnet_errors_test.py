"""What packing refuses, and that nothing is lost by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import pytest

from powerprop_jax import continual
from powerprop_jax.core import select as select_lib
from powerprop_jax.optim import views


@pytest.mark.parametrize('alpha', [2.0, jnp.float32(1.5)])
def test_zero_is_refused_where_it_is_a_critical_point(alpha):
  state = packing.init('packnet', alpha=alpha)
  with pytest.raises(ValueError, match=r"φ = 0.*restart='redraw'"):
    packing.learn(state, packing.config(restart='zero'), 'a')


@pytest.mark.parametrize(('density', 'num_free'), [(1.0, 0), (0.4, 30)])
def test_capacity_used_up_is_said_and_nothing_is_lost(density, num_free):
  config = packing.config(density, min_free=num_free + 1)
  state, report = packing.learn(packing.init(), config, 'a')
  assert report.num_free == num_free
  before = continual.to_arrays(state)
  message = rf"task 'b': {num_free} .* at least {num_free + 1}\. .* fit, 'a'"
  with pytest.raises(continual.CapacityError, match=message) as caught:
    packing.learn(state, config, 'b')
  assert caught.value.task_ids == ('a',)
  assert isinstance(caught.value, ValueError)
  assert packing.same_bits(continual.to_arrays(state), before)
  if num_free:
    packing.learn(state, packing.config(density, min_free=num_free), 'b')


def _times(factor):
  return lambda phi, *_: {'phi': jax.tree.map(lambda p: factor * p, phi)}


def _other_alpha(phi, _, opt_state):
  phi, opt_state = views.with_alpha(phi, opt_state, 3.0)
  return {'phi': phi, 'opt_state': opt_state}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_times(2), "protected weights of 'm/b' have moved"),
    (_times(jnp.nan), "leaf 'm/b' holds a number that is not finite"),
    (
      lambda phi, *_: {'phi': {'m': phi['m']}},
      "leaf 'n/w' is nothing in the φ that train returned for task 'b'",
    ),
    (
      lambda *_: {'net_state': {}},
      "net_state that train returned for task 'b'",
    ),
    (_other_alpha, r'changed α from \[2.0\] to \[3.0\]'),
  ],
)
def test_trainings_that_break_the_rules_are_refused(change, message):
  config = packing.config()
  state, _ = packing.learn(packing.init(), config, 'a')
  before = continual.to_arrays(state)
  train = lambda learner, task: learner._replace(**change(*learner))
  with pytest.raises(ValueError, match=message):
    packing.learn(state, config, 'b', train=train)
  assert packing.same_bits(continual.to_arrays(state), before)


@pytest.mark.parametrize(
  ('scores', 'message'),
  [([-0.1], ', dense'), ([1.0, float('nan')], r' at density 0\.4')],
)
def test_senseless_scores_are_refused_and_name_the_task(scores, message):
  evaluate = packing.scripted(*scores)
  with pytest.raises(ValueError, match=f"for task 'a'{message}"):
    packing.learn(packing.init(), packing.config(), 'a', evaluate=evaluate)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'gamma': 0.0}, r'gamma must be in \(0, 1\], got 0.0'),
    ({'gamma': 1.1}, r'got 1.1'),
    ({'gamma': float('nan')}, r'got nan'),
    ({'densities': ()}, 'at least one share'),
    ({'densities': (0.0,)}, r'densities must be in \(0, 1\]'),
    ({'search': 'guess'}, "'scan' or 'bisect', got 'guess'"),
    ({'scope': 'all'}, "'layer' or 'global', got 'all'"),
    ({'restart': 'ones'}, "'keep' or None, got 'ones'"),
    ({'min_free': 0}, 'at least 1, got 0'),
  ],
)
def test_settings_out_of_range_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    continual.PackConfig(**{'densities': (0.5,), **kwargs})


def test_names_of_tasks_are_checked():
  config = packing.config(0.1)
  state, _ = packing.learn(packing.init(), config, np.int64(3))
  state, _ = packing.learn(state, config, 'mnist')
  assert state.task_ids == (3, 'mnist')
  with pytest.raises(ValueError, match=r"task 3 is .* already.* 3, 'mnist'"):
    packing.learn(state, config, 3)
  with pytest.raises(TypeError, match=r'integer or a string, got 1\.5'):
    packing.learn(state, config, 1.5)
  with pytest.raises(ValueError, match=r"no task '3' .* holds 3, 'mnist'"):
    continual.predict(packing.apply, state, '3', packing.make_task(9).x)
  with pytest.raises(ValueError, match='holds none'):
    continual.task_masks(packing.init(), 3)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'method': 'epn'}, "'efficient_packnet', got 'epn'"),
    ({'private': 'share'}, "'freeze' or 'per_task', got 'share'"),
    ({'heads': select_lib.by_regex('w$')}, 'tasks would share nothing'),
    ({'heads': select_lib.by_regex('logits')}, 'chose none of the leaves'),
  ],
)
def test_networks_that_cannot_be_packed_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    packing.init(**kwargs)
  with pytest.raises(ValueError, match='found no sparsify'):
    continual.init_pack(optax.sgd(0.1), packing.theta(), {}, 'packnet')
