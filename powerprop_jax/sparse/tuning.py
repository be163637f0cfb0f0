"""Which leaves are worth condensing: whole functions, measured.

    tuned = tune(fn, masks, theta, x)
    print(tuned)
    run = without_zeros(fn, masks, theta, x, execution=tuned.leaves)

A layer that is faster without its zeros by itself may not be so in a network,
where it shares caches and layouts with others.
"""

from collections.abc import Callable
import random
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Params
from powerprop_jax.files import tables
from powerprop_jax.sparse import network

# Leaves of at most these densities are condensed together.
_DENSITIES = (0.05, 0.1, 0.2, 0.4)


class Tuned(NamedTuple):
  """What tune found.

  Attributes:
    leaves: the names of those that are best condensed.
    seconds: of each choice that was run, the median.
  """

  leaves: tuple[str, ...]
  seconds: dict[str, float]

  def __str__(self) -> str:
    dense = self.seconds['dense']
    return tables.text_table(
      [
        {
          'condensed': name,
          'ms': f'{1e3 * seconds:.3g}',
          'times as fast as dense': f'{dense / seconds:.3g}',
        }
        for name, seconds in self.seconds.items()
      ]
    )


def tune(
  fn: Callable[..., Any],
  masks: Masks,
  theta: Params,
  *args: Any,
  backward: bool = True,
  repeats: int = 5,
) -> Tuned:
  """Runs a function with several choices of condensed leaves, in turns.

  The choices are none, all, those that 'auto' takes, and those of at most some
  density. Each is compiled, which takes as long as it does for the function.

  Args:
    fn: of (theta, *args), as for without_zeros.
    masks: concrete, like theta.
    theta: weights.
    *args: what fn is given besides; numbers of the size that it will have.
    backward: whether the gradient of θ counts too, as in training.
    repeats: runs of each choice, at least 1.

  Example:
    >>> fn = lambda theta, x: x @ theta['w']
    >>> theta = {'w': jnp.arange(4.).reshape(2, 2)}
    >>> masks = {'w': jnp.array([[False, True], [False, True]])}
    >>> tuned = tune(fn, masks, theta, jnp.ones((1, 2)))
    >>> list(tuned.seconds)
    ['dense', 'condensed']
    >>> run = network.without_zeros(
    ...   fn, masks, theta, jnp.ones((1, 2)), execution=tuned.leaves)
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, got {repeats}.')
  choices = _choices(fn, masks, theta, *args)
  runs = {
    name: _run(fn, masks, theta, args, leaves, backward)
    for name, leaves in choices.items()
  }
  found: dict[str, list[float]] = {name: [] for name in runs}
  order = random.Random(0)
  for repeat in range(repeats + 1):
    for name in order.sample(list(runs), len(runs)):
      start = time.perf_counter()
      jax.block_until_ready(runs[name]())
      if repeat:  # The first one compiles.
        found[name].append(time.perf_counter() - start)
  seconds = {name: statistics.median(times) for name, times in found.items()}
  best = min(seconds, key=lambda name: seconds[name])
  return Tuned(choices[best], seconds)


def _choices(
  fn: Callable[..., Any], masks: Masks, theta: Params, *args: Any
) -> dict[str, tuple[str, ...]]:
  """Names of choices, and the leaves that each condenses: no two the same."""

  def condensed(execution: network.Execution) -> list[str]:
    run = network.without_zeros(fn, masks, theta, *args, execution=execution)
    densities = {
      name: leaf.connections / leaf.entries
      for name, leaf in run.leaves.items()
      if leaf.held == 'condensed'
    }
    return sorted(densities, key=lambda name: (densities[name], name))

  all_leaves = condensed('condensed')
  by_path = trees.by_path(masks)
  density = {name: float(jnp.mean(by_path[name])) for name in all_leaves}
  choices = {'dense': [], 'condensed': all_leaves, 'auto': condensed('auto')}
  for most in _DENSITIES:
    few = [name for name in all_leaves if density[name] <= most]
    choices[f'of at most {most:.0%}'] = few
  found: dict[str, tuple[str, ...]] = {}
  for name, leaves in choices.items():
    if tuple(leaves) not in found.values():
      found[name] = tuple(leaves)
  return found


def _run(
  fn: Callable[..., Any],
  masks: Masks,
  theta: Params,
  args: tuple[Any, ...],
  leaves: tuple[str, ...],
  backward: bool,
) -> Callable[[], Any]:
  """A call of the function with these leaves condensed."""
  run = network.without_zeros(fn, masks, theta, *args, execution=leaves)
  thin = trees.by_path(network.condense(theta, masks))
  values = trees.map_leaves(
    lambda leaf: thin[leaf.path] if leaf.path in leaves else leaf.value,
    masks_lib.apply_masks(theta, masks),
  )

  def total(values: Params, *args: Any) -> jax.Array:
    outputs = jax.tree.leaves(run(values, *args))
    return sum(
      (jnp.sum(x) for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)),
      start=jnp.zeros(()),
    )

  compiled = jax.jit(jax.value_and_grad(total) if backward else total)
  return lambda: compiled(values, *args)
