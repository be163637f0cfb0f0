"""Baselines and packing in one harness: forgetting, resuming, one program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.continual_permuted import (
  baselines,
  methods,
  packing,
  runs,
  training,
)
from experiments.continual_permuted.methods import EwcConfig, NetConfig, Problem
from experiments.continual_permuted.packing import PackingConfig
from powerprop_jax import continual
from powerprop_jax.continual import metrics, task_streams
from powerprop_jax.optim import ewc, powerprop
from powerprop_jax.train import step
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder


def digits():
  splits = data.load(data.DataConfig('digits'))
  return splits._replace(train=Arrays(*(x[:300] for x in splits.train)))


def permuted(num_tasks=3):
  return task_streams.permuted(digits(), num_tasks)


# A network that learns a task in no time.
SMALL = NetConfig((8,), epochs=1, batch_size=50)


def problem(stream=None, **changes):
  return Problem(
    permuted() if stream is None else stream,
    num_classes=10,
    is_multi_head=False,
    key=0,
    net=NetConfig(hidden=(32,), epochs=12, batch_size=20),
    optimizer=OptimizerConfig(learning_rate=0.2, schedule='cosine'),
    ewc=EwcConfig(strength=30.0, num_examples=100),
  )._replace(**changes)


def multi_head():
  return problem(
    task_streams.split(digits(), [[0, 1, 2], [3, 4], [5, 6]]),
    num_classes=3,
    is_multi_head=True,
  )


def make(name, given, alpha=1.0, **settings):
  if name in methods.SPARSE:
    config = PackingConfig(**{'densities': (0.1, 0.3, 0.6), **settings})
    return packing.make(name, given, config, alpha)
  return baselines.make(name, given)


def run(approach, given, path, **settings):
  folder = RunFolder(path, {}, program='test', resume=True)
  return runs.run(approach, given, folder, **settings)


def matrix(records, num_tasks=3):
  found = np.full((num_tasks + 1, num_tasks), np.nan)
  for record in records:
    if 'task' in record:
      place = record['tasks_learned'], record['task'] - 1
      found[place] = record['accuracy']
  return found[1:]


def without_nan(records):
  return [{k: v for k, v in r.items() if v == v} for r in records]


def stopped(records):
  """Why a stream ended before its end."""
  (reason,) = [r['stopped'] for r in records if 'stopped' in r]
  return reason


@pytest.mark.parametrize('name', methods.SPARSE)
@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.slow
def test_packed_tasks_are_not_forgotten(name, alpha, tmp_path):
  given = problem()
  found = matrix(run(make(name, given, alpha, retrain=True), given, tmp_path))
  for number in range(3):
    scores = found[number:, number]
    assert (scores == scores[0]).all()
    assert scores[0] > 0.5


@pytest.mark.slow
def test_baselines_forget_what_they_should(tmp_path):
  quick = OptimizerConfig(learning_rate=0.1, momentum=0.9, schedule='cosine')
  given, last = problem(optimizer=quick), {}
  for name in ('fine_tuning', 'ewc', 'separate'):
    records = run(make(name, given), given, tmp_path / name)
    last[name] = records[-1]
  assert last['fine_tuning']['forgetting'] > 0.3
  assert last['ewc']['forgetting'] < last['fine_tuning']['forgetting'] / 2
  assert last['separate']['forgetting'] == 0
  assert last['separate']['average_accuracy'] > 0.8

  records = run(make('joint', given), given, tmp_path / 'joint')
  found = matrix(records)
  assert np.isnan(found[:2]).all()
  assert (found[2] > 0.8).all()
  assert records[-1]['average_accuracy'] == pytest.approx(found[2].mean())


@pytest.mark.parametrize('name', methods.NAMES)
@pytest.mark.slow
def test_each_task_has_its_own_head(name, tmp_path):
  given = multi_head()
  found = matrix(run(make(name, given), given, tmp_path))
  learned = [2] if name == 'joint' else [0, 1, 2]
  for number in learned:
    assert found[number, number] > 0.8
  if name not in ('joint', 'separate'):
    # Nothing can be said about a task whose head does not exist yet.
    assert np.isnan(found[0, 1:]).all()


def test_all_methods_start_from_the_same_weights():
  given = problem()
  theta, _ = methods.initial(make('ewc', given).program.net, given)
  state = make('efficient_packnet', given, 2.0).init()
  chex.assert_trees_all_close(packing.weights(state), theta, rtol=1e-5)


@pytest.mark.parametrize(
  ('heads', 'name'),
  [
    *(('shared', name) for name in methods.NAMES),
    *(('own', name) for name in ('efficient_packnet', 'ewc')),
  ],
)
@pytest.mark.slow
def test_an_interrupted_stream_continues_to_the_same_results(
  name, heads, tmp_path
):
  given = problem() if heads == 'shared' else multi_head()
  short = given._replace(net=NetConfig((16,), epochs=2, batch_size=20))
  approach = make(name, short, retrain=True)
  expected = run(approach, short, tmp_path / 'whole')
  path = tmp_path / 'pieces'
  learned = []

  def learn_one(state, task, report):
    if learned:
      raise KeyboardInterrupt
    learned.append(task.number)
    return approach.learn(state, task, report)

  for _ in range(3):
    learned.clear()
    try:
      found = run(approach._replace(learn=learn_one), short, path)
    except KeyboardInterrupt:
      continue
  assert without_nan(found) == without_nan(expected)
  # All is done: nothing is learned again.
  learned.append(None)
  again = run(approach._replace(learn=learn_one), short, path)
  assert without_nan(again) == without_nan(expected)


@pytest.mark.parametrize('name', ['efficient_packnet', 'packnet', 'ewc'])
@pytest.mark.slow
def test_later_tasks_compile_nothing(name, tmp_path):
  # Unequal groups: tasks differ in size.
  stream = task_streams.split(digits(), [[0, 1, 2], [3, 4], [5, 6], [7, 8, 9]])
  given = problem(stream, net=NetConfig((17,), epochs=1, batch_size=20))
  approach = make(name, given, retrain=True)
  run(approach, given, tmp_path)
  assert approach.program.advance._cache_size() == 1
  assert approach.program.count._cache_size() <= 2


@pytest.mark.slow
def test_earlier_tasks_are_measured_every_so_often(tmp_path):
  given = problem(permuted(5), net=SMALL)
  approach = make('efficient_packnet', given)
  found = matrix(run(approach, given, tmp_path, measure_every=2), 5)
  measured = [np.flatnonzero(~np.isnan(row)).tolist() for row in found]
  assert measured == [[0], [0, 1], [2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


@pytest.mark.slow
def test_capacity_agrees_with_the_masks(tmp_path):
  given = problem(net=NetConfig((16,), epochs=1, batch_size=20))
  approach = make('efficient_packnet', given, 1.5)
  records = run(approach, given, tmp_path)
  state = runs.read_state(tmp_path, approach)
  masks = (continual.task_masks(state, i) for i in state.task_ids)
  said = [r for r in records if 'capacity_used' in r]
  for ours, theirs in zip(metrics.capacity(masks), said, strict=True):
    for name, value in ours.items():
      assert theirs[name] == pytest.approx(value)


def test_a_full_network_says_so_and_keeps_what_it_has(tmp_path):
  given = problem(net=SMALL)
  approach = make('packnet', given, budgets=(0.5, 1.0, 1.0))
  records = run(approach, given, tmp_path)
  assert "'permuted_1', 'permuted_2'" in stopped(records)
  assert records[-1]['tasks_fitted'] == 2
  assert np.isnan(records[-1]['average_accuracy'])
  found = matrix(records)
  assert found[1, 0] == found[0, 0]
  state = runs.read_state(tmp_path, approach)
  assert state.task_ids == ('permuted_1', 'permuted_2')
  assert without_nan(run(approach, given, tmp_path)) == without_nan(records)


@pytest.mark.parametrize('name', ['efficient_packnet', 'fine_tuning'])
def test_training_that_diverges_stops_the_stream(name, tmp_path):
  given = problem(optimizer=OptimizerConfig(learning_rate=1e20), net=SMALL)
  records = run(make(name, given), given, tmp_path)
  assert 'diverged' in stopped(records)
  assert records[-1]['tasks_fitted'] == 0


def test_filled_up_examples_do_not_count():
  given = problem()
  program = make('fine_tuning', given).program
  theta, net_state = methods.initial(program.net, given)
  images, labels = given.stream[0].test
  logits, _ = program.net.apply(theta, net_state, None, images, False)
  for num in (1, 17, 360):
    arrays = Arrays(images[:num], labels[:num])
    arrays = training.scored(arrays, given.sizes)
    assert len(arrays.labels) == 360
    expected = np.mean(np.argmax(logits[:num], -1) == labels[:num])
    found = program.accuracy(theta, net_state, arrays)
    assert found == pytest.approx(expected)


def test_the_network_is_as_wide_as_it_is_told():
  net = training.make_net(10, (2000, 2000))
  theta = step.shapes(net, jnp.zeros((1, 28, 28, 1)))
  sizes = {1: 0, 2: 0}
  for leaf in jax.tree.leaves(theta):
    sizes[leaf.ndim] += leaf.size
  assert sizes == {2: 5_588_000, 1: 4_010}
  with pytest.raises(ValueError, match='at least one unit'):
    step.shapes(training.make_net(10, (0,)), jnp.zeros((1, 2, 2, 1)))


def test_penalties_of_several_tasks_are_summed():
  keys = jax.random.split(jax.random.key(0), 7)
  *squares, theta = (jax.random.normal(key, (3, 4)) for key in keys)
  pairs = list(zip(squares[:3], squares[3:], strict=True))
  tx = ewc.ewc(0.7)
  state = tx.init(theta)
  # Before the first task nothing is added.
  np.testing.assert_array_equal(tx.update(theta, state, theta)[0], theta)
  for root, star in pairs:
    state = ewc.consolidated(state, root**2, star)

  def penalty(theta):
    return sum(0.7 / 2 * jnp.sum((r * (theta - s)) ** 2) for r, s in pairs)

  found, after = tx.update(jnp.zeros((3, 4)), state, theta)
  expected = jax.grad(penalty)(theta)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert after is state


def test_a_penalty_inside_powerprop_sees_theta():
  tree = lambda *row: {'linear': {'w': jnp.array([row])}}
  phi, zeros = tree(2.0, -0.5), tree(0.0, 0.0)
  tx = powerprop.powerprop(optax.chain(ewc.ewc(1.0), optax.sgd(1.0)), 2.0)
  state = ewc.consolidated(tx.init(phi), tree(1.0, 1.0), zeros)
  updates, _ = tx.update(zeros, state, phi)
  # -θ times the derivative: -4 · 4 and 0.25 · 1.
  np.testing.assert_allclose(updates['linear']['w'], [[-16.0, 0.25]])


def test_fisher_of_a_linear_classifier():
  # For p = softmax(W x), F = E_x x_i² p_c (1 - p_c), by many drawn labels.
  theta = jnp.array([[0.3, -0.2, 0.1], [0.5, 0.0, -0.4]])
  images = jnp.tile(jnp.array([[1.0, 2.0], [-1.0, 0.5]]), (4000, 1))
  logits_fn = lambda theta, x: x @ theta
  found = ewc.fisher(logits_fn, theta, images, jax.random.key(0))
  probs = jax.nn.softmax(images @ theta)
  squares = images[:, :, None] ** 2 * (probs * (1 - probs))[:, None, :]
  np.testing.assert_allclose(found, jnp.mean(squares, axis=0), rtol=0.05)


def test_bad_input_of_the_penalty_is_named():
  theta, images, key = jnp.ones(2), jnp.ones((5, 2)), jax.random.key(0)
  tx = ewc.ewc(1.0)
  with pytest.raises(ValueError, match='strength must be'):
    ewc.ewc(-1.0)
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(theta, tx.init(theta))
  with pytest.raises(ValueError, match='holds 0'):
    ewc.consolidated(optax.sgd(0.1).init(theta), theta, theta)
  with pytest.raises(ValueError, match='must divide'):
    ewc.fisher(lambda t, x: x, theta, images, key, batch_size=2)


def test_a_damaged_checkpoint_costs_one_task(tmp_path, capsys):
  given = problem(net=SMALL)
  approach = make('packnet', given)
  expected = run(approach, given, tmp_path)
  (tmp_path / 'checkpoints' / '3' / 'powerprop_jax.json').write_text('{')
  assert runs.read_state(tmp_path, approach).task_ids[-1] == 'permuted_2'
  assert 'is damaged' in capsys.readouterr().err
  assert without_nan(run(approach, given, tmp_path)) == without_nan(expected)


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path):
  given = problem(net=SMALL)
  approach = make('fine_tuning', given)
  RunFolder(tmp_path, {}, program='test')
  (tmp_path / 'state.npz').write_bytes(b'')
  with pytest.raises(UserError, match=r'a run of version 0\.1\.0.* --out'):
    run(approach, given, tmp_path)
