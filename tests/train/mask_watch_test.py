"""Churn and densities are counts of connections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import nets
from powerprop_jax.optim import aliases, views
from powerprop_jax.train import ensemble
from powerprop_jax.train.runs import mask_watch
from powerprop_jax.train.runs.mask_watch import MaskWatch

RUNS = ensemble.product([1.0], [0, 7])


def make_state(make_tx):
  net = nets.make('mlp', 3)
  return ensemble.create_by_key(net, make_tx, RUNS, jnp.zeros((1, 4, 4, 1)))


def static(key):
  return aliases.static(optax.sgd(0.1), 0.9, key=key)


def flat(masks):
  return np.concatenate([mask.ravel() for mask in masks.values()])


def oracle(now, before):
  """Share of the connections now that were not there before."""
  return np.mean(~flat(before)[flat(now)])


def test_churn_and_densities_are_counted_for_each_network():
  watch = MaskWatch(make_state(static))
  first = mask_watch.stacked_masks(make_state(static))
  generator = np.random.default_rng(0)
  draw = lambda mask: generator.random(mask.shape) < 0.3
  looks = [first]
  for _ in range(2):
    masks = {leaf: draw(mask) for leaf, mask in first.items()}
    found = watch.records(RUNS, masks)
    assert len(found) == 2 * (1 + len(masks))
    for lane, key in enumerate(RUNS.key):
      of_lane = [record for record in found if record['key'] == key]
      pick = lambda masks, lane=lane: {k: m[lane] for k, m in masks.items()}
      now = pick(masks)
      assert of_lane[0]['churn'] == oracle(now, pick(looks[-1]))
      assert of_lane[0]['churn_from_start'] == oracle(now, pick(first))
      for record in of_lane[1:]:
        assert record['density'] == now[record['layer']].mean()
      assert mask_watch.density(now) == pytest.approx(flat(now).mean())
    looks.append(masks)


def test_nothing_changed_since_the_state_that_training_continues_from():
  state = make_state(static)
  watch = MaskWatch(make_state(lambda key: static(jax.random.fold_in(key, 9))))
  watch.begin(state)
  found = watch.records(RUNS, mask_watch.stacked_masks(state))
  churn = [record for record in found if 'churn' in record]
  assert [record['churn'] for record in churn] == [0, 0]
  assert all(record['churn_from_start'] > 0.5 for record in churn)


def test_networks_have_masks_of_their_own_key_and_the_density_asked_for():
  state = make_state(static)
  masks = mask_watch.stacked_masks(state)
  assert set(masks) == {'mlp/linear_0/w', 'mlp/logits/w'}
  assert any((mask[0] != mask[1]).any() for mask in masks.values())
  one = ensemble.take(masks, 0)
  assert mask_watch.density(one) == pytest.approx(0.1, abs=0.002)
  # What is not a connection is zero from the start.
  theta = jax.vmap(views.effective_params)(state.phi, state.opt_state)
  np.testing.assert_array_equal(
    theta['mlp/linear_0']['w'] != 0, masks['mlp/linear_0/w']
  )

  dense = make_state(lambda key: optax.sgd(0.1))
  assert mask_watch.stacked_masks(dense) == {} and mask_watch.density({}) == 1
  assert MaskWatch(dense).records(RUNS, {}) == []
