"""How well a network classifies: scores over whole splits.

Data sets that fit in memory are scored in one compiled program, streams of
batches one by one, on any number of devices. Examples of label -1 fill up last
batches, or stand for damaged files, and do not count.
"""

from collections.abc import Callable, Iterable

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Prepare
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import TrainState

Sums = dict[str, jax.Array]
Score = Callable[[hk.Params, hk.State, Arrays], Sums]


def make_score(
  net: hk.TransformedWithState, prepare: Prepare = splits.to_float
) -> Score:
  """Sums over a batch: score(theta, net_state, batch).

  The images are prepared as in training.

  Returns:
    A pure function. It gives the number of examples whose label is not -1, and
    sums over them of the cross-entropy in nats, of right answers, and of
    labels that are among the five likeliest classes. A prediction made of
    logits that are not finite counts as wrong.
  """

  def score(theta: hk.Params, net_state: hk.State, batch: Arrays) -> Sums:
    images = prepare(batch.images)
    logits, _ = net.apply(theta, net_state, None, images, is_training=False)
    # Of a text, each place is an example.
    logits = logits.reshape(-1, logits.shape[-1])
    labels = jnp.asarray(batch.labels).reshape(-1)
    counts = labels >= 0
    labels = jnp.maximum(labels, 0)
    losses = step_lib.cross_entropy(logits, labels)
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


def make_evaluate(
  net: hk.TransformedWithState,
  *,
  batch_size: int = 1000,
  prepare: Prepare = splits.to_float,
) -> Callable[[hk.Params, hk.State, Arrays], dict[str, jax.Array]]:
  """Loss and accuracy over a split in memory: (theta, net_state, arrays) -> .

  Returns:
    A pure function, exact for any number of examples; see make_score. The
    batch_size, of examples at a time, bounds its memory.
  """
  score = make_score(net, prepare)

  def evaluate(
    theta: hk.Params, net_state: hk.State, arrays: Arrays
  ) -> dict[str, jax.Array]:
    size = arrays.labels.shape[0]
    whole = size - size % batch_size
    sums = []
    if whole:
      head = jax.tree.map(
        lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), arrays
      )
      found = jax.lax.map(lambda batch: score(theta, net_state, batch), head)
      sums.append(jax.tree.map(jnp.sum, found))
    if whole < size:
      tail = jax.tree.map(lambda x: x[whole:], arrays)
      sums.append(score(theta, net_state, tail))
    names = ('loss', 'accuracy')
    totals = {name: sum(found[name] for found in sums) for name in names}
    return {
      name: total / jnp.float32(arrays.labels.size)
      for name, total in totals.items()
    }

  return evaluate


def on_state(
  net: hk.TransformedWithState, *, prepare: Prepare = splits.to_float
) -> Callable[[TrainState, Arrays], dict[str, jax.Array]]:
  """make_evaluate over the state of a training, as loop.fit takes it."""
  evaluate = make_evaluate(net, prepare=prepare)
  return lambda state, arrays: evaluate(state.theta, state.net_state, arrays)


def evaluate(
  score: Callable[[Arrays], Sums], batches: Iterable[Arrays]
) -> dict[str, float]:
  """Means over all examples of a stream, of images and labels on devices.

  Args:
    score: from make_score, jitted, with a network; its sums must be readable
      here.

  Returns:
    loss in nats, accuracy and top_5 in [0, 1], and the count of examples.

  Raises:
    UserError: if there is no example.
  """
  found: list[Sums] = []
  for batch in batches:
    found.append(score(batch))
    # One behind, so that the device need not wait for this host.
    found[-2:-1] = jax.device_get(found[-2:-1])
  sums = {
    name: sum(each[name].item() for each in jax.device_get(found))
    for name in ('count', 'loss', 'accuracy', 'top_5')
  }
  count = sums['count']
  if not count:
    raise UserError(
      'there is no image to evaluate on: all files of the split are damaged.'
    )
  return {name: x if name == 'count' else x / count for name, x in sums.items()}
