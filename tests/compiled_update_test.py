"""What an update writes to memory beside φ and the slots, on a CPU."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from powerprop_jax.optim import powerprop, sparsify
from powerprop_jax.optim.topologies import fixed

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
  tx = powerprop.powerprop(optimiser(), alpha)
  if is_masked:
    tx = sparsify.sparsify(tx, fixed.given(jax.tree.map(lambda p: p > 0, PHI)))
  plain = room(optimiser())
  assert BYTES <= plain < 1.1 * BYTES
  assert room(tx) < plain + 0.1 * BYTES


def test_the_slope_is_taken_where_a_wrapper_says():
  """One inside that shows powerprop other weights is believed."""
  inner = powerprop.powerprop(optax.sgd(0.1), 2.0)

  def update(updates, state, params=None, **extra_args):
    moved = jax.tree.map(lambda p: 2 * p, params)
    return inner.update(updates, state, moved, **extra_args)

  wrapped = optax.GradientTransformationExtraArgs(inner.init, update)
  masks = jax.tree.map(lambda p: p > 0, PHI)
  found = []
  for tx in (inner, wrapped):
    tx = sparsify.sparsify(tx, fixed.given(masks))
    updates, _ = tx.update(PHI, tx.init(PHI), PHI)
    inside = jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, masks)
    found.append(inside)
  chex.assert_trees_all_close(
    found[1], jax.tree.map(lambda u: 2 * u, found[0]), rtol=1e-6
  )
