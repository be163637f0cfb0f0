"""What training did to the weights: histograms, mass near zero, mask overlap.

Everything here reads parameters that were fetched to the host, and works in
NumPy. Results are flat records, ready for results.json, except histograms.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.top_k import topk
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row

K = TypeVar('K')

# The name under which all weights together are reported.
TOTAL = 'total'
_LARGEST = float(np.finfo(np.float32).max)
_COVERAGE = 0.999


class Histogram(NamedTuple):
  """Counts of the weights of one leaf.

  Attributes:
    counts: weights in each bin, int64[bins].
    edges: borders of the bins, float64[bins + 1].
    outside: number of weights below the first or above the last edge.
    not_finite: number of weights that are NaN or infinite.
  """

  counts: np.ndarray
  edges: np.ndarray
  outside: int
  not_finite: int


def weight_histograms(
  thetas: Mapping[K, Params], *, bins: int = 101
) -> dict[K, dict[str, Histogram]]:
  """Histogram of each weight, by its name 'module/name', of each network.

  Bins are of equal width and those of a leaf are the same in all networks: from
  -r to r, where r is at least 99.9 % of the |θ| that are finite and not zero,
  in each network, so that outliers do not stretch them; at most the largest
  float32, and 1 where there is no such θ.

  Args:
    thetas: effective parameters by α (or by anything else that tells the
      networks apart); all with the same leaves.
    bins: their number; odd, so that zero lies in the middle of one.

  Example:
    >>> theta = {'linear': {'w': np.array([[-0.5, 0.1], [0.2, 0.4]])}}
    >>> found = weight_histograms({1.0: theta, 2.0: theta}, bins=3)
    >>> found[2.0]['linear/w'].counts.tolist(), found[2.0]['linear/w'].outside
    ([0, 1, 2], 1)
  """
  if bins < 1:
    raise ValueError(f'bins must be at least 1, got {bins}.')
  weights = {name: dict(_weights(theta)) for name, theta in thetas.items()}
  reach: dict[str, float] = {}
  for of_network in weights.values():
    for path, value in of_network.items():
      sizes = np.abs(value[np.isfinite(value) & (value != 0)])
      covered = 0.0
      if sizes.size:
        # Rounded down: a single extreme weight never sets the range.
        covered = float(np.quantile(sizes, _COVERAGE, method='lower'))
      reach[path] = max(reach.get(path, 0.0), min(covered, _LARGEST))
  return {
    name: {
      path: _histogram(value, bins, reach[path] or 1.0)
      for path, value in of_network.items()
    }
    for name, of_network in weights.items()
  }


def _histogram(value: np.ndarray, bins: int, reach: float) -> Histogram:
  # In float32 the width of a range that holds the largest floats overflows.
  finite = value[np.isfinite(value)].astype(np.float64)
  counts, edges = np.histogram(finite, bins=bins, range=(-reach, reach))
  return Histogram(
    counts=counts,
    edges=edges,
    outside=int(finite.size - counts.sum()),
    not_finite=int(value.size - finite.size),
  )


def fraction_near_zero(
  theta: Params,
  epsilons: float | Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
) -> list[Row]:
  """Share of the weights with |θ| ≤ ε, per leaf and over all of them.

  Records with leaf ('total' for all leaves together), epsilon, size
  and near_zero. NaN is not near zero. The share of an empty leaf is NaN.

  Example:
    >>> theta = {'linear': {'w': np.array([[0.0, 0.001], [-0.02, 1.0]])}}
    >>> fraction_near_zero(theta, 0.01)[0]
    {'leaf': 'linear/w', 'epsilon': 0.01, 'size': 4, 'near_zero': 0.5}
  """
  thresholds = np.atleast_1d(np.asarray(epsilons, np.float64)).tolist()
  for epsilon in thresholds:
    if not epsilon >= 0:
      raise ValueError(f'epsilon must be at least 0, got {epsilon}.')
  sizes: dict[str, int] = {}
  counts: dict[str, np.ndarray] = {}
  for path, value in _weights(theta):
    magnitudes = np.abs(value)
    sizes[path] = value.size
    counts[path] = np.array(
      [np.count_nonzero(magnitudes <= epsilon) for epsilon in thresholds]
    )
  sizes[TOTAL] = sum(sizes.values())
  counts[TOTAL] = np.sum(list(counts.values()), axis=0)
  return [
    {
      'leaf': path,
      'epsilon': epsilon,
      'size': size,
      'near_zero': _ratio(int(count), size),
    }
    for path, size in sizes.items()
    for epsilon, count in zip(thresholds, counts[path], strict=True)
  ]


def mask_overlap(
  theta_before: Any,
  theta_after: Any,
  sparsities: float | Sequence[float] = (0.05, 0.15, 0.5, 0.8, 0.9, 0.95, 0.98),
) -> list[Row]:
  """How far the largest weights before training are the largest ones after.

  At each sparsity both networks are pruned by magnitude, layer by layer, to the
  same k of n weights, q = k/n, giving the masks a and b:

      agreement     share of positions with a = b; by chance q² + (1-q)²
      intersection  |a ∧ b| / k, share of kept weights in both; by chance q

  Agreement counts weights that both masks remove, so it is high at high
  sparsity whatever happens; intersection is not.

  Returns:
    Records with the keys leaf ('total' for all leaves together: their
    positions and kept weights are pooled), sparsity, agreement, intersection,
    density (the q that was reached), agreement_by_chance and
    intersection_by_chance.

  Example:
    >>> before = {'linear': {'w': np.array([[1.0, 2.0], [3.0, 4.0]])}}
    >>> after = {'linear': {'w': np.array([[1.0, 4.0], [2.0, -9.0]])}}
    >>> record = mask_overlap(before, after, 0.5)[0]
    >>> record['agreement'], record['intersection'], record['density']
    (0.5, 0.5, 0.5)

  Source:
    The question is that of Schwarz et al., Powerpropagation, 2021, on the
    overlap of masks before and after training; agreement is the measure of
    which reproduced values are known.
  """
  before, after = dict(_weights(theta_before)), dict(_weights(theta_after))
  _check_same(before, after)
  records = []
  for sparsity in np.atleast_1d(np.asarray(sparsities, np.float64)).tolist():
    kept = {
      path: masks_lib.num_kept(value.size, sparsity)
      for path, value in before.items()
    }
    found = masks_lib.overlap(_largest(before, kept), _largest(after, kept))
    for path, overlap in {**found.leaves, TOTAL: found.total}.items():
      within = before if path == TOTAL else [path]
      records.append(
        {
          'leaf': path,
          'sparsity': sparsity,
          'agreement': float(overlap.agreement),
          'intersection': float(overlap.intersection),
          **_by_chance([(before[p].size, kept[p]) for p in within]),
        }
      )
  return records


def _largest(
  theta: Mapping[str, np.ndarray], kept: Mapping[str, int]
) -> dict[str, jax.Array]:
  """Masks of the largest |θ|, so many in each leaf."""
  return {
    path: topk.top_k_mask(np.abs(value).astype(np.float32), kept[path])
    for path, value in theta.items()
  }


def _by_chance(leaves: Sequence[tuple[int, int]]) -> Row:
  """Density, and the overlap of independent masks: (size, kept) of leaves."""
  size = sum(n for n, _ in leaves)
  kept = sum(k for _, k in leaves)
  common = sum(k * k / n for n, k in leaves if n)
  neither = sum((n - k) ** 2 / n for n, k in leaves if n)
  return {
    'density': _ratio(kept, size),
    'agreement_by_chance': _ratio(common + neither, size),
    'intersection_by_chance': _ratio(common, kept),
  }


def _check_same(
  before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> None:
  shapes_before = {path: value.shape for path, value in before.items()}
  shapes_after = {path: value.shape for path, value in after.items()}
  if shapes_before != shapes_after:
    raise ValueError(
      'the networks must have the same leaves and shapes, got '
      f'{shapes_before} before and {shapes_after} after.'
    )


def _weights(tree: Tree) -> Iterator[tuple[str, np.ndarray]]:
  """Name and value, on the host and at least in float32, of weights."""
  chosen = set(select_lib.selected_names(select_lib.is_weight, tree))
  for leaf in trees.named_leaves(tree):
    if leaf.path in chosen:
      value = np.asarray(leaf.value)
      yield leaf.path, value.astype(np.promote_types(_numpy(value), np.float32))


def _numpy(value: np.ndarray) -> Any:
  # bfloat16 is a dtype that NumPy's promotion rules do not know.
  return value.dtype if value.dtype.kind == 'f' else np.float32


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else float('nan')
