"""A network that holds many tasks, and what each task may see of it.

    shared leaves    one array for all tasks; task t computes with θ⊙M^t, and
                     the union of the masks never moves again
    heads            always one for each task
    private leaves   biases, norm parameters: frozen after the first task, or
                     one for each task, the statistics of norms with them

Nothing here trains. All that a task costs is a bit for each shared weight, and
its private leaves.

In the examples `packed` is a network of two weights, 1 and 2, of which the task
'first' keeps the larger.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from powerprop_jax.continual.search import Trial
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.masks import Masks, PackedMask
from powerprop_jax.core.trees import OptState, Params, Select, Tree
from powerprop_jax.optim import powerprop, views
from powerprop_jax.optim.powerprop import PowerState

TaskId: TypeAlias = int | str
PackMethod = Literal['packnet', 'efficient_packnet']
Private = Literal['freeze', 'per_task']
# What the network computes with: (theta, net_state).
Network: TypeAlias = tuple[Params, Tree]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which leaf is what, by 'module/name'; the same for all tasks.

  Attributes:
    shared: leaves that all tasks share, under masks.
    heads: leaves that every task has for itself.
    others: all other leaves.
    private: what is done with the others and with the network's state.
  """

  shared: tuple[str, ...]
  heads: tuple[str, ...]
  others: tuple[str, ...]
  private: Private

  @property
  def stored(self) -> tuple[str, ...]:
    """The leaves that are stored with each task."""
    extra = self.others if self.private == 'per_task' else ()
    return (*self.heads, *extra)


def make_layout(
  theta: Params, select: Select, heads: Select | None, private: Private
) -> Layout:
  """The layout of parameters, where select and heads are as in init_pack.

  Example:
    >>> theta = {'linear': {'w': np.ones((2, 2)), 'b': np.ones(2)}}
    >>> make_layout(theta, select_lib.is_weight, None, 'freeze').shared
    ('linear/w',)
  """
  own = () if heads is None else select_lib.selected_names(heads, theta)
  chosen = select_lib.selected_names(select, theta)
  shared = tuple(path for path in chosen if path not in own)
  if not shared:
    raise ValueError(
      f'every leaf that select chose, {", ".join(chosen)}, is one of the '
      'heads, so that tasks would share nothing. Choose fewer heads.'
    )
  known = {*shared, *own}
  others = tuple(path for path in trees.by_path(theta) if path not in known)
  return Layout(shared, own, others, private)


class TaskReport(NamedTuple):
  """How a task was packed; density, met and trials are of search.Found.

  Attributes:
    task_id: its name.
    dense_score: P, the validation score before pruning.
    density: the density that was kept, of the grid.
    met: whether the score at that density reached γP.
    trials: all evaluations of the search, in their order.
    score: that of the final mask, after retraining if there was any.
    num_kept: |M^t|, shared weights the task computes with.
    num_new: those of them that no earlier task owns.
    num_free: shared weights that no task owns after it.
  """

  task_id: TaskId
  dense_score: float
  density: float
  met: bool
  trials: tuple[Trial, ...]
  score: float
  num_kept: int
  num_new: int
  num_free: int


class PackedTask(NamedTuple):
  """What is stored for a task, on the host.

  Attributes:
    report: how it was packed.
    masks: {'module/name': one bit a weight} of the shared leaves.
    private: {'module/name': latent values} of the leaves it has for itself.
    net_state: its state of the network; None if all tasks use one.
  """

  report: TaskReport
  masks: dict[str, PackedMask]
  private: dict[str, np.ndarray]
  net_state: Tree


@dataclasses.dataclass(frozen=True)
class PackState:
  """A network with the tasks it has learned; never changed in place.

  Attributes:
    tx: the optimiser, from which each task gets a fresh state.
    method: which weights are ranked, and which a task computes with.
    initialise: key -> θ, from which free weights are drawn anew, or None.
    layout: which leaves are shared.
    power: α and the leaves it is for, as powerprop states them; () without.
    phi: latent parameters; shared leaves of all tasks, others of the last.
    net_state: state of the network after the last task, or after the first if
      it is frozen.
    protected: masks like phi, True where no later task may move anything.
    initial: {'module/name': latent values} with which each head starts.
    scale: {'module/name': root mean square} of the shared leaves of θ before
      the first task, from which free weights are drawn anew.
    tasks: the tasks in their order.
  """

  tx: optax.GradientTransformation
  method: PackMethod
  initialise: Callable[[jax.Array], Params] | None
  layout: Layout
  power: OptState
  phi: Params
  net_state: Tree
  protected: Masks
  initial: dict[str, jax.Array]
  scale: dict[str, jax.Array]
  tasks: tuple[PackedTask, ...] = ()

  @property
  def task_ids(self) -> tuple[TaskId, ...]:
    """The names of the tasks in their order."""
    return tuple(task.report.task_id for task in self.tasks)

  @property
  def listed(self) -> str:
    """The same as messages show them."""
    return ', '.join(map(repr, self.task_ids)) or 'none'


class CapacityError(ValueError):
  """No room for another task.

  Attributes:
    task_ids: the tasks that did fit.
  """

  def __init__(self, message: str, task_ids: tuple[TaskId, ...]) -> None:
    super().__init__(message)
    self.task_ids = task_ids


def task_params(state: PackState, task_id: TaskId) -> Network:
  """What the network computes a task with: its own masked weights, no more.

  (theta, net_state) with θ⊙M^t in the shared leaves, the same bits after any
  number of later tasks.

  Example:
    >>> task_params(packed, 'first')[0]['linear']['w']
    Array([[0., 2.]], dtype=float32)
  """
  task = find_task(state, task_id)
  phi = with_leaves(state.phi, task.private)
  net_state = state.net_state if task.net_state is None else task.net_state
  return masked_theta(phi, state.power, task_masks(state, task_id)), net_state


def task_masks(state: PackState, task_id: TaskId) -> Masks:
  """The forward mask M^t of a task, on the host; True outside shared leaves.

  Example:
    >>> task_masks(packed, 'first')['linear']['w']
    array([[False,  True]])
  """
  unpacked = masks_lib.unpack_masks(find_task(state, task_id).masks)
  full = jax.tree.map(lambda p: np.ones(p.shape, bool), state.phi)
  return with_leaves(full, unpacked)


def predict(
  apply: Callable[[Params, Tree, Tree], Tree],
  state: PackState,
  task_id: TaskId,
  x: Tree,
) -> Tree:
  """What the network says to x as an example of a given task.

  The mask is unpacked at every call; for many batches take task_params once.

  Args:
    apply: (theta, net_state, x) -> outputs; jit it once, for all tasks.

  Example:
    >>> apply = lambda theta, net_state, x: x @ theta['linear']['w']
    >>> predict(apply, packed, 'first', np.ones((1, 1)))
    Array([[0., 2.]], dtype=float32)
    >>> predict(apply, packed, 'third', np.ones((1, 1)))
    Traceback (most recent call last):
      ...
    ValueError: there is no task 'third' in this network; it holds 'first'.
  """
  return apply(*task_params(state, task_id), x)


def num_free(state: PackState) -> dict[str, int]:
  """How many weights of each shared leaf no task owns, by 'module/name'.

  Example:
    >>> num_free(packed)
    {'linear/w': 1}
  """
  leaves = trees.by_path(state.protected)
  return {
    path: leaves[path].size - int(np.count_nonzero(leaves[path]))
    for path in state.layout.shared
  }


def find_task(state: PackState, task_id: TaskId) -> PackedTask:
  """The stored task of that name.

  Example:
    >>> find_task(packed, 'first').report.num_kept
    1
  """
  for task in state.tasks:
    if task.report.task_id == task_id:
      return task
  raise ValueError(
    f'there is no task {task_id!r} in this network; it holds {state.listed}.'
  )


def alphas(power: OptState) -> list[float]:
  """The values of α that powerprop holds, in the order of its tree.

  Example:
    >>> alphas(())
    []
  """
  return [
    float(alpha)
    for state in trees.find_states(power, PowerState)
    for alpha in powerprop.alpha_by_path(state.alpha).values()
  ]


def with_leaves(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
  """A tree with some of its leaves replaced, by 'module/name'.

  Example:
    >>> with_leaves({'linear': {'w': 3.0, 'b': 1.0}}, {'linear/w': 4.0})
    {'linear': {'b': 1.0, 'w': 4.0}}
  """
  return trees.map_leaves(lambda leaf: leaves.get(leaf.path, leaf.value), tree)


@jax.jit
def masked_theta(phi: Params, power: OptState, masks: Masks) -> Params:
  """ψ(φ)⊙M, one program for all masks.

  Example:
    >>> masks = {'w': np.array([True, False])}
    >>> masked_theta({'w': np.float32([1, 2])}, (), masks)['w']
    Array([1., 0.], dtype=float32)
  """
  return masks_lib.apply_masks(views.effective_params(phi, power), masks)
