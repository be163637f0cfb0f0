"""How tasks are packed into one network: the settings and what they imply."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, get_args

import jax

from powerprop_jax.continual import search as search_lib
from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual.search import How
from powerprop_jax.continual.state import Layout, Private
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Params, Select

Method = Literal['packnet', 'efficient_packnet']
Scope = Literal['layer', 'global']
Restart = Literal['redraw', 'zero', 'keep']


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """How tasks are packed.

  Attributes:
    method: 'packnet' ranks only the weights the task may move, and the task
      computes with what it keeps and with all that earlier tasks own.
      'efficient_packnet' ranks all shared weights, so that re-use is free, and
      the task computes with what it keeps.
    densities: the grid, shares in (0, 1]: of the free weights for 'packnet', of
      all for 'efficient_packnet'. A single one is a fixed budget.
    gamma: γ in (0, 1], the share of the dense score that must be reached.
    search: 'scan' or 'bisect', see search.sparsest.
    scope: 'layer' ranks and counts per leaf, 'global' all shared ones together.
    restart: free weights at the start of a later task: 'redraw' from the
      initial distribution, 'zero', or 'keep' what training left. None is
      'zero' for 'packnet', as published, unless some α > 1, where zero is a
      critical point; otherwise 'redraw'.
    initialise: key -> θ as the network initialises it, the distribution that
      'redraw' draws from; a function that jax.jit takes. None is a normal one
      with the root mean square that each leaf had at first.
    select: which leaves are shared, heads aside.
    heads: leaves of which each task has its own, which start as they did in
      init_pack; None if one head serves all.
    private: the leaves that are neither, and the network's state: 'freeze'
      after the first task, or 'per_task', where each goes on from those of the
      task before.
    min_free: how many shared weights must be free for a task to begin.
  """

  method: Method
  densities: tuple[float, ...]
  gamma: float = 0.99
  search: How = 'scan'
  scope: Scope = 'layer'
  restart: Restart | None = None
  initialise: Callable[[jax.Array], Any] | None = None
  select: Select = select_lib.is_weight
  heads: Select | None = None
  private: Private = 'freeze'
  min_free: int = 1

  def __post_init__(self) -> None:
    search_lib.grid(self.densities)
    search_lib.check_how(self.search)
    for name, names in (
      ('method', get_args(Method)),
      ('scope', get_args(Scope)),
      ('restart', (*get_args(Restart), None)),
      ('private', get_args(Private)),
    ):
      if (value := getattr(self, name)) not in names:
        raise ValueError(
          f'{name} must be one of {", ".join(map(str, names))}, got {value!r}.'
        )
    if not 0 < self.gamma <= 1:
      raise ValueError(
        f'gamma must be in (0, 1], got {self.gamma}. It is the share of the '
        'dense validation score that a mask must reach.'
      )
    if self.min_free < 1:
      raise ValueError(f'min_free must be at least 1, got {self.min_free}.')


def equal_density(index: int, num_tasks: int, share: float = 1.0) -> float:
  """Share of the free weights that gives each of T tasks the same number.

  For 'packnet', with densities=(equal_density(k, T),) for task k: 1/T of all
  weights are 1/(T-k) of those that k tasks left free.

  Args:
    index: k, the tasks before this one.
    num_tasks: T, more than k.
    share: s, the part of all weights that the T tasks get together, in (0, 1].
      Late tasks of 'packnet' learned badly where nearly all weights stood
      still.

  Returns:
    s / (T - s k).

  Raises:
    ValueError: if index is not in [0, num_tasks) or share not in (0, 1].

  Example:
    >>> [equal_density(k, 4) for k in (0, 2, 3)]
    [0.25, 0.5, 1.0]
    >>> round(equal_density(3, 4, share=0.5), 3)
    0.2

  Note:
    The code of PackNet takes other shares: half of the weights for the first
    task, a quarter of the free ones for the next two, then all that is left.
  """
  if not 0 <= index < num_tasks:
    raise ValueError(
      f'index must be in [0, {num_tasks}), the number of tasks, got {index}.'
    )
  if not 0 < share <= 1:
    raise ValueError(f'share must be in (0, 1], got {share:g}.')
  return share / (num_tasks - share * index)


def layout_of(config: PackConfig, theta: Params) -> Layout:
  """Which leaves are shared, which are heads, and which are neither.

  Args:
    config: the settings.
    theta: parameters.

  Returns:
    A Layout.

  Raises:
    ValueError: if select or heads chooses nothing, or nothing is left to share.

  Example:
    >>> import numpy as np
    >>> config = PackConfig('packnet', (0.5,))
    >>> theta = {'linear': {'w': np.ones((2, 2)), 'b': np.ones(2)}}
    >>> layout_of(config, theta).shared
    ('linear/w',)
  """
  paths = tuple(leaf.path for leaf in trees.named_leaves(theta))
  heads: tuple[str, ...] = ()
  if config.heads is not None:
    heads = select_lib.selected_names(config.heads, theta)
  chosen = select_lib.selected_names(config.select, theta)
  shared = tuple(path for path in chosen if path not in heads)
  if not shared:
    raise ValueError(
      f'every leaf that select chose, {", ".join(chosen)}, is one of the '
      'heads, so that tasks would share nothing. Choose fewer heads.'
    )
  others = tuple(path for path in paths if path not in (*shared, *heads))
  return Layout(shared, heads, others, config.private)


def restart_rule(config: PackConfig, power: Any) -> Restart:
  """What config.restart means for these α.

  Args:
    config: the settings.
    power: α, as in PackState.

  Returns:
    The rule to follow.

  Raises:
    ValueError: if it is 'zero', and some α > 1.

  Example:
    >>> restart_rule(PackConfig('packnet', (0.5,)), power=())
    'zero'
  """
  is_powered = any(alpha > 1 for alpha in state_lib.alphas(power))
  if config.restart is None:
    zero = config.method == 'packnet' and not is_powered
    return 'zero' if zero else 'redraw'
  if config.restart == 'zero' and is_powered:
    raise ValueError(
      "restart='zero' would start free weights at φ = 0, where "
      'powerpropagation with α > 1 gives them no gradient, so that later tasks '
      "could not use them. Use restart='redraw'."
    )
  return config.restart
