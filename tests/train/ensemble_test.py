"""Many runs in one program give what each of them gives alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from experiments.one_shot_pruning import __main__ as one_shot_pruning
from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble, evaluate, loop, optimizers, step
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import fusing

SPLITS = splits.load(DataConfig())
CONFIG = LoopConfig(num_steps=200, batch_size=32, eval_every=100)
MEMBERS = ensemble.product([1.0, 1.3, 3.0], [0, 5])
NET = nets.make('mlp', 10)


def make_tx(alpha):
  config = OptimizerConfig(learning_rate=0.02, momentum=0.9)
  return optimizers.make_tx(config, alpha, CONFIG.num_steps)


def create(members=MEMBERS):
  return ensemble.create(NET, make_tx, members, SPLITS.example)


def train(path, at_once=None, make_advance=step.make_advance):
  advance = make_advance(NET, make_tx(jnp.float32(1)))
  return loop.fit(
    create(),
    ensemble.mapped(advance, at_once),
    ensemble.mapped(evaluate.on_state(NET), at_once),
    SPLITS,
    CONFIG,
    RunFolder(path, {}, program='test'),
    indices=functools.partial(ensemble.batch_indices, MEMBERS),
    records=functools.partial(ensemble.score_records, MEMBERS),
  )


def make_fused(net, tx):
  return fusing.make_advance(net, fusing.fused(tx))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """All members side by side, and the folder they were trained in."""
  path = tmp_path_factory.mktemp('side_by_side')
  return train(path), path


class TrainTest:
  @pytest.mark.parametrize(
    'how', [{'at_once': 1}, {'at_once': 4}, {'make_advance': make_fused}]
  )
  @pytest.mark.slow
  def test_numbers_are_those_of_side_by_side(self, trained, tmp_path, how):
    # Products of another shape round in another order, and 200 steps of
    # training carry that on.
    state = train(tmp_path, **how)
    chex.assert_trees_all_close(state.phi, trained[0].phi, atol=2e-4, rtol=2e-4)
    assert state.step.tolist() == [CONFIG.num_steps] * len(MEMBERS.key)

  @pytest.mark.parametrize('index', [3, 4])
  @pytest.mark.slow
  def test_a_member_is_what_a_run_of_its_own_gives(
    self, trained, tmp_path, index
  ):
    alpha, key = MEMBERS.alpha[index], int(MEMBERS.key[index])
    tx = make_tx(jnp.asarray(alpha))
    state = loop.fit(
      step.create(NET, tx, jax.random.key(key), SPLITS.example),
      step.make_advance(NET, tx),
      evaluate.on_state(NET),
      SPLITS,
      CONFIG,
      RunFolder(tmp_path, {}, program='test'),
      indices=functools.partial(splits.batch_indices, key),
    )
    expected = ensemble.take(trained[0], index)
    assert jax.tree.structure(state.phi) == jax.tree.structure(expected.phi)
    chex.assert_trees_all_close(state.phi, expected.phi, atol=2e-4, rtol=2e-4)

  def test_every_member_is_logged_at_every_evaluation(self, trained):
    found = metrics.read_metrics(trained[1] / 'metrics.jsonl')
    assert [record['step'] for record in found] == [100] * 6 + [200] * 6
    assert [record['key'] for record in found[:6]] == [0, 5] * 3
    for record in found:
      assert 0 < record['loss'] < 2.5
      assert 0.5 < record['validation_accuracy'] <= 1

  def test_network_that_diverged_is_named(self, trained):
    state = trained[0]
    assert not any(ensemble.lost_leaves(MEMBERS, state).values())
    phi = jax.tree.map(lambda x: x.at[2, 0].set(jnp.nan), state.phi)
    lost = ensemble.lost_leaves(MEMBERS, state._replace(phi=phi))
    assert [n for n, leaf in lost.items() if leaf is not None] == [(1.3, 0)]


class PruneTest:
  @pytest.mark.parametrize(
    ('scope', 'overrides'),
    [('layer', ensemble.keep_more_outputs(2)), ('global', lambda _: {})],
  )
  def test_records_hold_exact_densities_and_accuracies(
    self, trained, scope, overrides
  ):
    sparsities = [0.0, 0.9, 0.985]
    how = {'scope': scope, 'overrides': overrides}
    found = ensemble.prune(
      NET, trained[0], MEMBERS, SPLITS.test, sparsities, **how
    )
    assert [record['sparsity'] for record in found] == sparsities * 6
    assert [record['key'] for record in found[::3]] == MEMBERS.key.tolist()
    assert {record['scope'] for record in found} == {scope}
    # By hand: prune one network, count, and evaluate.
    for record in (found[1], found[11], found[17]):
      alone = ensemble.take(trained[0], found.index(record) // 3)
      sparsity = record['sparsity']
      how = {'scope': scope, 'overrides': overrides(sparsity)}
      kept = one_shot.prune(alone.theta, sparsity, **how)
      weights = [m for m in jax.tree.leaves(kept) if m.ndim == 2]
      left = sum(int(m.sum()) for m in weights)
      assert record['density'] == left / sum(m.size for m in weights)
      theta = masks.apply_masks(alone.theta, kept)
      scores = evaluate.make_evaluate(NET)(theta, alone.net_state, SPLITS.test)
      expected = pytest.approx(float(scores['accuracy']), abs=1.1 / 360)
      assert record['accuracy'] == expected

  def test_single_network_with_a_compiled_in_power_is_pruned_too(self):
    state = step.create(NET, make_tx(2.0), jax.random.key(3), SPLITS.example)
    stacked = jax.tree.map(lambda x: x[None], state)
    members = Members(np.array([2.0]), np.array([3]))
    (record,) = ensemble.prune(NET, stacked, members, SPLITS.test, [0.5])
    assert (record['alpha'], record['key'], record['density']) == (2.0, 3, 0.5)


@pytest.mark.slow
def test_powerprop_survives_one_shot_pruning_better_than_ordinary_training(
  tmp_path,
):
  # Keys 0 to 4 gave differences of 0.59, 0.43, 0.66, 0.76 and 0.63. Unpruned,
  # the means were 0.982 and 0.974.
  args = ['--alphas', 1, 3, '--keys', 0, '--kept', 1, 0.02, '--scopes=global']
  args += ['--optimizer.learning-rate=0.1', '--optimizer.decay-phi=2e-3']
  args += ['--loop.num-steps=3000', '--loop.eval-every=3000']
  assert programs.run(one_shot_pruning, *args, '--out', tmp_path / 'run') == 0
  accuracy = {
    (record['alpha'], record['sparsity']): record['accuracy']
    for record in programs.results(tmp_path / 'run')
  }
  assert accuracy[1, 0] > 0.96
  assert accuracy[3, 0] > 0.94
  assert accuracy[3, 0.98] > accuracy[1, 0.98] + 0.2
