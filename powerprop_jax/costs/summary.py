"""What each layer of a network holds, as rows of a table."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

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
    theta: effective parameters θ; or latent ones φ, if alpha is given.
    masks: booleans, structure and shapes of theta. Without them a selected
      weight counts as kept if it is not exactly zero.
    select: predicate over (module name, name, value); leaves it does not choose
      count as dense.
    alpha: the power that takes φ to θ in the selected leaves.
    epsilon: a kept weight with |θ| ≤ epsilon is near zero.

  Returns:
    Rows with the keys leaf, shape, size, selected, kept, sparsity, near_zero
    (a share of the kept weights), mean_abs and norm (mean of |θ| and Euclidean
    norm of the kept weights). The last two rows are called 'selected' and
    'total'. A share or mean over no weights is NaN.

  Raises:
    ValueError: if masks do not fit theta, or select chooses nothing.

  Example:
    >>> theta = {'linear': {'w': np.array([[3., 0.], [-4., 0.]])}}
    >>> row = summary(theta)[0]
    >>> row['leaf'], row['kept'], row['sparsity'], row['norm']
    ('linear/w', 2, 0.5, 5.0)
  """
  chosen = select_lib.selected_names(select, theta)
  leaves = list(trees.named_leaves(theta))
  kept_masks = _masks_of(leaves, masks)
  parts = [
    _measure(leaf, mask, leaf.path in chosen, alpha, epsilon)
    for leaf, mask in zip(leaves, kept_masks, strict=True)
  ]
  rows = [
    _row(leaf.path, _shape(leaf.value.shape), leaf.path in chosen, part)
    for leaf, part in zip(leaves, parts, strict=True)
  ]
  of_selected = [
    part
    for leaf, part in zip(leaves, parts, strict=True)
    if leaf.path in chosen
  ]
  rows.append(_row('selected', '', True, _add(of_selected)))
  rows.append(_row('total', '', None, _add(parts)))
  return rows


def _masks_of(leaves: Sequence[trees.NamedLeaf], masks: Tree) -> list[Any]:
  if masks is None:
    return [None] * len(leaves)
  found = {
    leaf.path: np.asarray(leaf.value) for leaf in trees.named_leaves(masks)
  }
  if list(found) != [leaf.path for leaf in leaves]:
    raise ValueError(
      'masks must have the structure of theta; theta has the leaves '
      f'{[leaf.path for leaf in leaves]}, masks has {list(found)}.'
    )
  for leaf in leaves:
    if found[leaf.path].shape != leaf.value.shape:
      raise ValueError(
        f'the mask of {leaf.path} has shape {found[leaf.path].shape}, the '
        f'leaf has {leaf.value.shape}.'
      )
  return list(found.values())


# Sums that add up over leaves: size, kept, near zero, Σ|θ|, Σθ².
_Sums = tuple[int, int, int, float, float]


def _measure(
  leaf: trees.NamedLeaf,
  mask: Tree,
  selected: bool,
  alpha: float | None,
  epsilon: float,
) -> _Sums:
  value = leaf.value
  if selected and alpha is not None:
    value = reparam.psi(value, alpha)
  value = np.asarray(value).astype(np.float64)
  if mask is None:
    mask = value != 0 if selected else np.ones(value.shape, bool)
  magnitudes = np.abs(value[mask])
  near_zero = int(np.count_nonzero(magnitudes <= epsilon))
  return (
    value.size,
    magnitudes.size,
    near_zero,
    float(magnitudes.sum()),
    float(np.square(magnitudes).sum()),
  )


def _add(parts: Sequence[_Sums]) -> _Sums:
  nothing: _Sums = (0, 0, 0, 0.0, 0.0)
  sizes, kept, near_zero, magnitudes, squares = zip(
    nothing, *parts, strict=True
  )
  return sum(sizes), sum(kept), sum(near_zero), sum(magnitudes), sum(squares)


def _row(name: str, shape: str, selected: bool | None, sums: _Sums) -> Row:
  size, kept, near_zero, total, squares = sums
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


def _shape(shape: tuple[int, ...]) -> str:
  return '×'.join(map(str, shape)) or 'scalar'


def summary_table(
  theta: Params,
  masks: Tree = None,
  *,
  select: Select = select_lib.is_weight,
  alpha: float | None = None,
  epsilon: float = 1e-3,
) -> str:
  """The rows of `summary` as aligned plain text; the same arguments.

  Example:
    >>> theta = {'linear': {'w': np.array([[3., 0.], [-4., 0.]])}}
    >>> print(summary_table(theta))
    leaf      shape  selected  size  kept  sparsity  near zero  mean abs  norm
    linear/w  2×2    yes          4     2       0.5          0       3.5     5
    selected         yes          4     2       0.5          0       3.5     5
    total            -            4     2       0.5          0       3.5     5
  """
  return tables.text_table(
    summary(theta, masks, select=select, alpha=alpha, epsilon=epsilon)
  )
