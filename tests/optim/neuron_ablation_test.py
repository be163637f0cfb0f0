"""Neuron ablation against a slow oracle, and what it promises in training."""

import math

from absl.testing import parameterized
import fan_in_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.optim.topologies.neuron_ablation import Ablation

_HIDDEN = pp.exclude(pp.is_weight, 'logits')


def _oracle(mask, drop, grow, num_dropped, k, min_salient):
  """Counts salient weights neuron by neuron; 0 or the new fan-in of each."""
  columns = mask.shape[-1]
  size = mask.size // columns
  flat = mask.ravel()
  salient = np.zeros(mask.size, bool)
  salient[cases.best(drop.ravel(), flat, int(flat.sum()) - num_dropped)] = True
  if grow is not None:
    salient[cases.best(grow.ravel(), ~flat, num_dropped)] = True
  counts = salient.reshape(-1, columns).sum(0)
  enough = [j for j in range(columns) if counts[j] >= max(1, min_salient * k)]
  order = sorted(range(columns), key=lambda j: (-counts[j], j))
  least = order[: math.ceil(k * columns / size)]
  stays = sorted(set(enough) | set(least))
  return [
    k * columns // len(stays) if j in stays else 0 for j in range(columns)
  ]


class NeuronAblationTest(parameterized.TestCase):
  @parameterized.parameters(range(30))
  @pytest.mark.slow
  def test_equals_the_oracle_on_random_shapes_with_ties(self, seed):
    rng = np.random.default_rng(seed)
    mask, drop, grow, k = cases.layer(rng)
    # Some neurons are gone already.
    mask &= rng.random(mask.shape[-1]) < 0.8
    num_dropped = int(rng.integers(0, mask.sum() + 1))
    min_salient = float(rng.choice([0.1, 0.25, 0.5, 1.0]))
    merit = grow if seed % 3 else None
    got = Ablation(_HIDDEN, min_salient).fan_ins_left(
      mask, drop, merit, jnp.int32(num_dropped), k
    )
    expected = _oracle(mask, drop, merit, num_dropped, k, min_salient)
    np.testing.assert_array_equal(got, expected)
    size, columns = mask.size // mask.shape[-1], mask.shape[-1]
    self.assertLessEqual(int(got.max()), size)
    self.assertGreaterEqual(int(got.max()), k)
    lost = k * columns - int(got.sum())
    self.assertBetween(lost, 0, int((got > 0).sum()) - 1)

  def test_a_dense_layer_loses_no_neuron(self):
    mask = jnp.ones((5, 4), bool)
    drop = jnp.zeros((5, 4)).at[:, 0].set(1.0)
    got = Ablation(_HIDDEN, 1.0).fan_ins_left(
      mask, drop, None, jnp.int32(15), 5
    )
    np.testing.assert_array_equal(got, 5)

  @parameterized.parameters(
    (0.3, 10, 3), (0.3, 11, 4), (0.1, 30, 3), (0.3, 1, 1)
  )
  def test_the_least_is_rounded_up(self, share, k, least):
    self.assertEqual(Ablation(_HIDDEN, share).least_salient(k), least)

  @parameterized.product(make=(pp.rigl, pp.sparse_evolution), alpha=(1.0, 2.0))
  @pytest.mark.slow
  def test_neurons_have_all_inputs_or_none_and_logits_all_stay(
    self, make, alpha
  ):
    tx = make(
      pp.powerprop(optax.sgd(0.05), alpha),
      0.8,
      period=3,
      stop=90,
      drop_fraction=0.8,
      structure='constant_fan_in',
      ablation=Ablation(_HIDDEN, 0.5),
      **cases.UNIFORM,
    )
    alive = []
    for state in cases.states(tx, 70):
      alive.append({})
      for name, k in (('conv', 4), ('linear', 4), ('logits', 2)):
        counts = cases.inputs(state.masks, name)
        now = alive[-1][name] = counts > 0
        new_k = k * now.size // now.sum()
        np.testing.assert_array_equal(counts, np.where(now, new_k, 0))
        if len(alive) > 1 and make is pp.sparse_evolution:
          # Where growth is no merit, what is gone stays away.
          self.assertFalse((now & ~alive[-2][name]).any())
    self.assertTrue(all(now['logits'].all() for now in alive))
    self.assertFalse(all(now['linear'].all() for now in alive))

  def test_a_rewiring_equals_the_oracle(self):
    tx = pp.rigl(
      optax.sgd(0.0),
      0.8,
      period=1,
      start=0,
      stop=100,
      drop_fraction=0.6,
      structure='constant_fan_in',
      ablation=Ablation(_HIDDEN, 0.6),
      **cases.UNIFORM,
    )
    theta = cases.theta()
    state = tx.init(theta)
    update = jax.jit(tx.update)
    removed = returned = False
    for i in range(6):
      grads = small.grads(i, theta)
      _, new = update(grads, state, theta)
      fraction = 0.3 * (1 + math.cos(math.pi * i / 100))
      for name, k in (('conv', 4), ('linear', 4), ('logits', 2)):
        mask = np.asarray(state.masks[name]['w'])
        drop = np.abs(np.asarray(theta[name]['w']))
        grow = np.abs(np.asarray(grads[name]['w']))
        num_dropped = int(fraction * mask.sum() + 1e-5)
        fan_ins = [k] * mask.shape[-1]
        if name != 'logits':
          fan_ins = _oracle(mask, drop, grow, num_dropped, k, 0.6)
        expected = cases.drop_and_grow(mask, drop, grow, num_dropped, fan_ins)
        np.testing.assert_array_equal(new.masks[name]['w'], expected)
        was, now = (cases.inputs(s.masks, name) > 0 for s in (state, new))
        removed |= bool((was & ~now).any())
        returned |= bool((now & ~was).any())
      state = new
    self.assertTrue(removed)
    self.assertTrue(returned)

  @parameterized.parameters(0.0, -0.3, 1.5, float('nan'))
  def test_shares_out_of_range(self, share):
    with self.assertRaisesRegex(ValueError, r'min_salient must be in \(0, 1\]'):
      Ablation(_HIDDEN, share)
