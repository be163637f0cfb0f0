"""What settings make of networks, rates, methods and masks."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.imagenet_resnet50 import config as config_lib
from experiments.imagenet_resnet50 import setup
from experiments.imagenet_resnet50.config import (
  Config,
  NetConfig,
  RecipeConfig,
  ScheduleConfig,
)
from powerprop_jax.core import distributions
from powerprop_jax.optim import ema, topology, views
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.runs.errors import UserError

IMAGENET = 1_281_167
SPARSE = SparseConfig(period=10, stop=25 / 32)
# A network of two leaves that masks concern, with the names of a real one.
THETA = {
  'net/stem': {'w': jnp.full((3, 3, 3, 8), 0.1, jnp.float32)},
  'net/norm': {'scale': jnp.ones(8)},
  'net/logits': {'w': jnp.linspace(-1.0, 1.0, 400).reshape(8, 50) + 1e-3},
}
RECIPE = RecipeConfig(
  batch_size=10, num_steps=100, schedule=ScheduleConfig(warmup=0.0)
)
recipe_with = functools.partial(dataclasses.replace, RECIPE)


def settings(
  method='rigl', sparsity=0.9, allocation='erk', alpha=1.0, **others
):
  config = Config(recipe=RECIPE, sparse=SPARSE, method=method)
  return dataclasses.replace(
    config, sparsity=sparsity, allocation=allocation, alpha=alpha, **others
  )


def state_of(config):
  config_lib.check(config)
  tx = setup.make_tx(config, 100, THETA)
  phi, opt_state = views.init(tx, THETA)
  return tx, step_lib.TrainState(
    jnp.zeros([], jnp.int32), phi, {}, opt_state, jax.random.key(0)
  )


def kept(masks):
  return {name: int(leaves['w'].sum()) for name, leaves in masks.items()
          if 'w' in leaves}  # fmt: skip


class NetTest:
  def test_sizes_are_those_of_the_literature_or_refused(self):
    theta = setup.shapes(setup.make_net(NetConfig(), 1000), 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 25_557_032
    half = setup.shapes(setup.make_net(NetConfig(width=0.5), 1000), 64)
    assert half['resnet_50/stem']['w'].shape == (7, 7, 3, 32)
    assert half['resnet_50/logits']['w'].shape == (1024, 1000)
    with pytest.raises(UserError, match='must be 10, 18 or 50, got 34'):
      setup.make_net(NetConfig(depth=34), 10)
    with pytest.raises(UserError, match='got 0'):
      setup.make_net(NetConfig(width=0.0), 10)


class RateTest:
  def test_recipe_of_rigl(self):
    rate = jax.jit(setup.learning_rate(RecipeConfig(), IMAGENET))
    assert rate(0).dtype == jnp.float32
    at = lambda epochs: float(rate(round(epochs * IMAGENET / 4096)))
    assert at(0) == 0
    assert at(2.5) == pytest.approx(0.8, rel=1e-3)
    for epochs, expected in ((5, 1.6), (29.9, 1.6), (30, 0.16), (69.9, 0.16),
                             (70, 0.016), (90, 0.0016)):  # fmt: skip
      assert at(epochs) == pytest.approx(expected, rel=1e-5)

  def test_longer_training_stretches_all_of_it(self):
    short = setup.learning_rate(RecipeConfig(), IMAGENET)
    long = setup.learning_rate(RecipeConfig(length=5.0), IMAGENET)
    assert RecipeConfig(length=5.0).total_steps == 160_000
    for step in (0, 400, 1000, 9000, 10_000, 25_000, 31_999):
      expected = pytest.approx(float(short(step)), rel=1e-3)
      assert float(long(5 * step)) == expected

  def test_cosine_ends_at_zero(self):
    config = ScheduleConfig(kind='cosine', warmup=1.0)
    recipe = recipe_with(num_steps=110, schedule=config)
    rate = setup.learning_rate(recipe, num_examples=100)
    found = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0, 0.8, 1.6, 0.8, 0], atol=1e-6)

  @pytest.mark.parametrize(
    ('wrong', 'message'),
    [
      ({'learning_rate': 0.0}, 'positive and finite, got 0'),
      ({'warmup': 200.0}, 'takes 200 steps, but there are 100'),
      ({'warmup': -1.0}, 'at least 0 epochs, got -1'),
      ({'kind': 'steps'}, "'stairs' or 'cosine', got 'steps'"),
      ({'factor': 1.0}, r'\(0, 1\), got 1'),
      ({'drops': (70.0, 30.0)}, r'ascending order, got \(70.0, 30.0\)'),
    ],
  )
  def test_impossible_ones_are_refused(self, wrong, message):
    with pytest.raises(UserError, match=message):
      setup.learning_rate(recipe_with(schedule=ScheduleConfig(**wrong)), 10)


class MethodTest:
  @pytest.mark.parametrize(
    'method',
    [m for m in config_lib.METHODS if m not in ('dense', 'one_shot')],
  )
  @pytest.mark.parametrize(
    ('allocation', 'alpha'), [('uniform', 1.0), ('uniform', 1.5), ('erk', 1.5)]
  )
  def test_first_masks_are_as_asked(self, method, allocation, alpha):
    _, state = state_of(settings(method, 0.8, allocation, alpha))
    found = kept(views.current_masks(state.phi, state.opt_state))
    if method == 'pruning':
      assert found == {'net/stem': 216, 'net/logits': 400}
    elif allocation == 'uniform':
      assert found == {'net/stem': 216, 'net/logits': 80}
    else:
      expected = distributions.erk(THETA, 0.8)
      for name, size in (('net/stem', 216), ('net/logits', 400)):
        assert found[name] == size - math.floor(size * expected[f'{name}/w'])

  @pytest.mark.parametrize(
    ('method', 'sparsity'), [('dense', 0.0), ('one_shot', 0.8)]
  )
  def test_dense_training_has_no_masks(self, method, sparsity):
    _, state = state_of(settings(method, sparsity, 'uniform', 1.5))
    assert topology.find_sparse_state(state.opt_state) is None

  @pytest.mark.parametrize('allocation', ['uniform', 'erk'])
  def test_one_shot_leaves_out_the_smallest_of_each_layer(self, allocation):
    config = settings('one_shot', 0.9, allocation, 1.5)
    _, state = state_of(config)
    theta, masks, _ = setup.weights(state, config)
    mask = np.asarray(masks['net/logits']['w'])
    if allocation == 'uniform':
      assert kept(masks) == {'net/stem': 216, 'net/logits': 40}
      w = np.abs(np.asarray(THETA['net/logits']['w']))
      np.testing.assert_array_equal(mask, w >= np.sort(w, axis=None)[-40])
    assert 0 < setup.density(setup.Weights(theta, masks, {})) < 0.5
    np.testing.assert_array_equal(theta['net/logits']['w'] == 0, ~mask)

  def test_penalty_spares_norms_and_sees_theta(self):
    recipe = recipe_with(
      schedule=ScheduleConfig(learning_rate=1.0, warmup=0.0),
      momentum=0.0,
      decay_theta=0.5,
    )
    tx, state = state_of(settings('dense', 0.0, recipe=recipe))
    zeros = jax.tree.map(jnp.zeros_like, THETA)
    updates, _ = tx.update(zeros, state.opt_state, state.phi)
    np.testing.assert_array_equal(updates['net/norm']['scale'], 0)
    np.testing.assert_allclose(
      updates['net/logits']['w'], -0.5 * THETA['net/logits']['w'], rtol=1e-6
    )

  def test_end_of_rewiring_is_stretched_too(self):
    sparse = SparseConfig(period=10, stop=0.5)
    for length, last in ((1.0, 40), (2.0, 90)):
      recipe = recipe_with(length=length)
      tx, state = state_of(
        settings('rigl', 0.5, 'uniform', recipe=recipe, sparse=sparse)
      )
      update = jax.jit(tx.update)
      moved, opt_state = [], state.opt_state
      for step in range(100):
        before = views.current_masks(state.phi, opt_state)
        grads = jax.tree.map(functools.partial(_noise, step), THETA)
        _, opt_state = update(grads, opt_state, state.phi)
        after = views.current_masks(state.phi, opt_state)
        same = jax.tree.map(np.array_equal, before, after)
        if not all(jax.tree.leaves(same)):
          moved.append(step)
      assert max(moved) == last

  @pytest.mark.parametrize(
    ('wrong', 'message'),
    [
      ({'sparsity': 1.0}, r'sparsity must be in \[0, 1\), got 1'),
      ({'method': 'dense', 'sparsity': 0.5}, 'has sparsity 0, got 0.5'),
      ({'allocation': 'er'}, "unknown allocation 'er'"),
      ({'alpha': 0.5}, 'alpha must be at least 1 and finite, got 0.5'),
      *(
        ({'recipe': recipe_with(**{name: value})}, f'{name} must be {message}')
        for name, value, message in (
          ('batch_size', 0, 'at least 1, got 0'),
          ('momentum', 1.0, r'in \[0, 1\), got 1'),
          ('label_smoothing', -0.1, 'in .* got -0.1'),
          ('ema', 1.0, r'in \[0, 1\), got 1'),
          ('decay_theta', -1.0, 'at least 0'),
          ('num_steps', 0, 'at least 1, got 0'),
          ('length', 0.0, 'positive and finite, got 0'),
        )
      ),
    ],
  )
  def test_impossible_settings_are_refused(self, wrong, message):
    with pytest.raises(UserError, match=message):
      config_lib.check(settings(**wrong))

  def test_mean_is_that_of_theta_and_obeys_the_masks(self):
    rate = ScheduleConfig(learning_rate=0.1, warmup=0.0)
    recipe = recipe_with(ema=0.5, schedule=rate)
    sparse = SparseConfig(period=3, stop=1.0)
    config = settings('set', 0.5, 'uniform', 2.0, recipe=recipe, sparse=sparse)
    tx, state = state_of(config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def update(phi, opt_state, grads):
      updates, opt_state = tx.update(grads, opt_state, phi)
      return jax.tree.map(jnp.add, phi, updates), opt_state

    phi, opt_state = jax.tree.map(jnp.copy, (state.phi, state.opt_state))
    expected = jax.tree.map(np.array, views.effective_params(phi, opt_state))
    for step in range(1, 9):
      grads = jax.tree.map(functools.partial(_noise, step), THETA)
      phi, opt_state = update(phi, opt_state, grads)
      theta = views.effective_params(phi, opt_state)
      d = min(0.5, (1 + step) / (10 + step))
      expected = jax.tree.map(
        lambda a, t, d=d: d * a + (1 - d) * np.asarray(t), expected, theta
      )
    masks = views.current_masks(phi, opt_state)
    expected = jax.tree.map(lambda e, m: np.where(m, e, 0), expected, masks)
    mean = setup.weights(
      state._replace(phi=phi, opt_state=opt_state), config, mean=True
    )
    for found in (ema.average(phi, opt_state), mean.theta):
      chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert kept(mean.masks)['net/logits'] == 200
    tx.init({})
    with pytest.raises(ValueError, match='needs the parameters'):
      tx.update(THETA, state.opt_state)
    with pytest.raises(ValueError, match=r'\[0, 1\), got 1'):
      ema.with_ema(optax.sgd(0.1), 1.0)


def _noise(step, x):
  return jax.random.normal(jax.random.key(step), x.shape)
