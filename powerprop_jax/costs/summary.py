"""What each layer of a network holds, as rows of a table."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row


def summary(
  theta: Params,
  masks: Tree = None,
  *,
  select: Select = select_lib.is_weight,
  alpha: float | None = None,
  epsilon: float = 1e-3,
) -> list[Row]:
  """One row per leaf of a network, then its selected weights and all together.

  Args:
    theta: effective parameters θ; or latent ones φ, if alpha is given. Leaves
      that are not selected count as dense.
    masks: without them a selected weight counts as kept if it is not exactly
      zero.
    epsilon: a kept weight with |θ| ≤ epsilon is near zero.

  Returns:
    Rows with the keys leaf, shape, size, selected, kept, sparsity, near_zero
    (a share of the kept weights), mean_abs and norm (mean of |θ| and Euclidean
    norm of the kept weights). The last two rows are called 'selected' and
    'total'. A share or mean over no weights is NaN.

  Example:
    >>> theta = {'linear': {'w': np.array([[3., 0.], [-4., 0.]])}}
    >>> row = summary(theta)[0]
    >>> row['leaf'], row['kept'], row['sparsity'], row['norm']
    ('linear/w', 2, 0.5, 5.0)
  """
  trees.check_arrays(theta, 'theta')
  chosen = select_lib.selected_names(select, theta)
  if masks is not None:
    masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  kept = trees.by_path(masks)
  rows, parts, of_selected = [], [], []
  for leaf in trees.named_leaves(theta):
    is_chosen = leaf.path in chosen
    value = leaf.value
    if is_chosen and alpha is not None:
      value = reparam.psi(value, alpha)
    value = np.asarray(value).astype(np.float64)
    mask = kept.get(leaf.path)
    if mask is None:
      mask = value != 0 if is_chosen else np.ones(value.shape, bool)
    magnitudes = np.abs(value[np.asarray(mask)])
    part = (
      value.size,
      magnitudes.size,
      int(np.count_nonzero(magnitudes <= epsilon)),
      float(magnitudes.sum()),
      float(np.square(magnitudes).sum()),
    )
    shape = '×'.join(map(str, leaf.value.shape)) or 'scalar'
    rows.append(_row(leaf.path, shape, is_chosen, [part]))
    parts.append(part)
    if is_chosen:
      of_selected.append(part)
  rows.append(_row('selected', '', True, of_selected))
  rows.append(_row('total', '', None, parts))
  return rows


# Sums that add up over leaves: size, kept, near zero, Σ|θ|, Σθ².
_Sums = tuple[int, int, int, float, float]


def _row(
  name: str, shape: str, selected: bool | None, parts: Sequence[_Sums]
) -> Row:
  nothing: _Sums = (0, 0, 0, 0.0, 0.0)
  size, kept, near_zero, total, squares = (
    sum(column) for column in zip(nothing, *parts, strict=True)
  )
  return {
    'leaf': name,
    'shape': shape,
    'selected': selected,
    'size': size,
    'kept': kept,
    'sparsity': _ratio(size - kept, size),
    'near_zero': _ratio(near_zero, kept),
    'mean_abs': _ratio(total, kept),
    'norm': math.sqrt(squares),
  }


def _ratio(part: float, whole: int) -> float:
  return part / whole if whole else math.nan


def summary_table(
  theta: Params, masks: Tree = None, **options: Any
) -> tables.TextTable:
  """The rows of `summary` as aligned plain text; the same arguments.

  A notebook shows a table.

  Example:
    >>> theta = {'linear': {'w': np.array([[3., 0.], [-4., 0.]])}}
    >>> print(summary_table(theta))
    leaf      shape  selected  size  kept  sparsity  near zero  mean abs  norm
    linear/w  2×2    yes          4     2       0.5          0       3.5     5
    selected         yes          4     2       0.5          0       3.5     5
    total            -            4     2       0.5          0       3.5     5
  """
  return tables.text_table(summary(theta, masks, **options))


def selection_table(select: Select, tree: Tree) -> tables.TextTable:
  """What is selected, what is not, and why: a table, one line a leaf.

  A notebook shows a table.

  Example:
    >>> print(selection_table(select_lib.is_weight, {'linear': {
    ...     'w': np.ones((2, 3)), 'b': np.ones(3)}}))
    selected  leaf      shape  size  why
    -         linear/b  3         3  not called a weight
    yes       linear/w  2×3       6  a weight of Haiku
    1 of 2 leaves selected: 6 of 9 parameters.
  """
  rows = select_lib.selection(select, tree)
  chosen = [row for row in rows if row['selected']]
  size, total = (sum(row['size'] for row in part) for part in (chosen, rows))
  return tables.text_table(
    rows,
    f'{len(chosen)} of {len(rows)} leaves selected: {size:,} of {total:,} '
    'parameters.',
  )
