"""What may stand around sparsify, and what is refused there."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.train import step as step_lib


def make_theta():
  return small.two_layers((12, 10), (5, 8))


def rigl(inner, alpha=None, **options):
  if alpha is not None:
    inner = pp.powerprop(inner, alpha)
  return pp.rigl(inner, 0.5, start=1, stop=90, period=2, **options)


AFTER = {
  'learning_rate': lambda: optax.scale_by_learning_rate(0.1),
  'schedule': lambda: optax.scale_by_schedule(lambda step: 0.1),
  'clip': lambda: optax.clip(0.1),
  'noise': lambda: optax.add_noise(0.1, 0.5, 0),
  'apply_every': lambda: optax.apply_every(2),
  'decay_phi': lambda: pp.decay_phi(0.1, 0.1),
  'identity': optax.identity,
}


@pytest.mark.parametrize('after', AFTER)
@pytest.mark.parametrize('alpha', [None, 2.0])
def test_what_follows_in_a_chain_is_refused(after, alpha):
  tx = optax.chain(rigl(optax.adam(0.1), alpha), AFTER[after]())
  with pytest.raises(ValueError, match=r'sparsify.* Write sparsify\(') as told:
    pp.init(tx, make_theta())
  assert ('powerprop(' in str(told.value)) == (
    alpha is not None or after == 'decay_phi'
  )


def test_the_view_of_a_step_refuses_it_too():
  tx = optax.chain(rigl(optax.sgd(0.1)), optax.scale(0.1))
  theta = make_theta()
  with pytest.raises(ValueError, match='last in a chain'):
    jax.jit(lambda phi: pp.effective_params(phi, tx.init(phi)))(theta)


def test_chains_within_chains_and_with_names():
  inside = optax.chain(optax.chain(rigl(optax.sgd(0.1))), optax.scale(0.1))
  named = optax.named_chain(
    ('z', rigl(optax.sgd(0.1))), ('a', optax.scale(0.1))
  )
  for tx in (inside, named):
    with pytest.raises(ValueError, match='last in a chain'):
      pp.init(tx, make_theta())
  before = optax.named_chain(
    ('z', optax.clip(1.0)), ('a', rigl(optax.sgd(0.1)))
  )
  pp.init(before, make_theta())


AROUND = {
  'sam': lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
  'conditionally_transform': lambda tx: optax.conditionally_transform(
    tx, lambda step: step < 3
  ),
  'lookahead': lambda tx: optax.lookahead(tx, 5, 0.5),
  'schedule_free': lambda tx: optax.contrib.schedule_free(tx, 0.1),
  'mechanize': optax.contrib.mechanize,
}


@pytest.mark.parametrize('around', AROUND)
def test_wrappers_that_are_not_known_to_be_right_are_refused(around):
  tx = AROUND[around](rigl(optax.sgd(0.1)))
  theta = make_theta()
  params = optax.LookaheadParams.init_synced(theta)
  with pytest.raises(ValueError, match='must not be around sparsify'):
    if around == 'lookahead':
      pp.effective_params(theta, tx.init(params))
    else:
      pp.init(tx, theta)


def scaled(inner, factor):
  """A transformation of a user's own, which nothing is known of."""

  def update(updates, state, params=None):
    updates, state = inner.update(updates, state['mine'], params)
    return jax.tree.map(lambda u: factor * u, updates), {
      'mine': state,
      'more': jnp.zeros([]),
    }

  init = lambda params: {'mine': inner.init(params), 'more': jnp.zeros([])}
  return optax.GradientTransformation(init, update)


def in_a_pair(inner, factor):
  """Another, with a state that looks like that of a chain."""

  def update(updates, state, params=None):
    count, state = state
    updates, state = inner.update(updates, state, params)
    return jax.tree.map(lambda u: factor * u, updates), (count + 1, state)

  init = lambda params: (jnp.zeros([]), inner.init(params))
  return optax.GradientTransformation(init, update)


def without_a_trace(inner, factor):
  """Another, with the state of what is inside it."""

  def update(updates, state, params=None):
    updates, state = inner.update(updates, state, params)
    return jax.tree.map(lambda u: factor * u, updates), state

  return optax.GradientTransformation(inner.init, update)


@pytest.mark.parametrize('alpha', [None, 2.0])
@pytest.mark.parametrize('around', [scaled, in_a_pair])
def test_a_step_computes_with_the_masks_whatever_is_around(alpha, around):
  tx = around(rigl(optax.sgd(0.5), alpha), 0.3)
  phi, state = small.history(tx, make_theta(), 6)[-1]
  seen = pp.effective_params(phi, state, pinned=True)
  masks = pp.current_masks(phi, state)
  chex.assert_trees_all_equal(seen, pp.apply_masks(seen, masks))
  if alpha is None:  # latent weights are not where sparsify put them
    assert (phi['a']['w'] != seen['a']['w']).any()


@pytest.mark.parametrize('around', [scaled, in_a_pair, without_a_trace])
@pytest.mark.slow
def test_a_compiled_step_of_ours_does(around):
  net = nets.make('lenet_300_100', num_classes=3)
  images, labels = jnp.ones((4, 2, 2, 1)), jnp.array([0, 1, 2, 0])
  tx = around(pp.sparse_evolution(optax.sgd(0.5), 0.8, stop=90, period=1), 0.3)
  state = step_lib.create(net, tx, jax.random.key(0), images)
  step = step_lib.make_step(net, tx)
  run = jax.jit(functools.partial(step.gradient, labels=labels))
  update = jax.jit(step.update)
  for _ in range(5):
    grads, net_state, metrics = run(state, images)
    masked = state._replace(phi=pp.effective_params(state.phi, state.opt_state))
    chex.assert_trees_all_equal(metrics, run(masked, images)[2])
    state = update(state, grads, net_state)


def test_the_outermost_of_two_mistakes_is_told():
  mask = {'a': {'w': True, 'b': False}, 'n': {'w': True}}
  power = pp.powerprop(optax.sgd(0.1), 2.0)
  tx = optax.masked(pp.static(power, 0.5), mask)
  with pytest.raises(ValueError, match='sparsify must not be inside'):
    pp.init(tx, make_theta())


def test_powerprop_within_powerprop_is_refused():
  tx = pp.powerprop(pp.powerprop(optax.sgd(0.1), 2.0), 2.0)
  with pytest.raises(ValueError, match='more than once'):
    pp.init(tx, make_theta())


@pytest.mark.parametrize(
  ('tx', 'theta', 'thing'),
  [
    (make_theta(), optax.sgd(0.1), 'arguments are swapped'),
    (make_theta(), make_theta(), r'init\(tx, theta\).*dict for tx'),
    (
      pp.powerprop(optax.sgd(0.1), 2.0),
      {'a': {'w': jnp.ones((2, 2)), 'act': jnp.tanh}},
      "'a/act'.*eqx.filter",
    ),
    (pp.powerprop(optax.sgd(0.1), 2.0), jnp.ones((2, 2)), 'single array, f'),
    (
      pp.powerprop(optax.sgd(0.1), 2.0),
      {'l': {'w': jnp.ones(3)}},
      r'l/w float32\[3\].*two axes or more',
    ),
    (
      pp.powerprop(optax.sgd(0.1), 2.0),
      {'l': {'w': jnp.ones((2, 2), int)}},
      r'l/w int32\[2,2\].*floating point',
    ),
    (
      pp.powerprop(optax.sgd(0.1), 2.0, select='w'),
      make_theta(),
      re.escape("got 'w'. Write select=by_regex('w')"),
    ),
    (
      pp.powerprop(optax.sgd(0.1), 2.0, select=lambda *leaf: True),
      {'l': {'w': jnp.ones((2, 2), complex)}},
      "'l/w', which is complex64",
    ),
    (
      pp.static(optax.sgd(0.1), 0.5, distribution='erk'),
      make_theta(),
      "pp.erk.*'erk'",
    ),
  ],
)
def test_first_contacts(tx, theta, thing):
  with pytest.raises((TypeError, ValueError), match=thing):
    pp.init(tx, theta)


@pytest.mark.parametrize('sparsity', ['0.9', None])
@pytest.mark.parametrize('make', [pp.rigl, pp.snfs])
def test_a_sparsity_that_is_no_number(make, sparsity):
  options = {'stop': 900, 'period': 100}
  with pytest.raises(TypeError, match=r'a number in \[0, 1\), got'):
    make(optax.sgd(0.1), sparsity, **options)
