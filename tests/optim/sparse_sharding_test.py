"""Sparse training on eight devices: the masks of one, sharded as φ is."""

import functools
import math
import re

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
import small

from powerprop_jax.optim import aliases, powerprop, views
from powerprop_jax.train.scale import sharding

_SPECS = {
  'a': {'w': PartitionSpec('x', 'y'), 'b': PartitionSpec('y')},
  'n': {'w': PartitionSpec(None, 'x')},
}
_power = lambda: powerprop.powerprop(optax.adam(0.05), 2.0)
_MOVES = {'stop': 100, 'period': 2}
METHODS = {
  'static': lambda: aliases.static(_power(), 0.5),
  'gradual_global': lambda: aliases.gradual_pruning(
    _power(), 0.5, start=0, stop=4, period=2, scope='global'
  ),
  'set': lambda: aliases.sparse_evolution(
    optax.adam(0.05), 0.5, key=3, **_MOVES
  ),
  'set_redraw': lambda: aliases.sparse_evolution(
    _power(), 0.5, regrow='redraw', **_MOVES
  ),
  'rigl': lambda: aliases.rigl(optax.adam(0.05), 0.5, **_MOVES),
  'rigl_keep': lambda: aliases.rigl(_power(), 0.5, regrow='keep', **_MOVES),
  'rigl_smallest': lambda: aliases.rigl(
    _power(), 0.5, regrow='smallest', **_MOVES
  ),
  'snfs': lambda: aliases.snfs(optax.adam(0.05), 0.5, **_MOVES),
  'dsr': lambda: aliases.dsr(
    optax.adam(0.05), 0.5, num_dropped=8, threshold=0.1, **_MOVES
  ),
  'top_kast': lambda: aliases.top_kast(_power(), 0.5, 0.25),
}


def _theta():
  rng = np.random.default_rng(0)
  # Coarse values, so that sums do not depend on their order and ties occur.
  coarse = lambda *shape: jnp.asarray(
    (rng.integers(1, 32, shape) * rng.choice([-1, 1], shape)) / 16, jnp.float32
  )
  return {'a': {'w': coarse(16, 8), 'b': coarse(8)}, 'n': {'w': coarse(8, 12)}}


def _run(tx, theta):
  """φ and the state after four updates whose gradients are exact."""

  @jax.jit
  def step(phi, opt_state, i):
    wave = lambda p: jnp.round(8 * jnp.sin(3 * p + i)) / 8
    grads = jax.tree.map(wave, views.effective_params(phi, opt_state))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  phi, opt_state = jax.block_until_ready(views.init(tx, theta))
  start = opt_state.masks
  for i in range(4):
    # One program at a time: on few cores, many under way may wait for each
    # other's devices until XLA gives up and aborts.
    phi, opt_state = jax.block_until_ready(step(phi, opt_state, jnp.float32(i)))
  return phi, opt_state, start


@functools.cache
def _run_alone(method):
  return _run(METHODS[method](), _theta())


class ShardedTest:
  @pytest.mark.parametrize(
    ('method', 'explicit'),
    [
      *((method, False) for method in METHODS),
      *(
        pytest.param(
          method, True, marks=() if method == 'snfs' else pytest.mark.slow
        )
        for method in METHODS
      ),
    ],
  )
  def test_masks_are_those_of_one_device(self, method, explicit):
    alone, state_alone, start_alone = _run_alone(method)
    mesh, sharded = small.on_devices(_theta(), _SPECS, explicit)
    with jax.set_mesh(mesh):
      phi, state, start = _run(METHODS[method](), sharded)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_equal(host(start), host(start_alone))
    chex.assert_trees_all_equal(host(state.masks), host(state_alone.masks))
    chex.assert_trees_all_close(host(phi), host(alone), atol=1e-5)
    if method != 'static':
      assert not np.array_equal(start['a']['w'], state.masks['a']['w'])
    for name, leaves in _SPECS.items():
      for leaf, spec in leaves.items():
        assert phi[name][leaf].sharding.spec == spec
        if explicit:
          assert state.masks[name][leaf].sharding.spec == spec


def _largest_array(program):
  """Entries of the largest array that a device holds while a program runs."""
  shapes = re.findall(r'\b(?:pred|[a-z]+\d+)\[([\d,]*)\]', program.as_text())
  return max(math.prod(map(int, s.split(','))) for s in shapes if s)


class ProgramTest(parameterized.TestCase):
  # Neither a leaf nor its masks, scores or random numbers are gathered, or
  # computed as a whole: not at the start, not when rewiring.

  def assert_parts_only(self, method, explicit=False, starts=False):
    mesh = sharding.make_mesh(4, 2, explicit=explicit)
    tx = METHODS[method]()
    draw = lambda shape: jax.random.normal(jax.random.key(0), shape)
    create = lambda: views.init(
      tx, {'a': {'w': draw((3, 3, 16, 32))}, 'b': {'w': draw((64, 24))}}
    )

    def update(state, grads):
      phi, opt_state = state
      updates, opt_state = tx.update(grads, opt_state, phi)
      return optax.apply_updates(phi, updates), opt_state

    shapes = jax.eval_shape(create)
    placed = sharding.state_shardings(shapes, mesh, min_size=64)
    state = sharding.template(shapes, placed)
    compiled = lambda fn, *args: (
      jax.jit(fn, out_shardings=placed).lower(*args).compile()
    )
    with jax.set_mesh(mesh):
      program = (
        compiled(create) if starts else compiled(update, state, state[0])
      )
    self.assertEqual(_largest_array(program), 3 * 3 * 16 * 32 // 8)

  @parameterized.parameters(*METHODS)
  @pytest.mark.slow
  def test_a_device_updates_its_part_alone(self, method):
    self.assert_parts_only(method)

  @parameterized.parameters('set_redraw', 'snfs', 'gradual_global')
  @pytest.mark.slow
  def test_on_explicit_axes_too(self, method):
    self.assert_parts_only(method, explicit=True)

  @parameterized.parameters('rigl_keep', 'top_kast')
  def test_a_device_starts_with_its_part_alone(self, method):
    self.assert_parts_only(method, starts=True)
