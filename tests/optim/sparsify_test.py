"""sparsify: what it pins, skips, refuses and survives, around any topology."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.core import masks, schedules
from powerprop_jax.optim.topologies import fixed
from powerprop_jax.optim.topology import Topology


def _theta(dtype=jnp.float32):
  return small.two_layers((8, 6), (6, 4), dtype)


def _grads(i, dtype=jnp.float32):
  return small.grads(i, _theta(dtype))


def _rigl(inner, **options):
  defaults = {'stop': 100, 'period': 3, 'replaces_step': False}
  return pp.rigl(inner, 0.5, **(defaults | options))


def _run(tx, steps, theta=None, make_grads=None):
  theta = _theta() if theta is None else theta
  return small.history(tx, theta, steps, make_grads)


def _changes(history):
  """The updates at which masks changed."""
  found = [pp.current_masks(*entry)['a']['w'] for entry in history]
  return [
    i
    for i in range(len(found) - 1)
    if not np.array_equal(found[i], found[i + 1])
  ]


class SparsifyTest(parameterized.TestCase):
  @parameterized.product(
    phi_dtype=(jnp.float32, jnp.bfloat16),
    grad_dtype=(jnp.float32, jnp.bfloat16),
  )
  @pytest.mark.slow
  def test_phi_is_pinned_with_half_precision_too(self, phi_dtype, grad_dtype):
    """A step in bfloat16 is too coarse to take a float32 weight to zero."""
    for inner in (optax.sgd(0.1), optax.adam(0.1, mu_dtype=jnp.float32)):
      tx = _rigl(pp.powerprop(inner, 1.0))
      history = _run(tx, 7, _theta(phi_dtype), lambda i: _grads(i, grad_dtype))
      self.assertEqual(_changes(history), [3, 6])
      for phi, opt_state in history:
        chex.assert_trees_all_equal_dtypes(phi, _theta(phi_dtype))
        seen = pp.apply_masks(phi, opt_state.masks)
        chex.assert_trees_all_equal(phi, seen)

  def test_masks_can_be_replaced(self):
    tx = pp.static(optax.sgd(0.1), 0.5)
    phi, opt_state = pp.init(tx, _theta())
    none = jax.tree.map(lambda m: jnp.zeros_like(m), opt_state.masks)
    changed = pp.with_masks(opt_state, none)
    self.assertFalse(pp.effective_params(phi, changed)['a']['w'].any())
    updates, _ = tx.update(_grads(0), changed, phi)
    zeros = optax.apply_updates(phi, updates)
    self.assertFalse(any(x.any() for x in jax.tree.leaves(zeros)))
    none['a']['w'] = none['a']['w'].T
    with self.assertRaisesRegex(ValueError, r"'a/w' is \(8, 6\)"):
      pp.with_masks(opt_state, none)
    dense = optax.sgd(0.1).init(phi)
    with self.assertRaisesRegex(ValueError, 'found no sparsify'):
      pp.with_masks(dense, pp.current_masks(phi, dense))

  def test_a_norm_sees_no_ghosts(self):
    """The first steps after pruning are as if the optimiser never knew."""
    inner = optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1e-3))
    tx = pp.one_shot_pruning(inner, 0.5, step=2)
    phi, state = pp.init(tx, _theta())
    for i in range(5):
      updates, state = tx.update(_grads(i), state, phi)
      if i > 2:
        norm = optax.tree.norm(pp.apply_masks(updates, state.masks))
        np.testing.assert_allclose(norm, 1e-3, rtol=1e-4)
      phi = optax.apply_updates(phi, updates)

  def test_random_keys_inside_are_left_alone(self):
    inner = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(0.1))
    self.assertEqual(_changes(_run(_rigl(inner), 5)), [3])

  @parameterized.parameters(2, 3)
  def test_accumulated_gradients_outside(self, every):
    """MultiSteps around sparsify: as one update with the mean gradient."""
    tx = optax.MultiSteps(_rigl(optax.adam(0.1)), every)
    outside = _run(tx, 5 * every)
    mean = lambda i: jax.tree.map(
      lambda *g: sum(g) / every, *(_grads(every * i + j) for j in range(every))
    )
    plain = _run(_rigl(optax.adam(0.1)), 5, make_grads=mean)
    for i, (phi, opt_state) in enumerate(plain):
      chex.assert_trees_all_close(outside[every * i][0], phi, atol=1e-5)
      chex.assert_trees_all_equal(
        pp.current_masks(*outside[every * i]), opt_state.masks
      )

  def test_accumulated_gradients_inside(self):
    inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    history = _run(_rigl(inner, replaces_step=True), 8)
    self.assertEqual(_changes(history), [3, 6])
    (_, old), (_, new) = history[3:5]
    self.assertEqual(int(old.inner_state.mini_step), 1)
    self.assertEqual(int(new.inner_state.mini_step), 1)

  def test_a_loss_reaches_the_innermost_optimiser(self):
    inner = optax.chain(
      optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    )
    tx = _rigl(pp.powerprop(inner, 2.0))
    phi, opt_state = pp.init(tx, _theta())
    for _ in range(6):
      _, opt_state = tx.update(
        _grads(0), opt_state, phi, value=jnp.float32(1), unknown=3
      )
    self.assertLess(float(optax.tree.get(opt_state, 'scale')), 1.0)

  def test_a_topology_may_watch_every_step_and_penalise(self):
    topology = Topology(
      init=lambda key, theta: (masks.full_masks(theta), jnp.int32(0)),
      observe=lambda memory, grads: memory + 1,
      penalise=lambda grads, theta, _, memory: jax.tree.map(
        lambda g, t: g + t * memory, grads, theta
      ),
    )
    tx = pp.sparsify(optax.sgd(1.0), topology)
    zeros = jax.tree.map(jnp.zeros_like, _theta())
    history = _run(tx, 2, make_grads=lambda i: zeros)
    self.assertEqual(int(history[-1][1].memory), 2)
    chex.assert_trees_all_close(history[1][0], zeros)

  def test_lanes_rewire_when_they_are_due_and_only_then(self):
    calls = []

    def rewire(rewiring):
      jax.debug.callback(lambda: calls.append(1))
      return jax.tree.map(jnp.logical_not, rewiring.masks), rewiring.memory

    topology = fixed.at_random(0.5)._replace(
      rewire=rewire, when=schedules.every(4, start=4)
    )
    tx = pp.sparsify(optax.sgd(0.1), topology)
    phi, opt_state = pp.init(tx, _theta())
    lanes = jax.tree.map(lambda x: jnp.stack([x] * 3), opt_state)
    lanes = lanes._replace(step=jnp.array([4, 5, 8], jnp.int32))
    update = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, None)))
    _, lanes = update(_grads(0), lanes, phi)
    jax.effects_barrier()
    self.assertNotEmpty(calls)
    before = opt_state.masks['a']['w']
    for lane, flips in enumerate((True, False, True)):
      np.testing.assert_array_equal(lanes.masks['a']['w'][lane], before ^ flips)
    del calls[:]
    for _ in range(2):  # now at 5, 6, 9 and then 6, 7, 10: nobody is due
      _, lanes = update(_grads(0), lanes, phi)
    jax.effects_barrier()
    self.assertEmpty(calls)

  @parameterized.product(bad=(float('nan'), float('inf')), leaf=('w', 'b'))
  def test_masks_stay_when_gradients_are_needed_and_bad(self, bad, leaf):
    def make_grads(i):
      grads = _grads(i)
      if i == 3:
        grads['a'][leaf] = grads['a'][leaf].at[..., 0].set(bad)
      return grads

    history = _run(
      optax.apply_if_finite(_rigl(optax.adam(0.1)), 3), 8, make_grads=make_grads
    )
    # The step does not count as one, so that update 4 takes its place.
    self.assertEqual(_changes(history), [4, 7])
    inside = _run(
      _rigl(optax.apply_if_finite(optax.adam(0.1), 3)), 8, make_grads=make_grads
    )
    self.assertEqual(_changes(inside), [6])
    chex.assert_tree_all_finite(inside[-1][0])

  def test_gradients_of_missing_connections_never_spread(self):
    tx = pp.static(
      optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), 0.5
    )
    phi, opt_state = pp.init(tx, _theta())
    for _ in range(3):
      grads = jax.tree.map(
        lambda g, m: jnp.where(m, g, jnp.nan), _grads(0), opt_state.masks
      )
      updates, opt_state = tx.update(grads, opt_state, phi)
      phi = optax.apply_updates(phi, updates)
    chex.assert_tree_all_finite((phi, opt_state.inner_state))

  def test_rewirings_at_two_steps_draw_anew_and_at_one_step_the_same(self):
    tx = pp.sparse_evolution(optax.sgd(0.1), 0.5, start=0, stop=1000, period=5)
    phi, opt_state = pp.init(tx, _theta())

    def grown_at(step):
      state = opt_state._replace(step=jnp.int32(step))
      _, new = tx.update(_grads(0), state, phi)
      return masks.difference(new.masks, state.masks)['a']['w']

    first, later = grown_at(0), grown_at(5)
    # Not a part of each other either, as they would be of one random order.
    self.assertTrue((first & ~later).any() and (later & ~first).any())
    np.testing.assert_array_equal(first, grown_at(0))
