"""How a sparsity for a whole network is shared out between its layers.

    distribution(theta, sparsity, select=..., overrides=...)
      -> {'module/name': sparsity}, such as erk(theta, 0.9)

Together the selected leaves have the given sparsity, to the last weight: counts
rounds them together. A distribution is a density, up to a factor, for
each shape of a leaf. A leaf whose density would exceed 1 is dense, and the rest
is solved again. Only shapes matter, so jax.ShapeDtypeStruct leaves do as well
as arrays.

What is an input, an output or a layer of a stack, the names of the leaves say,
or axes, {'module/name': Axes} as pp.leaf_axes finds them: a stack of
layers gets the sparsity that its layers would get alone.

A leaf may be fixed by an override, {pattern: sparsity}; patterns are regular
expressions searched for in 'module/name', and the first match counts. The
others then make up for it: fixing the last layer at a low sparsity makes the
rest sparser. A sparsity outside [0, 1), a pattern that matches nothing, a
select that chooses nothing, and overrides that leave no way to reach the
sparsity are refused with a ValueError.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
import math
from typing import Any, Protocol, TypeAlias

import jax

from powerprop_jax.core import layouts, masks
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.layouts import Layout, LeafAxes
from powerprop_jax.core.trees import Params, Select

# One for all selected leaves together, or {'module/name': sparsity}.
Sparsity: TypeAlias = float | Mapping[str, float]
# Sparsities by pattern: the first pattern found in 'module/name' counts.
Overrides: TypeAlias = Mapping[str, float]


class Distribution(Protocol):
  """Shares a sparsity out between layers, as uniform, er and erk do."""

  def __call__(
    self, theta: Params, sparsity: float, *, select: Select
  ) -> Mapping[str, float]:
    """{'module/name': sparsity} of every selected leaf."""


class Shares(dict[str, float]):
  """Sparsity of each leaf, as a part of one sparsity of them all.

  Attributes:
    counts: how many weights each leaf keeps, together as many as the sparsity
      of them all says.
  """

  counts: dict[str, int]


def _plain(names: tuple[str, ...], values: Iterable[Any]) -> Any:
  return dict(zip(names, values, strict=True))


# To JAX a dictionary, which it does not see in a class of its own.
jax.tree_util.register_pytree_with_keys(
  Shares,
  lambda shares: (
    [(jax.tree_util.DictKey(name), shares[name]) for name in sorted(shares)],
    tuple(sorted(shares)),
  ),
  _plain,
)


def counts(
  by_leaf: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, int]:
  """How many weights each leaf keeps, at least 1 of those that have any.

  What a distribution returns is rounded together: the leaves keep
  masks.num_kept of all their weights. In any other mapping of sparsities each
  leaf has the num_kept of its own.

  Example:
    >>> theta = {'a': {'w': np.ones((5, 3))}, 'b': {'w': np.ones((5, 3))}}
    >>> shares, sizes = uniform(theta, 0.9), {'a/w': 15, 'b/w': 15}
    >>> counts(shares, sizes), counts(dict(shares), sizes)
    ({'a/w': 2, 'b/w': 1}, {'a/w': 2, 'b/w': 2})
  """
  if isinstance(by_leaf, Shares):
    return by_leaf.counts
  return {name: masks.num_kept(sizes[name], by_leaf[name]) for name in by_leaf}


def check_by_leaf(by_leaf: Mapping[str, float], names: Iterable[str]) -> None:
  """Refuses sparsities that are not one in [0, 1) for each of these leaves.

  Example:
    >>> check_by_leaf({'a/w': 0.5}, ['a/w', 'b/w'])
    Traceback (most recent call last):
      ...
    ValueError: the sparsities must name exactly the selected leaves (a/w, b/w);
    missing: b/w; not among them: none.
  """
  names = tuple(names)
  missing = [name for name in names if name not in by_leaf]
  unknown = [name for name in by_leaf if name not in names]
  if missing or unknown:
    raise ValueError(
      f'the sparsities must name exactly the selected leaves '
      f'({", ".join(names)}); missing: {", ".join(missing) or "none"}; '
      f'not among them: {", ".join(unknown) or "none"}.'
    )
  for name, sparsity in by_leaf.items():
    masks.check_sparsity(sparsity, f'the sparsity of {name!r}')


class _Overridable(Protocol):
  def __call__(
    self,
    theta: Params,
    sparsity: float,
    *,
    select: Select = ...,
    overrides: Overrides | None = None,
    axes: LeafAxes | None = None,
  ) -> dict[str, float]: ...


def _distribution(
  relative_density: Callable[[Sequence[int]], Fraction],
) -> _Overridable:
  """The distribution with densities in proportion to those of the function."""

  def distribution(
    theta: Params,
    sparsity: float,
    *,
    select: Select = select_lib.is_weight,
    overrides: Overrides | None = None,
    axes: LeafAxes | None = None,
  ) -> dict[str, float]:
    leaves = select_lib.selected(select, theta)
    layers = {
      name: layouts.layout(name, tuple(leaf.shape), axes)
      for name, leaf in leaves.items()
    }
    fixed = match_overrides(tuple(leaves), overrides)
    return _share_out(layers, sparsity, fixed, relative_density)

  # As functools.wraps, but for the signature.
  for attribute in ('__doc__', '__module__', '__name__', '__qualname__'):
    setattr(distribution, attribute, getattr(relative_density, attribute))
  return distribution


@_distribution
def uniform(shape: Sequence[int]) -> Fraction:
  """The same sparsity for every leaf that is not overridden.

  Note:
    RigL keeps the first layer dense and the others at exactly the given
    sparsity, so that the whole is denser. To get that, leave the layer out
    with select.exclude.

  Example:
    >>> theta = {'a': {'w': np.ones((4, 4))}, 'b': {'w': np.ones((2, 2))}}
    >>> uniform(theta, 0.75)
    {'a/w': 0.75, 'b/w': 0.75}
    >>> uniform(theta, 0.75, overrides={'^b/': 0.0})
    {'a/w': 0.9375, 'b/w': 0.0}
  """
  del shape
  return Fraction(1)


@_distribution
def er(shape: Sequence[int]) -> Fraction:
  """Erdős–Rényi: density ∝ (n_in + n_out) / (n_in n_out).

  The number of connections of a layer grows with its number of units, not with
  their product, so large layers become sparser than small ones. n_in and n_out
  are the last two dimensions of a leaf: the spatial size of a convolution plays
  no part.

  Example:
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((8, 2))}}
    >>> er(theta, 0.675)  # keeps 26 of 80, shared out as 8 + 8 to 8 + 2
    {'a/w': 0.75, 'b/w': 0.375}

  Source:
    Mocanu et al., Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science, 2018
    (https://arxiv.org/abs/1707.04780); see also erk.
  """
  return _sum_over_product(shape[-2:])


@_distribution
def erk(shape: Sequence[int]) -> Fraction:
  """Erdős–Rényi kernel: density ∝ (sum of dimensions) / (product of them).

  For a linear layer this is er; for a convolution the spatial dimensions count
  as well: (n_in + n_out + w + h) / (n_in n_out w h).

  Note:
    The budget here is exactly (1 - sparsity) of all weights; see counts.
    RigL's code rounds it up to a whole number layer by layer (less than one
    weight a layer), and takes layers with a given sparsity out of the budget;
    here they count, so that the network as a whole has the sparsity.

  Example:
    >>> theta = {'conv': {'w': np.ones((3, 3, 2, 4))},
    ...          'fc': {'w': np.ones((4, 4))}}
    >>> erk(theta, 0.5)  # fc is dense; conv has the other 28 of 44
    {'conv/w': 0.6111111111111112, 'fc/w': 0.0}

  Source:
    Evci et al., Rigging the lottery, 2020, section 3(1)
    (https://arxiv.org/abs/1911.11134).
  """
  return _sum_over_product(shape)


@_distribution
def equal_per_filter(shape: Sequence[int]) -> Fraction:
  """The same number of connections for every filter (EPF).

  A layer with F filters or units, the last dimension of a leaf, has a number of
  connections in proportion to F: density ∝ F / n for n weights. This is about
  totals per layer; where they lie inside it is up to what draws the masks.

  Note:
    The authors' code does not solve again, so that it keeps fewer connections
    when a layer is full.

  Example:
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((8, 2))}}
    >>> equal_per_filter(theta, 0.75)  # 2 for each of the 10 filters
    {'a/w': 0.75, 'b/w': 0.75}
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((2, 4))}}
    >>> equal_per_filter(theta, 0.5)  # b is dense; a has the other 28 of 36
    {'a/w': 0.5625, 'b/w': 0.0}

  Source:
    Price & Tanner, Dense for the price of sparse, 2021, the authors' code
    (https://arxiv.org/abs/2102.07655).
  """
  return Fraction(shape[-1] if shape else 1, math.prod(shape))


@_distribution
def equal_per_layer(shape: Sequence[int]) -> Fraction:
  """The same number of connections for every layer (EPL), density ∝ 1 / n.

  Note:
    The authors' code hands all that full layers leave over to the last layer,
    where it is lost if that is full as well.

  Example:
    >>> theta = {'a': {'w': np.ones((8, 8))}, 'b': {'w': np.ones((8, 2))}}
    >>> equal_per_layer(theta, 0.75)  # 10 of 64 and 10 of 16
    {'a/w': 0.84375, 'b/w': 0.375}

  Source:
    As for equal_per_filter.
  """
  return Fraction(1, math.prod(shape))


def match_overrides(
  names: Sequence[str], overrides: Overrides | None
) -> dict[str, float]:
  """The sparsity that overrides give to each leaf they match, in their order.

  Example:
    >>> match_overrides(['linear_0/w', 'linear_1/w'], {'_1/': 0.5})
    {'linear_1/w': 0.5}
  """
  overrides = overrides or {}
  patterns = {p: select_lib.compile_pattern(p) for p in overrides}
  for text, pattern in patterns.items():
    masks.check_sparsity(overrides[text], f'the override for {text!r}')
    if not any(pattern.search(name) for name in names):
      raise ValueError(
        f'the override pattern {text!r} matches none of the selected leaves: '
        + (', '.join(names) or '(there are none)')
        + '.'
      )
  matched = {}
  for name in names:
    found = next((t for t, p in patterns.items() if p.search(name)), None)
    if found is not None:
      matched[name] = float(overrides[found])
  return matched


def _share_out(
  layers: Mapping[str, Layout],
  sparsity: float,
  fixed: Mapping[str, float],
  relative_density: Callable[[Sequence[int]], Fraction],
) -> Shares:
  """Densities ε · relative_density(layer), at most 1, that meet the budget.

  In fractions, so that 0.9 comes back as 0.9 and no tolerance is needed.
  """
  masks.check_sparsity(sparsity)
  sizes = {name: math.prod(layer.stored) for name, layer in layers.items()}
  target = 1 - _exact(sparsity)
  density = {
    name: 1 - _exact(fixed[name]) if name in fixed else target for name in sizes
  }
  free = [name for name in sizes if name not in fixed and sizes[name]]
  budget = target * sum(sizes.values()) - sum(
    density[name] * sizes[name] for name in fixed
  )
  _check_budget(budget, sum(sizes[name] for name in free), sparsity, fixed)

  while free:
    raw = {
      name: relative_density(layers[name].axes.layer(layers[name].stored))
      for name in free
    }
    epsilon = budget / sum(raw[name] * sizes[name] for name in free)
    # Making these dense raises ε for the others, so none of them comes back.
    dense = [name for name in free if epsilon * raw[name] > 1]
    if not dense:
      density.update({name: epsilon * raw[name] for name in free})
      break
    density.update(dict.fromkeys(dense, Fraction(1)))
    budget -= sum(sizes[name] for name in dense)
    free = [name for name in free if name not in dense]

  # A density below one in 2^53 would round to the sparsity 1, which is none.
  below_one = math.nextafter(1.0, 0.0)
  shares = Shares(
    {name: min(float(1 - density[name]), below_one) for name in sizes}
  )
  given = {name: masks.num_kept(sizes[name], fixed[name]) for name in fixed}
  exact = {
    name: density[name] * sizes[name] for name in sizes if name not in given
  }
  total = masks.num_kept(sum(sizes.values()), sparsity) - sum(given.values())
  rounded = _rounded(exact, total, sizes)
  shares.counts = {name: (given | rounded)[name] for name in sizes}
  return shares


def _rounded(
  exact: Mapping[str, Fraction], total: int, sizes: Mapping[str, int]
) -> dict[str, int]:
  """Whole numbers near to exact, at least 1, that sum to total if they can.

  Rounded down, and then up where most was lost.
  """
  counts = {
    name: max(math.floor(value), min(1, sizes[name]))
    for name, value in exact.items()
  }
  lost = lambda name: exact[name] - counts[name]
  while (missing := total - sum(counts.values())) != 0:
    step = 1 if missing > 0 else -1
    free = [n for n in counts if 1 <= counts[n] + step <= sizes[n]]
    if not free:
      break
    counts[(max if missing > 0 else min)(free, key=lost)] += step
  return counts


def _sum_over_product(shape: Sequence[int]) -> Fraction:
  return Fraction(sum(shape), math.prod(shape)) if shape else Fraction(1)


def _exact(sparsity: float) -> Fraction:
  """The decimal a person wrote, not its nearest binary number."""
  return Fraction(str(sparsity))


def _check_budget(
  budget: Fraction,
  room: int,
  sparsity: float,
  fixed: Mapping[str, float],
) -> None:
  """Refuses overrides after which no densities in (0, 1] meet the budget."""
  if not fixed or 0 < budget <= room:
    return
  if room == 0:
    # Less than one weight apart: sparsity is the total, as near as a float is.
    if abs(budget) < 1:
      return
    problem = 'they fix every leaf, at another total'
  elif budget <= 0:
    problem = 'they keep too many weights, so that none is left for the others'
  else:
    problem = 'they keep too few weights, even if all others are dense'
  given = ', '.join(f'{name}: {value:g}' for name, value in fixed.items())
  raise ValueError(
    f'sparsity {sparsity} cannot be reached with the overrides ({given}): '
    f'{problem}. Change the sparsity or the overrides.'
  )
