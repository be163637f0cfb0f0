"""Scores of streams."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax.train import evaluate
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError

RNG = np.random.default_rng(0)


def given(images, is_training):
  """A network whose logits are its images."""
  del is_training
  return images.reshape(images.shape[0], -1)


SCORE = functools.partial(
  jax.jit(evaluate.make_score(hk.transform_with_state(given), jnp.asarray)),
  {},
  {},
)


def batches(logits, labels, size):
  images = logits.reshape(*logits.shape, 1, 1)
  return [
    Arrays(images[i : i + size], labels[i : i + size])
    for i in range(0, len(labels), size)
  ]


class ScoreTest:
  def test_scores_are_those_of_numpy(self):
    # Whole numbers, so that there are ties.
    logits = RNG.integers(-3, 4, (60, 10)).astype(np.float32)
    labels = RNG.integers(0, 10, 60).astype(np.int32)
    labels[[7, 50, 59]] = -1
    found = evaluate.evaluate(SCORE, batches(logits, labels, 20))
    chosen = labels >= 0
    rows, right = logits[chosen], labels[chosen]
    order = np.argsort(-rows, axis=1, kind='stable')
    own = rows[np.arange(57), right]
    losses = np.log(np.exp(rows).sum(axis=1)) - own
    assert found['count'] == 57
    assert found['accuracy'] == np.mean(order[:, 0] == right)
    in_5 = np.any(order[:, :5] == right[:, None], axis=1)
    assert found['top_5'] == np.mean(in_5)
    assert found['loss'] == pytest.approx(losses.mean(), rel=1e-5)

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  def test_logits_that_are_not_finite_are_wrong(self, value):
    logits = np.zeros((2, 6), np.float32)
    logits[0, 3] = value
    labels = np.zeros(2, np.int32)
    found = evaluate.evaluate(SCORE, batches(logits, labels, 2))
    assert found['accuracy'] == found['top_5'] == 0.5

  def test_no_example_is_refused(self):
    logits = np.zeros((2, 6), np.float32)
    labels = np.full(2, -1, np.int32)
    with pytest.raises(UserError, match='no image to evaluate on'):
      evaluate.evaluate(SCORE, batches(logits, labels, 2))


class SmoothingTest:
  @pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
  def test_loss_is_that_of_smoothed_labels(self, smoothing):
    logits = RNG.normal(size=(4, 5)).astype(np.float32)
    labels = np.array([0, 1, 4, 2])
    soft = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = step_lib.cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(found, -(soft * log_p).sum(axis=1), rtol=1e-5)

  def test_a_step_takes_the_share_that_it_is_given(self):
    net = hk.transform_with_state(
      lambda images, is_training: hk.Linear(5)(given(images, is_training))
    )
    images = RNG.normal(size=(4, 2, 2, 1)).astype(np.float32)
    labels = np.array([0, 1, 4, 2])
    state = step_lib.create(net, optax.sgd(0.0), jax.random.key(0), images)
    step = step_lib.make_step(net, optax.sgd(0.0), label_smoothing=0.1)
    _, metrics = step(state, images, labels)
    logits, _ = net.apply(state.phi, {}, None, images, True)
    expected = step_lib.cross_entropy(logits, labels, 0.1).mean()
    assert float(metrics['loss']) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match=r'\[0, 1\), got 1'):
      step_lib.make_step(net, optax.sgd(0.0), label_smoothing=1.0)
