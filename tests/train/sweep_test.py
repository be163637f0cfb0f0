"""Many runs in one program give what each of them gives alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble, loop, optimizers, sweep
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Lanes
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import load, metrics
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

SPLITS = splits.load(DataConfig())
CONFIG = LoopConfig(num_steps=200, batch_size=32, eval_every=100)
RUNS = ensemble.product([1.0, 1.3, 3.0], [0, 5])


def make_tx(alpha):
  config = OptimizerConfig(learning_rate=0.02, momentum=0.9)
  return optimizers.make_tx(config, alpha, CONFIG.num_steps)


def open_folder(path):
  return RunFolder(path, {}, program='test')


def train(path, runs=RUNS, **settings):
  net = nets.make('mlp', 10)
  return sweep.train(
    net, make_tx, runs, SPLITS, CONFIG, open_folder(path), **settings
  )


def lane(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


@pytest.fixture(scope='module')
def trained_lanes(tmp_path_factory):
  """All of RUNS side by side, and the folder they were trained in."""
  path = tmp_path_factory.mktemp('side_by_side')
  return train(path), path


class TrainTest:
  @pytest.mark.parametrize('at_once', [1, 4])
  def test_one_after_the_other_gives_the_numbers_of_side_by_side(
    self, trained_lanes, tmp_path, at_once
  ):
    # Products of another shape round in another order, and 200 steps of
    # training carry that on.
    state = train(tmp_path, at_once=at_once)
    chex.assert_trees_all_close(
      state.phi, trained_lanes[0].phi, atol=2e-4, rtol=2e-4
    )
    assert state.step.tolist() == [CONFIG.num_steps] * len(RUNS.key)

  @pytest.mark.parametrize('index', [0, 3])
  def test_a_lane_is_what_a_run_of_its_own_gives(
    self, trained_lanes, tmp_path, index
  ):
    net = nets.make('mlp', 10)
    alpha, key = RUNS.alpha[index], int(RUNS.key[index])
    tx = make_tx(jnp.asarray(alpha))
    advance = jax.jit(step_lib.make_advance(net, tx), donate_argnums=0)
    state = loop.fit(
      load.initial_state(net, tx, key, SPLITS),
      advance=lambda state, rows: advance(state, SPLITS.train, rows),
      evaluate=lambda state: {},
      indices=lambda start, count: splits.batch_indices(
        key, start, count, CONFIG.batch_size, len(SPLITS.train.labels)
      ),
      records=lambda *_: [{'loss': 0.0, 'validation_accuracy': 0.0}],
      config=CONFIG,
      folder=open_folder(tmp_path),
    )
    expected = lane(trained_lanes[0], index)
    assert jax.tree.structure(state.phi) == jax.tree.structure(expected.phi)
    chex.assert_trees_all_close(state.phi, expected.phi, atol=2e-4, rtol=2e-4)

  def test_every_lane_is_logged_at_every_look(self, trained_lanes):
    found = metrics.read_metrics(trained_lanes[1] / 'metrics.jsonl')
    assert [record['step'] for record in found] == [100] * 6 + [200] * 6
    assert [record['key'] for record in found[:6]] == [0, 5] * 3
    for record in found:
      assert 0 < record['loss'] < 2.5
      assert 0.5 < record['validation_accuracy'] <= 1

  def test_network_that_diverged_is_named(self, trained_lanes):
    state = trained_lanes[0]
    assert not sweep.diverged(state).any()
    phi = jax.tree.map(lambda x: x.at[2, 0].set(jnp.nan), state.phi)
    state = state._replace(phi=phi)
    assert sweep.diverged(state).tolist() == [i == 2 for i in range(6)]


class LanesTest:
  def test_lanes_of_a_key_start_from_the_same_function(self):
    net = nets.make('mlp', 10)
    state = sweep.initial_states(net, make_tx, RUNS, SPLITS)
    logits = jax.vmap(
      lambda s: net.apply(
        s.theta, s.net_state, None, SPLITS.test.images[:20], False
      )[0]
    )(state)
    for same in ([0, 2, 4], [1, 3, 5]):
      for index in same[1:]:
        np.testing.assert_allclose(
          logits[index], logits[same[0]], rtol=1e-3, atol=1e-5
        )
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    # It is only θ that agrees.
    phi = jax.tree.leaves(state.phi)
    assert any(np.abs(leaf[0] - leaf[4]).max() > 0.1 for leaf in phi)

  def test_lanes_of_a_key_see_the_same_batches(self):
    rows = ensemble.batch_indices(RUNS, 30, 7, 16, 100)
    assert rows.shape == (6, 7, 16)
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], rows[5])
    assert (rows[0] != rows[1]).any()
    np.testing.assert_array_equal(
      rows[3], splits.batch_indices(5, 30, 7, 16, 100)
    )

  @pytest.mark.parametrize('key', [-1, 2**32, 10**30])
  def test_key_out_of_range_is_refused(self, key):
    with pytest.raises(UserError, match='at least 0 and below'):
      ensemble.product([1.0], [0, key])

  @pytest.mark.parametrize('alpha', [0.5, float('nan'), float('inf')])
  def test_power_out_of_range_is_refused_although_it_would_be_traced(
    self, alpha
  ):
    net = nets.make('mlp', 10)
    runs = ensemble.product([1.0, alpha, 2.0], [0])
    with pytest.raises(ValueError, match='at least 1'):
      sweep.initial_states(net, make_tx, runs, SPLITS)

  @pytest.mark.parametrize('at_once', [0, -1])
  def test_no_lane_at_a_time_is_refused(self, at_once):
    with pytest.raises(UserError, match='lanes_at_once'):
      ensemble.map_lanes(jnp.sin, at_once)


class PruneTest:
  @pytest.mark.parametrize('scope', ['layer', 'global'])
  def test_records_hold_exact_densities_and_accuracies(
    self, trained_lanes, scope
  ):
    net, state = nets.make('mlp', 10), trained_lanes[0]
    overrides = None
    if scope == 'layer':
      overrides = lambda s: {'logits/w$': max(0.0, 1 - 2 * (1 - s))}
    sparsities = [0.0, 0.9, 0.985]
    found = sweep.prune(
      net,
      state,
      RUNS,
      SPLITS.test,
      sparsities,
      scope=scope,
      overrides=overrides,
    )
    assert [record['sparsity'] for record in found] == sparsities * 6
    assert [record['key'] for record in found[::3]] == RUNS.key.tolist()
    assert {record['scope'] for record in found} == {scope}
    # By hand, without the sweep: prune one lane, count, and evaluate.
    for record in (found[1], found[11], found[17]):
      index = found.index(record) // 3
      alone = lane(state, index)
      kept = one_shot.prune(
        alone.theta,
        record['sparsity'],
        scope=scope,
        overrides=overrides(record['sparsity']) if overrides else None,
      )
      weights = [m for m in jax.tree.leaves(kept) if m.ndim == 2]
      left = sum(int(m.sum()) for m in weights)
      assert record['density'] == left / sum(m.size for m in weights)
      logits, _ = net.apply(
        masks.apply_masks(alone.theta, kept),
        alone.net_state,
        None,
        SPLITS.test.images,
        False,
      )
      correct = np.argmax(np.asarray(logits), -1) == SPLITS.test.labels
      assert record['accuracy'] == pytest.approx(correct.mean(), abs=1.1 / 360)

  def test_single_network_with_a_compiled_in_power_is_pruned_too(self):
    net = nets.make('mlp', 10)
    state = load.initial_state(net, make_tx(2.0), 3, SPLITS)
    stacked = jax.tree.map(lambda x: x[None], state)
    runs = Lanes(np.array([2.0]), np.array([3]))
    (record,) = sweep.prune(net, stacked, runs, SPLITS.test, [0.5])
    assert (record['alpha'], record['key'], record['density']) == (2.0, 3, 0.5)


def test_powerprop_survives_one_shot_pruning_better_than_ordinary_training(
  tmp_path,
):
  # Keys 0 to 4 gave differences of 0.59, 0.43, 0.66, 0.76 and 0.63; of the
  # first two together, 0.51. Unpruned, the means were 0.982 and 0.974.
  config = LoopConfig(num_steps=3_000, batch_size=60, eval_every=3_000)
  optimizer = OptimizerConfig(
    learning_rate=0.1, schedule='cosine', decay_phi=2e-3
  )
  net = nets.make('lenet_300_100', SPLITS.num_classes)
  make = lambda alpha: optimizers.make_tx(optimizer, alpha, config.num_steps)
  runs = ensemble.product([1.0, 3.0], [0, 1])
  state = sweep.train(net, make, runs, SPLITS, config, open_folder(tmp_path))
  found = sweep.prune(
    net, state, runs, SPLITS.test, [0.0, 0.98], scope='global'
  )
  accuracy = {
    (alpha, sparsity): np.mean(
      [
        record['accuracy']
        for record in found
        if (record['alpha'], record['sparsity']) == (alpha, sparsity)
      ]
    )
    for alpha in (1.0, 3.0)
    for sparsity in (0.0, 0.98)
  }
  assert accuracy[1.0, 0.0] > 0.96
  assert accuracy[3.0, 0.0] > 0.94
  assert accuracy[3.0, 0.98] > accuracy[1.0, 0.98] + 0.2
