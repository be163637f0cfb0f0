"""Tables: what each layer of a network holds, and tables as text.

A table is a list of rows, a row a flat dict, all with the same keys; values
stay numbers until `text_table` or report/html.py writes them.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Select

Row = dict[str, Any]


def summary(
  theta: Any,
  masks: Any = None,
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


def _masks_of(leaves: Sequence[trees.NamedLeaf], masks: Any) -> list[Any]:
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
  mask: Any,
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
  theta: Any,
  masks: Any = None,
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
  return text_table(
    summary(theta, masks, select=select, alpha=alpha, epsilon=epsilon)
  )


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as plain text: words to the left, numbers to the right.

  Args:
    rows: flat dicts; a key that a row lacks is written like None, as '-'.

  Returns:
    A heading and one line a row, without trailing spaces; '' for no rows.

  Example:
    >>> print(text_table([{'alpha': 1.0, 'net_name': 'mlp'},
    ...                   {'alpha': 1.5, 'net_name': 'lenet_5'}]))
    alpha  net name
      1.0  mlp
      1.5  lenet_5
  """
  columns = []
  for name in column_names(rows):
    values = [row.get(name) for row in rows]
    cells = [name.replace('_', ' '), *format_column(values)]
    width = max(map(len, cells))
    justify = str.rjust if is_numeric(values) else str.ljust
    columns.append([justify(cell, width) for cell in cells])
  lines = zip(*columns, strict=True)
  return '\n'.join('  '.join(line).rstrip() for line in lines)


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Keys of all rows, in the order of first appearance."""
  return list(dict.fromkeys(name for row in rows for name in row))


def is_numeric(values: Sequence[Any]) -> bool:
  """True if a column holds at least one number and nothing but numbers."""
  present = [value for value in values if value is not None]
  return bool(present) and all(_is_number(value) for value in present)


def _is_number(value: Any) -> bool:
  is_bool = isinstance(value, (bool, np.bool_))
  return isinstance(value, (int, float, np.number)) and not is_bool


def format_column(values: Sequence[Any]) -> list[str]:
  """Values of one column as text, floats with the same number of decimals.

  Four significant digits, or an exponent where a column's numbers are too small
  or too large for that to line up; integers with separators; booleans as 'yes'
  and '-'; None as '-'.

  Example:
    >>> format_column([0.9812, 0.5, None, float('nan')])
    ['0.9812', '0.5000', '-', 'nan']
    >>> format_column([266200, True, 'w'])
    ['266,200', 'yes', 'w']
  """
  has_floats = any(map(_is_float, values))
  short = [f'{v:.4g}' for v in values if _is_float(v) and math.isfinite(v)]
  scientific = any('e' in text for text in short)
  decimals = max((len(text.partition('.')[2]) for text in short), default=0)

  def text(value: Any) -> str:
    if value is None:
      return '-'
    if isinstance(value, (bool, np.bool_)):
      return 'yes' if value else '-'
    if has_floats and _is_number(value):
      return f'{value:.4g}' if scientific else f'{value:,.{decimals}f}'
    return f'{value:,}' if _is_number(value) else str(value)

  return [text(value) for value in values]


def _is_float(value: Any) -> bool:
  return isinstance(value, (float, np.floating))
