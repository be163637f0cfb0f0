"""What an update writes to memory beside φ and the slots, on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import powerprop_jax as pp
from powerprop_jax.optim.topologies import fixed
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.scale import fusing
from powerprop_jax.train.step import TrainState

PHI = {'linear': {'w': jnp.linspace(-1.0, 1.0, 512 * 512).reshape(512, 512)}}
BYTES = 4 * 512 * 512


def room(tx):
  """Bytes of the arrays that the compiled update makes for itself."""

  def update(phi, state, grads):
    updates, state = tx.update(grads, state, phi)
    return optax.apply_updates(phi, updates), state

  step = jax.jit(update, donate_argnums=(0, 1))
  program = step.lower(PHI, tx.init(PHI), PHI).compile()
  return program.memory_analysis().temp_size_in_bytes


def optimiser():
  """Looks at θ, and has two uses for the gradient with the decay added."""
  return optax.chain(
    optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9, nesterov=True)
  )


@pytest.mark.parametrize('alpha', [1.25, 1.5, 1.75, 2.0, 2.75, 3.0])
@pytest.mark.parametrize('is_masked', [False, True])
def test_neither_roots_nor_masked_weights_are_written_down(alpha, is_masked):
  tx = pp.powerprop(optimiser(), alpha)
  if is_masked:
    tx = pp.sparsify(tx, fixed.given(jax.tree.map(lambda p: p > 0, PHI)))
  plain = room(optimiser())
  assert BYTES <= plain < 1.1 * BYTES
  assert room(tx) < plain + 0.1 * BYTES


def rooms():
  """Bytes of the second half of steps whose update is written twice."""
  power = pp.powerprop(optimiser(), 1.5)
  masks = jax.tree.map(lambda p: p > 0, PHI)
  found = {'fuses': fusing.fuses_loops()}
  for name, tx in {
    'dense': optimiser(),
    'powerprop': power,
    'sparse': pp.sparsify(power, fixed.given(masks)),
  }.items():
    phi, opt_state = pp.init(tx, PHI)
    state = TrainState(jnp.int32(0), phi, {}, opt_state, jax.random.key(0))
    net = None  # of no use to the second half
    update = step_lib.make_step(net, fusing.fused(tx)).update
    program = jax.jit(update, donate_argnums=0).lower(state, PHI, {}).compile()
    found[name] = program.memory_analysis().temp_size_in_bytes
  return found


def test_nothing_is_written_down_where_loops_are_fused():
  environment = dict(os.environ, XLA_FLAGS='', JAX_PLATFORMS='cpu')
  fusing.set_cpu_flags(environment, static_alpha=True)
  if not environment['XLA_FLAGS']:
    pytest.skip('the compiler settings have not been tried with this jaxlib')
  program = 'import compiled_update_test as c; print(c.json.dumps(c.rooms()))'
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=pathlib.Path(__file__).parent,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(done.stdout)
  assert found.pop('fuses')
  assert max(found.values()) < 0.1 * BYTES


def test_fused_loops_are_a_matter_of_the_environment(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  assert not fusing.fuses_loops()
  flags = {}
  fusing.set_cpu_flags(flags, static_alpha=False)
  monkeypatch.setenv('XLA_FLAGS', flags.get('XLA_FLAGS', ''))
  assert not fusing.fuses_loops()
