"""Sparse training on eight devices: the masks of one, sharded as φ is."""

import functools
import math
import re

import chex
import contracts_test
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.train.scale import sharding

_SPECS = {
  'a': {'w': PartitionSpec('x', 'y'), 'b': PartitionSpec('y')},
  'n': {'w': PartitionSpec(None, 'x')},
}
METHODS = (
  *('static', 'gradual_global', 'set', 'set_redraw', 'rigl', 'rigl_keep'),
  *('rigl_traced', 'rigl_adaptive', 'rigl_fan_in', 'snfs', 'dsr', 'top_kast'),
)


def _make(method):
  return contracts_test.SPARSE[method](optax.adam(0.05))


def _theta():
  rng = np.random.default_rng(0)
  # Coarse values, so that sums do not depend on their order and ties occur.
  coarse = lambda *shape: jnp.asarray(
    (rng.integers(1, 32, shape) * rng.choice([-1, 1], shape)) / 16, jnp.float32
  )
  return {'a': {'w': coarse(16, 8), 'b': coarse(8)}, 'n': {'w': coarse(8, 12)}}


def _run(tx, theta):
  """φ and masks after six updates with exact gradients, and first masks."""

  @jax.jit
  def step(phi, opt_state, i):
    wave = lambda p: jnp.round(8 * jnp.sin(3 * p + i)) / 8
    grads = jax.tree.map(wave, pp.effective_params(phi, opt_state))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  # One program at a time: on few cores, many under way may wait for each
  # other's devices until XLA gives up and aborts.
  init = jax.jit(lambda theta: pp.init(tx, theta))
  phi, opt_state = jax.block_until_ready(init(theta))
  start = pp.current_masks(phi, opt_state)
  for i in range(6):
    phi, opt_state = jax.block_until_ready(step(phi, opt_state, jnp.float32(i)))
  return phi, pp.current_masks(phi, opt_state), start


@functools.cache
def _run_alone(method):
  return _run(_make(method), _theta())


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'explicit', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_masks_are_those_of_one_device(method, explicit):
  mesh, sharded = small.on_devices(_theta(), _SPECS, explicit)
  with jax.set_mesh(mesh):
    phi, masks, start = _run(_make(method), sharded)
  if method != 'static':
    assert not np.array_equal(start['a']['w'], masks['a']['w'])
  for tree in (phi, masks) if explicit else (phi,):
    assert jax.tree.map(lambda x: x.sharding.spec, tree) == _SPECS
  phi, masks, start = jax.device_get((phi, masks, start))
  alone, masks_alone, start_alone = jax.device_get(_run_alone(method))
  chex.assert_trees_all_equal((start, masks), (start_alone, masks_alone))
  chex.assert_trees_all_close(phi, alone, atol=1e-5)


def _largest_array(program):
  """Entries of the largest array that a device holds while a program runs."""
  shapes = re.findall(r'\b(?:pred|[a-z]+\d+)\[([\d,]*)\]', program.as_text())
  return max(math.prod(map(int, s.split(','))) for s in shapes if s)


@pytest.mark.parametrize(
  ('method', 'explicit', 'starts'),
  [
    *(pytest.param(m, False, False, marks=pytest.mark.slow) for m in METHODS),
    *(
      pytest.param(m, True, False, marks=pytest.mark.slow)
      for m in ('set_redraw', 'snfs', 'gradual_global')
    ),
    ('rigl_keep', False, True),
    ('top_kast', False, True),
  ],
)
def test_a_device_starts_or_updates_its_part_alone(method, explicit, starts):
  """Neither leaves nor their masks, scores or random numbers are gathered."""
  mesh = sharding.make_mesh(4, 2, explicit=explicit)
  tx = _make(method)
  draw = lambda shape: jax.random.normal(jax.random.key(0), shape)
  create = lambda: pp.init(
    tx, {'a': {'w': draw((3, 3, 16, 32))}, 'b': {'w': draw((64, 24))}}
  )

  def update(state, grads):
    phi, opt_state = state
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  shapes = jax.eval_shape(create)
  placed = sharding.state_shardings(shapes, mesh, min_size=64)
  state = sharding.template(shapes, placed)
  with jax.set_mesh(mesh):
    program = jax.jit(create if starts else update, out_shardings=placed)
    compiled = program.lower(*(() if starts else (state, state[0]))).compile()
  assert _largest_array(compiled) == 3 * 3 * 16 * 32 // 8
