"""Which classes the features of a network respond to.

A feature is what a layer reads: a channel of the images of a convolution, a
unit of the vectors of a linear layer. pp.observe shows what enters each product
of a function; sums of it over examples flow through jit, results are NumPy
arrays by layer and flat records.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import powerprop_jax as pp
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row

Record = Row

# The name of the features of the result.
OUTPUT = 'output'

# A feature that varies less than this share of itself is the same everywhere.
_SAME = 1e-5


class LayerFeatures(NamedTuple):
  """What the features of one layer respond to.

  Attributes:
    activity: summed activations of each feature over the examples of each
      class, [num_classes, C]. 0 for one that is the same for every example, as
      one without a connection into it: it is as general as can be, and counted,
      it would make sparse networks look more general.
    specialisation: class_specialisation of it, float32[C].
  """

  activity: np.ndarray
  specialisation: np.ndarray


def class_activity(
  activations: jax.Array, labels: jax.Array, num_classes: int
) -> jax.Array:
  """Activations of each feature, summed over the examples of each class.

  Sums of several batches add up to that of all of them. Can be jitted, with
  num_classes static.

  Args:
    activations: [N, ..., C], the features last; all axes between are summed
      over. Negative values count as 0, so that it makes no difference whether
      a ReLU comes before.
    labels: integers [N]. An example with a label outside [0, num_classes), such
      as a padded one, counts for no class.

  Returns:
    The sums, float32[num_classes, C].

  Example:
    >>> activations = jnp.array([[1., 0.], [2., -5.], [3., 4.]])
    >>> class_activity(activations, jnp.array([0, 1, 1]), 2)
    Array([[1., 0.],
           [5., 4.]], dtype=float32)
  """
  if activations.ndim < 2 or activations.shape[:1] != labels.shape:
    raise ValueError(
      'activations must have shape [N, ..., C] and labels [N], got '
      f'{activations.shape} and {labels.shape}.'
    )
  classes = jnp.arange(num_classes, dtype=jnp.int32)
  is_class = labels.astype(jnp.int32)[None, :] == classes[:, None]
  return jnp.matmul(
    is_class.astype(jnp.float32),
    _of_example(activations),
    precision=jax.lax.Precision.HIGHEST,
  )


def _of_example(activations: jax.Array) -> jax.Array:
  """Positive activations of each example, [N, C]."""
  activations = activations.astype(jnp.float32)
  # Not jax.nn.relu: fused with a sum, XLA makes 0 of a NaN on a CPU.
  positive = jnp.where(activations < 0, 0, activations)
  return positive.sum(axis=tuple(range(1, activations.ndim - 1)))


def class_specialisation(activity: jax.Array | np.ndarray) -> jax.Array:
  """Share of the class that a feature responds to most, max_c a_c / Σ_c a_c.

  1 is a feature of a single class, 1/num_classes one that responds to all of
  them alike; more exactly, with classes of different size, the share of the
  largest class. NaN for a feature that is dead, active for no example, or whose
  sums are not finite. From activity [num_classes, C] to float32[C].

  Example:
    >>> class_specialisation(jnp.array([[1., 3., 0.], [1., 1., 0.]]))
    Array([0.5 , 0.75,  nan], dtype=float32)

  Note:
    The authors' program also leaves out the weakest features of a layer, those
    that together carry less than 5 % of its activity. Here only dead ones are
    left out.

  Source:
    Dettmers and Zettlemoyer, Sparse Networks from Scratch, 2019, the analysis
    of features (https://arxiv.org/abs/1907.04840).
  """
  activity = jnp.asarray(activity, jnp.float32)
  # The largest first: the sum of very large activations could overflow.
  largest = activity.max(axis=0)
  is_measured = (largest > 0) & jnp.isfinite(largest)
  shares = activity / jnp.where(is_measured, largest, 1.0)[None, :]
  return jnp.where(is_measured, 1 / shares.sum(axis=0), jnp.nan)


def specialisation_by_layer(
  fn: Callable[[Params, Any], jax.Array],
  theta: Params,
  batches: Iterable[tuple[Any, Any]],
  num_classes: int,
) -> dict[str, LayerFeatures]:
  """Runs a network over labelled data; the class-specialisation of each layer.

  The activation of a feature is the ReLU of what a layer reads: the result of
  the layers before it, with their norms, nonlinearities, pooling and additions.
  The first layer reads the data. Of the result of fn the features are the
  logits: there a high specialisation only says that the network classifies.

  Args:
    fn: (theta, inputs) -> result [N, ...], in any library; in evaluation mode.
    batches: (inputs, labels), labels integers [N] in [0, num_classes).

  Returns:
    What the features respond to that each weight multiplies, by 'module/name'
    in the order of the forward pass, and those of the result as 'output'. A
    layer that is applied more than once counts all that it reads; those of a
    scan have their features side by side.

  Raises:
    ValueError: if there is no batch, a label is out of range, or what a layer
      reads is not [N, ..., C].

  Example:
    >>> fn = lambda theta, x: x @ theta['a']['w'] @ theta['b']['w']
    >>> theta = {'a': {'w': jnp.eye(2)}, 'b': {'w': jnp.ones((2, 1))}}
    >>> batch = np.array([[1., 0.], [1., 4.]]), np.array([0, 1])
    >>> found = specialisation_by_layer(fn, theta, [batch], 2)
    >>> found['b/w'].specialisation, found['output'].specialisation
    (array([nan,  1.], dtype=float32), array([0.8333333], dtype=float32))

  Note:
    The authors measure convolutions only, after batch normalisation and ReLU,
    and in a pre-activation residual network the normalised sum that enters a
    block: what the next convolution reads, as here.
  """
  order: list[str] = []

  @jax.jit
  def measure(theta: Params, inputs: Any, labels: Any) -> list[_Response]:
    respond = functools.partial(
      _response, labels=labels, num_classes=num_classes
    )
    result, seen = pp.observe(fn, respond, patches=False)(theta, inputs)
    order[:] = [*seen, OUTPUT]  # jit would return a dict sorted by name
    return [*map(_of_layer, seen.values()), respond(result)]

  totals: list[_Response] = []
  for inputs, labels in batches:
    labels = _checked_labels(labels, num_classes)
    found = jax.device_get(measure(theta, inputs, labels))
    totals = list(map(_add, totals, found)) if totals else found
  if not totals:
    raise ValueError('batches must hold at least one batch, got none.')
  activities = [
    np.where(r.highest - r.lowest <= _SAME * r.highest, 0, r.activity)
    for r in totals
  ]
  return {
    layer: LayerFeatures(a, np.asarray(class_specialisation(a)))
    for layer, a in zip(order, activities, strict=True)
  }


class _Response(NamedTuple):
  """What features do over examples.

  Attributes:
    activity: summed over the examples of each class, [..., num_classes, C].
    lowest: of one example, [..., C].
    highest: of one example, [..., C].
  """

  activity: Any
  lowest: Any
  highest: Any


def _response(x: jax.Array, labels: jax.Array, num_classes: int) -> _Response:
  activity = class_activity(x, labels, num_classes)
  of_example = _of_example(x)
  return _Response(activity, of_example.min(axis=0), of_example.max(axis=0))


def _of_layer(found: list[_Response]) -> _Response:
  """Of all that a layer reads; the layers of a scan side by side."""
  total = functools.reduce(
    lambda a, b: _Response(
      a.activity + b.activity,
      jnp.minimum(a.lowest, b.lowest),
      jnp.maximum(a.highest, b.highest),
    ),
    found,
  )
  by_class = jnp.moveaxis(total.activity, -2, 0)
  return _Response(
    by_class.reshape(by_class.shape[0], -1),
    total.lowest.reshape(-1),
    total.highest.reshape(-1),
  )


def _add(total: _Response, batch: _Response) -> _Response:
  # Batches add up in float64: float32 would lose the last of many.
  return _Response(
    total.activity.astype(np.float64) + batch.activity,
    np.minimum(total.lowest, batch.lowest),
    np.maximum(total.highest, batch.highest),
  )


def specialisation_records(found: Mapping[str, LayerFeatures]) -> list[Record]:
  """One record for each feature, NaN for one that is left out.

  Example:
    >>> activity = np.array([[1., 0.], [1., 0.]])
    >>> shares = np.array([0.5, np.nan], np.float32)
    >>> specialisation_records({'linear': LayerFeatures(activity, shares)})[0]
    {'layer': 'linear', 'feature': 0, 'specialisation': 0.5}
  """
  return [
    {'layer': layer, 'feature': index, 'specialisation': float(value)}
    for layer, features in found.items()
    for index, value in enumerate(features.specialisation)
  ]


def specialisation_table(found: Mapping[str, LayerFeatures]) -> list[Record]:
  """One record for each layer: how many features, dead and not finite ones.

  Mean and median are of the specialisation of all others; NaN if there is none.

  Example:
    >>> activity = np.array([[1., 0., 3.], [1., 0., 1.]])
    >>> shares = np.array([0.5, np.nan, 0.75], np.float32)
    >>> found = {'linear': LayerFeatures(activity, shares)}
    >>> row = specialisation_table(found)[0]
    >>> row['features'], row['dead'], row['mean']
    (3, 1, 0.625)
  """
  rows = []
  for layer, (activity, specialisation) in found.items():
    total = activity.sum(axis=0)
    measured = specialisation[np.isfinite(specialisation)].astype(np.float64)
    rows.append(
      {
        'layer': layer,
        'features': total.size,
        'dead': int(np.count_nonzero(total == 0)),
        'not_finite': int(np.count_nonzero(~np.isfinite(total))),
        'mean': float(measured.mean()) if measured.size else float('nan'),
        'median': (
          float(np.median(measured)) if measured.size else float('nan')
        ),
      }
    )
  return rows


def _checked_labels(labels: Any, num_classes: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'labels must be integers [N], got {labels.dtype} {labels.shape}.'
    )
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f'labels must be in [0, {num_classes}), got {labels.min()} to '
      f'{labels.max()}.'
    )
  return labels.astype(np.int32)
