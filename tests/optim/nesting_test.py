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
  with pytest.raises(ValueError, match='last in a chain'):
    jax.jit(lambda phi: pp.effective_params(phi, tx.init(phi)))(make_theta())


def power(inner=None, alpha=2.0):
  inner = optax.sgd(0.1) if inner is None else inner
  return pp.powerprop(inner, alpha)


def adaptive(inner):
  return pp.adaptive_alpha(inner, pp.near_zero_controller(), period=1)


MASK = {'a': {'w': True, 'b': False}, 'n': {'w': True}}
LABELS = jax.tree.map(str, MASK)
SGD, TRACED = optax.sgd(0.1), jnp.float32(2)
REFUSED = {
  'last in a chain': [
    optax.chain(optax.chain(rigl(SGD)), optax.scale(0.1)),
    optax.named_chain(('z', rigl(SGD)), ('a', optax.scale(0.1))),
  ],
  'must not be around sparsify': [
    optax.contrib.sam(rigl(SGD), SGD),
    optax.conditionally_transform(rigl(SGD), lambda step: step < 3),
    optax.contrib.schedule_free(rigl(SGD), 0.1),
    optax.contrib.mechanize(rigl(SGD)),
  ],
  'holds a topology already': [rigl(optax.chain(pp.static(SGD, 0.5)))],
  'more than one sparsify': [optax.chain(rigl(SGD), pp.static(SGD, 0.5))],
  'sparsify goes around powerprop': [
    power(rigl(SGD)),
    power(optax.chain(rigl(SGD))),
  ],
  'sparsify must not be inside optax.masked': [
    optax.masked(rigl(SGD), MASK),
    optax.partition({'True': rigl(SGD), 'False': SGD}, LABELS),
    # The outermost of two mistakes.
    optax.masked(pp.static(power(), 0.5), MASK),
  ],
  'powerprop must be outermost': [
    optax.masked(power(), MASK),
    optax.partition({'True': power(), 'False': SGD}, LABELS),
    optax.chain(power(), power()),
    power(power()),
  ],
  'sparsify goes inside adaptive': [rigl(adaptive(power(SGD, TRACED)))],
  'decay_phi goes inside adaptive': [
    optax.chain(adaptive(power(SGD, TRACED)), pp.decay_phi(1e-3, 0.1))
  ],
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_would_not_train_as_it_reads_is_refused(message):
  for tx in REFUSED[message]:
    with pytest.raises(ValueError, match=message):
      pp.init(tx, make_theta())


def test_lookahead_is_refused_and_links_before_are_not():
  theta = make_theta()
  params = optax.LookaheadParams.init_synced(theta)
  with pytest.raises(ValueError, match='must not be around sparsify'):
    state = optax.lookahead(rigl(SGD), 5, 0.5).init(params)
    pp.effective_params(theta, state)
  pp.init(optax.named_chain(('z', optax.clip(1.0)), ('a', rigl(SGD))), theta)


same = lambda state: state
# Transformations of a user's own: how the state of what is inside is kept.
KEPT = {
  'in_a_dict': (
    lambda state: {'mine': state, 'more': jnp.zeros([])},
    lambda state: state['mine'],
  ),
  'like_a_chain': (
    lambda state: (jnp.zeros([]), state),
    lambda state: state[1],
  ),
  'without_a_trace': (same, same),
}


def scaled(inner, kept, factor=0.3):
  wrap, unwrap = KEPT[kept]

  def update(updates, state, params=None):
    updates, state = inner.update(updates, unwrap(state), params)
    return jax.tree.map(lambda u: factor * u, updates), wrap(state)

  init = lambda params: wrap(inner.init(params))
  return optax.GradientTransformation(init, update)


@pytest.mark.parametrize('alpha', [None, 2.0])
@pytest.mark.parametrize('kept', ['in_a_dict', 'like_a_chain'])
def test_a_step_computes_with_the_masks_whatever_is_around(alpha, kept):
  tx = scaled(rigl(optax.sgd(0.5), alpha), kept)
  phi, state = small.history(tx, make_theta(), 6)[-1]
  seen = pp.effective_params(phi, state, pinned=True)
  masks = pp.current_masks(phi, state)
  chex.assert_trees_all_equal(seen, pp.apply_masks(seen, masks))
  if alpha is None:  # latent weights are not where sparsify put them
    assert (phi['a']['w'] != seen['a']['w']).any()


@pytest.mark.parametrize('kept', KEPT)
@pytest.mark.slow
def test_a_compiled_step_of_ours_does(kept):
  net = nets.make('lenet_300_100', num_classes=3)
  images, labels = jnp.ones((4, 2, 2, 1)), jnp.array([0, 1, 2, 0])
  tx = scaled(pp.sparse_evolution(optax.sgd(0.5), 0.8, stop=90, period=1), kept)
  state = step_lib.create(net, tx, jax.random.key(0), images)
  step = step_lib.make_step(net, tx)
  run = jax.jit(functools.partial(step.gradient, labels=labels))
  update = jax.jit(step.update)
  for _ in range(5):
    grads, net_state, metrics = run(state, images)
    masked = state._replace(phi=pp.effective_params(state.phi, state.opt_state))
    chex.assert_trees_all_equal(metrics, run(masked, images)[2])
    state = update(state, grads, net_state)


@pytest.mark.parametrize(
  ('tx', 'theta', 'thing'),
  [
    (make_theta(), SGD, 'arguments are swapped'),
    (make_theta(), make_theta(), r'init\(tx, theta\).*dict for tx'),
    (
      power(),
      {'a': {'w': jnp.ones((2, 2)), 'act': jnp.tanh}},
      "'a/act'.*eqx.filter",
    ),
    (power(), jnp.ones((2, 2)), 'single array, f'),
    (power(), {'l': {'w': jnp.ones(3)}}, r'l/w float32\[3\].*two axes or more'),
    (
      power(),
      {'l': {'w': jnp.ones((2, 2), int)}},
      r'l/w int32\[2,2\].*floating point',
    ),
    (
      pp.powerprop(SGD, 2.0, select='w'),
      make_theta(),
      re.escape("got 'w'. Write select=by_regex('w')"),
    ),
    (
      pp.powerprop(SGD, 2.0, select=lambda *leaf: True),
      {'l': {'w': jnp.ones((2, 2), complex)}},
      "'l/w', which is complex64",
    ),
    (pp.static(SGD, 0.5, distribution='erk'), make_theta(), "pp.erk.*'erk'"),
  ],
)
def test_first_contacts(tx, theta, thing):
  with pytest.raises((TypeError, ValueError), match=thing):
    pp.init(tx, theta)


@pytest.mark.parametrize(
  'tx', [power(), rigl(SGD), adaptive(power(SGD, TRACED))]
)
def test_an_update_without_parameters(tx):
  theta = make_theta()
  with pytest.raises(
    ValueError, match=r'\(grads, state, phi\).*effective_params'
  ):
    tx.update(theta, tx.init(theta))


@pytest.mark.parametrize('sparsity', ['0.9', None])
@pytest.mark.parametrize('make', [pp.rigl, pp.snfs])
def test_a_sparsity_that_is_no_number(make, sparsity):
  with pytest.raises(TypeError, match=r'a number in \[0, 1\), got'):
    make(SGD, sparsity, stop=900, period=100)
