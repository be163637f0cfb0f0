"""Which classes the features of a network respond to.

A feature is an output of a layer that has weights: a channel of a
convolution, a unit of a linear layer. Activations come from the forward pass,
sums of them over examples flow through jit, results are NumPy arrays by layer
and flat records.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import activations as activations_lib
from experiments.common.activations import Apply
from powerprop_jax.core.trees import Params
from powerprop_jax.files.tables import Row

Record = Row


class LayerFeatures(NamedTuple):
  """What the features of one layer respond to.

  Attributes:
    activity: summed activations of each feature over the examples of each
      class, float64[num_classes, C].
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
  activations = activations.astype(jnp.float32)
  # Not jax.nn.relu: fused with a sum, XLA makes 0 of a NaN on a CPU.
  positive = jnp.where(activations < 0, 0, activations)
  of_example = positive.sum(axis=tuple(range(1, activations.ndim - 1)))
  classes = jnp.arange(num_classes, dtype=jnp.int32)
  is_class = labels.astype(jnp.int32)[None, :] == classes[:, None]
  return jnp.matmul(
    is_class.astype(jnp.float32),
    of_example,
    precision=jax.lax.Precision.HIGHEST,
  )


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
  apply: Apply,
  theta: Params,
  batches: Iterable[tuple[Any, Any]],
  num_classes: int,
) -> dict[str, LayerFeatures]:
  """Runs a network over labelled data; the class-specialisation of each layer.

  The activation of a feature is the ReLU of its layer's output, after a batch
  normalisation if one follows directly, and before any pooling, dropout or
  addition; whether the network has a ReLU there, or another nonlinearity, is
  not looked at. Of the last layer the features are the logits: there a high
  specialisation only says that the network classifies.

  Args:
    apply: see activations.layer_outputs; in evaluation mode, and not compiled,
      which is done here, once for each shape of a batch.
    batches: (inputs, labels), labels integers [N] in [0, num_classes).

  Returns:
    What the features of each layer respond to, by the name of its module, in
    the order of the forward pass. A layer that is applied more than once counts
    all its outputs.

  Raises:
    ValueError: if there is no batch, a label is out of range, apply runs none
      of the modules of theta, or a layer's output is not [N, ..., C].
    TypeError: if apply was compiled by jax.jit.

  Example:
    >>> import haiku as hk
    >>> net = hk.without_apply_rng(hk.transform(
    ...     lambda x: hk.nets.MLP([2])(x)))
    >>> theta = {'mlp/~/linear_0': {'w': jnp.eye(2), 'b': jnp.zeros(2)}}
    >>> batch = np.array([[1., 0.], [1., 4.]]), np.array([0, 1])
    >>> found = specialisation_by_layer(net.apply, theta, [batch], 2)
    >>> found['mlp/~/linear_0'].specialisation
    array([0.5, 1. ], dtype=float32)

  Note:
    The authors measure convolutions only, after batch normalisation and ReLU.
    In a pre-activation residual network they measure the normalised sum that
    enters a block; here it is the output of each convolution, before the sum.
  """
  if isinstance(apply, jax.stages.Wrapped):
    raise TypeError(
      'apply must not be compiled: nothing inside it could be read. Pass the '
      'function that you gave to jax.jit.'
    )

  order: list[str] = []

  @jax.jit
  def measure(theta: Params, inputs: Any, labels: Any) -> tuple[jax.Array, ...]:
    outputs = activations_lib.layer_outputs(apply, theta, inputs)
    order[:] = outputs  # while tracing: jit would return a dict sorted by name
    return tuple(
      _activity_of_layer(layer, values, labels, num_classes)
      for layer, values in outputs.items()
    )

  totals: list[np.ndarray] = []
  for inputs, labels in batches:
    labels = _checked_labels(labels, num_classes)
    sums = jax.device_get(measure(theta, inputs, labels))
    # Batches add up in float64: float32 would lose the last of many.
    totals = totals or [np.zeros(layer.shape) for layer in sums]
    totals = [total + layer for total, layer in zip(totals, sums, strict=True)]
  if not totals:
    raise ValueError('batches must hold at least one batch, got none.')
  return {
    layer: LayerFeatures(total, np.asarray(class_specialisation(total)))
    for layer, total in zip(order, totals, strict=True)
  }


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


def _activity_of_layer(
  layer: str,
  outputs: tuple[jax.Array, ...],
  labels: jax.Array,
  num_classes: int,
) -> jax.Array:
  for output in outputs:
    if output.shape[0] != labels.shape[0]:
      raise ValueError(
        f'the output of {layer} must have an entry for each of the '
        f'{labels.shape[0]} labels along its first axis, got shape '
        f'{output.shape}.'
      )
  activity = [class_activity(o, labels, num_classes) for o in outputs]
  return jnp.sum(jnp.stack(activity), axis=0)


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
