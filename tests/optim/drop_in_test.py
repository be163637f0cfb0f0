"""drop_in: a loop that holds θ⊙M trains what one that holds φ trains."""

import functools

import chex
import inners
import jax
import jax.numpy as jnp
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.optim import drop_in as drop_in_lib
from powerprop_jax.optim import topology

METHODS = {
  'dense': lambda tx: tx,
  'static': lambda tx: pp.static(tx, 0.5),
  'rigl': lambda tx: pp.rigl(tx, 0.5, period=2, stop=9),
  'snfs': lambda tx: pp.snfs(tx, 0.5, period=2, stop=9),
  'top_kast': lambda tx: pp.top_kast(tx, 0.5, 0.2),
  'gradual': lambda tx: pp.gradual_pruning(tx, 0.5, start=1, stop=7, period=2),
}


def _loop(tx, theta, num_steps, *, is_masked=True):
  """What somebody else's loop does, mostly from the masked start."""
  state = tx.init(theta)
  theta = pp.sparse_start(tx, theta) if is_masked else theta

  @jax.jit
  def step(params, state):
    grads = jax.grad(small.loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  entries = [(theta, state)]
  for _ in range(num_steps):
    entries.append(step(*entries[-1]))
  return entries


@functools.cache
def _rigl():
  """Steps of RigL with powerprop under drop_in, from the masked start."""
  tx = pp.drop_in(METHODS['rigl'](pp.powerprop(optax.adam(0.01), 2.0)))
  return tx, _loop(tx, small.weights(), 10)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'inner', ['adam', pytest.param('masked_chain', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_trains_as_a_loop_that_holds_phi(method, inner, alpha):
  tx = METHODS[method](pp.powerprop(inners.INNERS[inner](), alpha))
  phi, state = small.run(tx, 10)[-1]
  own = pp.drop_in(tx)
  params, held = _loop(own, small.weights(), 10)[-1]
  masks = pp.current_masks(phi, state)
  chex.assert_trees_all_equal(masks, pp.current_masks(params, held))
  theta = pp.effective_params(phi, state)
  chex.assert_trees_all_close(theta, params, rtol=1e-4, atol=1e-6)
  drop_in_lib.check_returned(held)


def test_parameters_are_what_the_network_computes_with():
  tx, steps = _rigl()
  for params, state in steps:
    masks = pp.current_masks(params, state)
    for p, m in zip(
      jax.tree.leaves(params), jax.tree.leaves(masks), strict=True
    ):
      assert not jnp.any(jnp.where(m, 0.0, p))
    shown = pp.effective_params(params, state)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, shown, params)))
  assert pp.init(tx, small.weights())[0].keys() == params.keys()


def test_first_pass_may_see_dense_weights():
  tx, _ = _rigl()
  (_, _), (params, state) = _loop(tx, small.weights(), 1, is_masked=False)
  masks = pp.current_masks(params, state)
  assert not jnp.any(jnp.where(masks['m']['w'], 0.0, params['m']['w']))
  drop_in_lib.check_returned(state)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_rounding_is_not_taken_for_a_change(dtype):
  theta = jax.tree.map(lambda x: x.astype(dtype), small.weights())
  tx = pp.drop_in(METHODS['rigl'](pp.powerprop(optax.sgd(0.01), 2.0)))
  params, state = _loop(tx, theta, 20)[-1]
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
  drop_in_lib.check_returned(state)


def test_parameters_of_others_are_adopted_and_counted():
  tx, steps = _rigl()
  params, state = steps[-1]
  loaded = jax.tree.map(lambda p: p + 0.5, params)  # dense again
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, after = tx.update(grads, state, loaded)
  new = optax.apply_updates(loaded, updates)
  masks = pp.current_masks(new, after)
  zeros = jnp.where(masks['m']['w'], 0.0, new['m']['w'])
  assert not zeros.any()
  assert jnp.abs(new['m']['w'] - masks['m']['w'] * loaded['m']['w']).max() < 0.1
  assert jnp.allclose(new['m']['b'], loaded['m']['b'], atol=0.1)
  with pytest.raises(ValueError, match='1 updates found other parameters'):
    drop_in_lib.check_returned(after)


def test_scaled_updates_are_noticed_and_zeros_come_back():
  tx, steps = _rigl()
  params, state = steps[0]
  half = optax.chain(tx, optax.scale(0.5))
  state = (state, optax.ScaleState())
  for _ in range(5):
    grads = jax.grad(small.loss)(params)
    updates, state = half.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  with pytest.raises(ValueError, match='changes updates goes inside'):
    drop_in_lib.check_returned(state)


def test_alpha_changes_in_the_middle():
  tx, steps = _rigl()
  params, state = steps[-1]
  same, state = pp.with_alpha(params, state, 3.0)
  assert jnp.allclose(same['m']['w'], params['m']['w'], rtol=1e-5)
  grads = jax.tree.map(jnp.zeros_like, params)
  _, after = tx.update(grads, state, params)
  drop_in_lib.check_returned(after)


@pytest.mark.parametrize(
  'wrong',
  [
    lambda tx: pp.static(pp.drop_in(tx), 0.5),
    lambda tx: pp.powerprop(pp.drop_in(tx), 2.0),
    lambda tx: pp.drop_in(pp.drop_in(tx)),
  ],
)
def test_it_goes_outermost(wrong):
  with pytest.raises(ValueError, match='drop_in goes around'):
    wrong(optax.sgd(0.1)).init(small.weights())


def test_a_state_without_it_has_nothing_to_check():
  with pytest.raises(ValueError, match='found no drop_in'):
    drop_in_lib.check_returned(optax.sgd(0.1).init(small.weights()))


def test_state_finds_phi_and_counts():
  _, steps = _rigl()
  state = topology.find_drop_in_state(steps[-1][1])
  assert bool(state.started) and int(state.adopted) == 0
  theta = pp.effective_params(state.phi, state.inner_state)
  assert jnp.allclose(theta['m']['w'], steps[-1][0]['m']['w'], atol=1e-6)
