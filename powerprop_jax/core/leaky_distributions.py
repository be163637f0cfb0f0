"""Three distributions as their authors wrote them, which lose connections.

As distributions.equal_per_filter, equal_per_layer and erk, except that a layer
which is given more connections than it has weights is dense, and what it cannot
take is not shared out again. Where that happens the network is sparser than was
asked for. They are here to compare with published numbers; use those of
distributions for anything else. As there, only shapes matter.

Source:
  Price & Tanner, Dense for the price of sparse, 2021, the authors' code
  (https://arxiv.org/abs/2102.07655).
"""

from collections.abc import Mapping
from fractions import Fraction
import math

from powerprop_jax.core import masks, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Select


def equal_per_filter(
  theta: Params, sparsity: float, *, select: Select = select_lib.is_weight
) -> dict[str, float]:
  """min(n, F T / ΣF) connections for n weights in F filters.

  Args:
    theta: parameters, or their shapes; F is the last dimension of a leaf.
    sparsity: share of zeros asked for, in [0, 1); T = (1 - sparsity) Σn.
    select: which leaves take part.

  Returns:
    Sparsity of each selected leaf, keyed 'module/name'.

  Raises:
    ValueError: if the sparsity is outside [0, 1) or nothing is selected.

  Example:
    >>> import numpy as np
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((2, 4))}}
    >>> equal_per_filter(theta, 0.5)  # 24 + 8 connections, not 36
    {'a/w': 0.625, 'b/w': 0.0}
  """
  shapes = _shapes(theta, select)
  filters = {name: shape[-1] if shape else 1 for name, shape in shapes.items()}
  return _in_proportion(filters, shapes, sparsity)


def equal_per_layer(
  theta: Params,
  sparsity: float,
  *,
  select: Select = select_lib.is_weight,
  last: str = 'logits',
) -> dict[str, float]:
  """min(n, T / L) connections in each of L layers; the last takes the rest.

  Args:
    theta: parameters, or their shapes.
    sparsity: share of zeros asked for, in [0, 1); T = (1 - sparsity) Σn.
    select: which leaves take part.
    last: pattern of the last layer, which the order of a tree does not tell: a
      regular expression that is found in one 'module/name'.

  Returns:
    Sparsity of each selected leaf, keyed 'module/name'.

  Raises:
    ValueError: if the sparsity is outside [0, 1), nothing is selected, or the
      pattern does not match exactly one of the selected leaves.

  Example:
    >>> import numpy as np
    >>> theta = {'a': {'w': np.ones((1, 4))}, 'b': {'w': np.ones((7, 8))},
    ...          'logits': {'w': np.ones((2, 8))}}
    >>> equal_per_layer(theta, 0.5)  # 4 + 38 / 3 + 16, for 38
    {'a/w': 0.0, 'b/w': 0.7738095238095238, 'logits/w': 0.0}
  """
  shapes = _shapes(theta, select)
  pattern = select_lib.compile_pattern(last)
  found = [name for name in shapes if pattern.search(name)]
  if len(found) != 1:
    raise ValueError(
      f'last={last!r} must match one of the selected leaves, got '
      f'{", ".join(found) or "none"} of {", ".join(shapes)}. Name the output '
      'layer.'
    )
  sizes = {name: Fraction(math.prod(shape)) for name, shape in shapes.items()}
  share = _budget(shapes, sparsity) / len(shapes)
  kept = {name: min(size, share) for name, size in sizes.items()}
  kept[found[0]] += share * len(shapes) - sum(kept.values())
  return _sparsities(kept, shapes)


def erk(
  theta: Params, sparsity: float, *, select: Select = select_lib.is_weight
) -> dict[str, float]:
  """min(n, D T / ΣD) connections for n weights with dimensions of sum D.

  Args:
    theta: parameters, or their shapes.
    sparsity: share of zeros asked for, in [0, 1); T = (1 - sparsity) Σn.
    select: which leaves take part.

  Returns:
    Sparsity of each selected leaf, keyed 'module/name'.

  Raises:
    ValueError: if the sparsity is outside [0, 1) or nothing is selected.

  Example:
    >>> import numpy as np
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((2, 2))}}
    >>> erk(theta, 0.5)  # 27.2 + 4 connections, not 34
    {'a/w': 0.575, 'b/w': 0.0}
  """
  shapes = _shapes(theta, select)
  dims = {name: sum(shape) or 1 for name, shape in shapes.items()}
  return _in_proportion(dims, shapes, sparsity)


def _shapes(theta: Params, select: Select) -> dict[str, tuple[int, ...]]:
  names = select_lib.selected_names(select, theta)
  leaves = {leaf.path: leaf.value for leaf in trees.named_leaves(theta)}
  return {name: tuple(leaves[name].shape) for name in names}


def _budget(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> Fraction:
  masks.check_sparsity(sparsity)
  total = sum(math.prod(shape) for shape in shapes.values())
  return (1 - Fraction(str(sparsity))) * total


def _in_proportion(
  parts: Mapping[str, int],
  shapes: Mapping[str, tuple[int, ...]],
  sparsity: float,
) -> dict[str, float]:
  each = _budget(shapes, sparsity) / max(sum(parts.values()), 1)
  return _sparsities({name: each * n for name, n in parts.items()}, shapes)


def _sparsities(
  kept: Mapping[str, Fraction], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
  """Sparsities of layers that keep so many, or all if they have fewer."""
  below_one = math.nextafter(1.0, 0.0)
  sparsities = {}
  for name, number in kept.items():
    share = Fraction(number) / max(math.prod(shapes[name]), 1)
    sparsities[name] = min(float(1 - min(share, Fraction(1))), below_one)
  return sparsities
