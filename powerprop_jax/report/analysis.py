"""What training did to the weights: histograms, mass near zero, mask overlap.

Everything here reads parameters that were fetched to the host, and works in
NumPy. Results are flat records, ready for results.json, except histograms.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import topk, trees
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.files.tables import Row

Range = tuple[float, float]

# The name under which the selected leaves together are reported.
TOTAL = 'total'
_LARGEST = float(np.finfo(np.float32).max)


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


def weight_histogram(
  theta: Params,
  *,
  bins: int = 101,
  range: Range | Mapping[str, Range] | None = None,
  select: Select = select_lib.is_weight,
) -> dict[str, Histogram]:
  """Histogram of each selected leaf, by its name 'module/name'.

  Args:
    bins: number of bins of equal width; odd, so that zero lies in the middle
      of one when the range is symmetric.
    range: (lowest, highest) for all leaves, or one for each leaf name, as
      common_range gives; by default that of this tree alone, which outliers
      do not stretch.

  Example:
    >>> theta = {'linear': {'w': np.array([[-0.5, 0.1], [0.2, 9.0]])}}
    >>> found = weight_histogram(theta, bins=2, range=(-1, 1))['linear/w']
    >>> found.counts.tolist(), found.outside
    ([1, 2], 1)
  """
  if bins < 1:
    raise ValueError(f'bins must be at least 1, got {bins}.')
  if range is None:
    range = common_range([theta], select=select)
  histograms = {}
  for path, value in _selected(theta, select):
    lowest, highest = _range_of(path, range)
    # In float32 the width of a range that holds the largest floats overflows.
    finite = value[np.isfinite(value)].astype(np.float64)
    counts, edges = np.histogram(finite, bins=bins, range=(lowest, highest))
    histograms[path] = Histogram(
      counts=counts,
      edges=edges,
      outside=int(finite.size - counts.sum()),
      not_finite=int(value.size - finite.size),
    )
  return histograms


def weight_histograms(
  thetas: Mapping[float, Any],
  *,
  bins: int = 101,
  select: Select = select_lib.is_weight,
) -> dict[float, dict[str, Histogram]]:
  """For each α, weight_histogram over bins that all networks share.

  Args:
    thetas: effective parameters by α (or by anything else that tells the
      networks apart); all with the same leaves.

  Example:
    >>> theta = {'linear': {'w': np.array([[-0.5, 0.1], [0.2, 0.4]])}}
    >>> found = weight_histograms({1.0: theta, 2.0: theta}, bins=3)
    >>> found[2.0]['linear/w'].counts.tolist()
    [0, 1, 2]
  """
  ranges = common_range(thetas.values(), select=select)
  return {
    alpha: weight_histogram(theta, bins=bins, range=ranges, select=select)
    for alpha, theta in thetas.items()
  }


def common_range(
  thetas: Iterable[Any],
  *,
  coverage: float = 0.999,
  select: Select = select_lib.is_weight,
) -> dict[str, Range]:
  """Symmetric range of each leaf that holds nearly all weights of every tree.

  (-r, r) for each selected leaf by its name, r at most the largest float32. A
  leaf without a finite weight other than zero gets (-1, 1).

  Args:
    coverage: share of a leaf's weights that lie within the range, in (0, 1];
      in each network, not only on average. Only weights that are finite and
      not zero are asked, and the count is rounded down: below 1, a single
      extreme weight never sets the range.

  Example:
    >>> common_range([{'linear': {'w': np.array([[-2.0, 1.0]])}}], coverage=1)
    {'linear/w': (-2.0, 2.0)}
  """
  if not 0 < coverage <= 1:
    raise ValueError(f'coverage must be in (0, 1], got {coverage}.')
  reach: dict[str, float] = {}
  for theta in thetas:
    for path, value in _selected(theta, select):
      sizes = np.abs(value[np.isfinite(value) & (value != 0)])
      covered = 0.0
      if sizes.size:
        covered = float(np.quantile(sizes, coverage, method='lower'))
      reach[path] = max(reach.get(path, 0.0), min(covered, _LARGEST))
  return {path: (-(r or 1.0), r or 1.0) for path, r in reach.items()}


def fraction_near_zero(
  theta: Params,
  epsilons: float | Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
  *,
  select: Select = select_lib.is_weight,
) -> list[Row]:
  """Share of the weights with |θ| ≤ ε, per selected leaf and over all of them.

  Records with leaf ('total' for all selected leaves together), epsilon, size
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
  for path, value in _selected(theta, select):
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
  *,
  select: Select = select_lib.is_weight,
) -> list[Row]:
  """How far the largest weights before training are the largest ones after.

  At each sparsity both networks are pruned by magnitude, layer by layer, to the
  same k of n weights, q = k/n, giving the masks a and b:

    agreement     share of positions with a = b; by chance q² + (1-q)²
    intersection  |a ∧ b| / k, the share of kept weights in common; by chance q

  Agreement counts weights that both masks remove, so it is high at high
  sparsity whatever happens; intersection is not.

  Returns:
    Records with the keys leaf ('total' for all selected leaves together: their
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
  before = dict(_selected(theta_before, select))
  after = dict(_selected(theta_after, select))
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


def _selected(tree: Tree, select: Select) -> Iterator[tuple[str, np.ndarray]]:
  """Name and value, on the host and at least in float32, of chosen leaves."""
  chosen = set(select_lib.selected_names(select, tree))
  for leaf in trees.named_leaves(tree):
    if leaf.path in chosen:
      value = np.asarray(leaf.value)
      yield leaf.path, value.astype(np.promote_types(_numpy(value), np.float32))


def _numpy(value: np.ndarray) -> Any:
  # bfloat16 is a dtype that NumPy's promotion rules do not know.
  return value.dtype if value.dtype.kind == 'f' else np.float32


def _range_of(path: str, range: Range | Mapping[str, Range]) -> Range:
  if isinstance(range, Mapping):
    if path not in range:
      raise ValueError(
        f'range has no entry for {path}; it has {", ".join(range)}.'
      )
    range = range[path]
  lowest, highest = range
  if not lowest < highest:
    raise ValueError(
      f'range must go from a lower to a higher number, got {range} for {path}.'
    )
  return lowest, highest


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else float('nan')
