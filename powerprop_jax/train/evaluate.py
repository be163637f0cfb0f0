"""How well a network classifies a stream of images, on any number of devices.

Examples of label -1 fill up the last batches, or stand for damaged files, and
do not count.
"""

from collections.abc import Callable, Iterable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import Prepare

Sums = dict[str, jax.Array]
Score = Callable[[hk.Params, hk.State, Any, Any], Sums]


def make_score(net: hk.TransformedWithState, prepare: Prepare) -> Score:
  """Sums over a batch: score(theta, net_state, images, labels).

  Args:
    net: a network, (theta, net_state, key, images, is_training) -> (logits,
      net_state).
    prepare: turns images into what the network sees; the same as in training.

  Returns:
    A pure function. It gives the number of examples whose label is not -1, and
    sums over them of the cross-entropy in nats, of right answers, and of
    labels that are among the five likeliest classes. A prediction made of
    logits that are not finite counts as wrong.
  """

  def score(
    theta: hk.Params,
    net_state: hk.State,
    images: jax.Array,
    labels: jax.Array,
  ) -> Sums:
    logits, _ = net.apply(
      theta, net_state, None, prepare(images), is_training=False
    )
    counts = labels >= 0
    labels = jnp.maximum(labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Ties go to the lowest class, as in argmax.
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    ahead = jnp.sum((logits > own) | ((logits == own) & before), axis=1)
    is_usable = counts & jnp.all(jnp.isfinite(logits), axis=1)
    return {
      'count': jnp.sum(counts),
      'loss': jnp.sum(jnp.where(counts, losses, 0.0)),
      'accuracy': jnp.sum(is_usable & (ahead == 0)),
      'top_5': jnp.sum(is_usable & (ahead < 5)),
    }

  return score


def evaluate(
  score: Score,
  theta: hk.Params,
  net_state: hk.State,
  batches: Iterable[Arrays],
) -> dict[str, float]:
  """Means over all examples.

  Args:
    score: from make_score, jitted; its sums must be readable here.
    theta: effective parameters.
    net_state: state of the network.
    batches: images and labels, on devices.

  Returns:
    loss in nats, accuracy and top_5 in [0, 1], and the count of examples.

  Raises:
    UserError: if there is no example.
  """
  sums: dict[str, float] = {}
  waiting: list[Sums] = []
  for images, labels in batches:
    waiting.append(score(theta, net_state, images, labels))
    # One behind, so that the device need not wait for this host.
    if len(waiting) > 1:
      _add(sums, waiting.pop(0))
  for rest in waiting:
    _add(sums, rest)
  count = sums.get('count', 0)
  if not count:
    raise UserError(
      'there is no image to evaluate on: all files of the split are damaged.'
    )
  return {
    name: total if name == 'count' else total / count
    for name, total in sums.items()
  }


def _add(sums: dict[str, float], found: Sums) -> None:
  for name, value in jax.device_get(found).items():
    sums[name] = sums.get(name, 0) + value.item()
