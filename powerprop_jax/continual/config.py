"""How a task is packed: the settings and what they imply."""

import dataclasses
from typing import Literal, get_args

from powerprop_jax.continual import search as search_lib
from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual.search import How
from powerprop_jax.continual.state import PackState
from powerprop_jax.core import names

Scope = Literal['layer', 'global']
Restart = Literal['redraw', 'zero', 'keep']


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """How a task is packed; may change from one task to the next.

  What belongs to the network for good, init_pack is told.
  """

  # Shares of weights to try for a task, in (0, 1]: of the free ones for
  # PackNet, of all for EfficientPackNet. A single one is a fixed budget.
  densities: tuple[float, ...]
  # γ, share of the dense validation score that a mask must reach, in (0, 1].
  gamma: float = 0.99
  # Densities from dense to sparse ('scan'), or by halving the grid ('bisect').
  search: How = 'scan'
  # Rank the weights of each layer by themselves, or of all together.
  scope: Scope = 'layer'
  # Free weights at the start of a later task: 'redraw' from the initial
  # distribution, 'zero', or 'keep' what training left. Default: 'zero' for
  # PackNet with α = 1, as published, otherwise 'redraw'.
  restart: Restart | None = None
  # A task needs so many free weights to begin.
  min_free: int = 1

  def __post_init__(self) -> None:
    search_lib.grid(self.densities)
    names.check_choice('search', self.search, get_args(How))
    names.check_choice('scope', self.scope, get_args(Scope))
    names.check_choice('restart', self.restart, (*get_args(Restart), None))
    if not 0 < self.gamma <= 1:
      raise ValueError(
        f'gamma must be in (0, 1], got {self.gamma}. It is the share of the '
        'dense validation score that a mask must reach.'
      )
    if self.min_free < 1:
      raise ValueError(f'min_free must be at least 1, got {self.min_free}.')


def equal_density(index: int, num_tasks: int, share: float = 1.0) -> float:
  """Share of the free weights that gives each of T tasks the same number.

  s / (T - s k), for PackNet with densities=(equal_density(k, T),) for task k:
  1/T of all weights are 1/(T-k) of those that k tasks left free.

  Args:
    index: k, the tasks before this one.
    num_tasks: T, more than k.
    share: s, the part of all weights that the T tasks get together, in (0, 1].
      Late tasks of PackNet learned badly where nearly all weights stood still.

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


def restart_rule(config: PackConfig, state: PackState) -> Restart:
  """What config.restart means for the method and α of a network.

  Example:
    >>> restart_rule(PackConfig((0.5,)), packed)   # EfficientPackNet
    'redraw'
  """
  is_powered = any(alpha > 1 for alpha in state_lib.alphas(state.power))
  if config.restart is None:
    zero = state.method == 'packnet' and not is_powered
    return 'zero' if zero else 'redraw'
  if config.restart == 'zero' and is_powered:
    raise ValueError(
      "restart='zero' would start free weights at φ = 0, where "
      'powerpropagation with α > 1 gives them no gradient, so that later tasks '
      "could not use them. Use restart='redraw'."
    )
  return config.restart
