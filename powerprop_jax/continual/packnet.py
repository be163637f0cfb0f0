"""PackNet and EfficientPackNet: tasks packed into one network, none forgotten.

    φ ──train, dense, only B moves──▶ φ ──rank |θ|──▶ M at each density
                                                          │ evaluate θ⊙M
    B ← B ∧ ¬M^t  ◀──[retrain M^t ∧ B]◀── M^t, the last with score ≥ γP

How a task is trained and evaluated is the caller's business: train is any
function from a Learner to a Learner. Both are handed data of one structure, so
that a step that is jitted once serves all tasks; and what a task costs does not
depend on how many came before it.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.continual import config as config_lib
from powerprop_jax.continual import search as search_lib
from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual import weights
from powerprop_jax.continual.config import PackConfig
from powerprop_jax.continual.search import Found
from powerprop_jax.continual.state import (
  CapacityError,
  PackedTask,
  PackState,
  TaskId,
  TaskReport,
)
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import ranking, trees
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import OptState, Params, Tree
from powerprop_jax.optim import regrow, views
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topologies import protected as protected_lib


class Learner(NamedTuple):
  """What a training function carries from step to step.

  Attributes:
    phi: latent parameters.
    net_state: state of the network, such as the statistics of its norms.
    opt_state: state of the optimiser; holds what the network computes with and
      what may move. See optim.views.effective_params.
  """

  phi: Params
  net_state: Tree
  opt_state: OptState


# (learner, task) -> trained learner; may donate what it is given.
Train = Callable[[Learner, Any], Learner]
# (theta, net_state, task) -> validation score, larger = better.
Evaluate = Callable[[Any, Any, Any], Any]


def init_pack(
  tx: optax.GradientTransformation,
  theta: Params,
  net_state: Tree,
  config: PackConfig,
) -> PackState:
  """A network without tasks.

  Args:
    tx: sparsify(inner, protected()) with any inner, powerprop included; it may
      be in a chain or MultiSteps. Every task starts with a fresh state of it.
    theta: effective weights as the network initialises them.
    net_state: state of the network; {} if it has none.
    config: how tasks will be packed.

  Returns:
    A PackState, with copies of theta and net_state.

  Raises:
    ValueError: if tx is not built so, config.select or config.heads selects
      nothing, all that it selects is in the heads, or config.restart is 'zero'
      where some α > 1.

  Example:
    >>> from powerprop_jax.optim.sparsify import sparsify
    >>> tx = sparsify(optax.sgd(0.1), protected_lib.protected())
    >>> theta = {'linear': {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}}
    >>> config = PackConfig('efficient_packnet', (0.1, 0.5))
    >>> state_lib.num_free(init_pack(tx, theta, {}, config))
    {'linear/w': 6}
  """
  phi, opt_state = views.init(tx, theta)
  protected_lib.with_protection(opt_state)  # refuses another optimiser
  layout = config_lib.layout_of(config, theta)
  powers = trees.find_states(opt_state, PowerState)
  power = powers[0]._replace(inner_state=()) if powers else ()
  config_lib.restart_rule(config, power)
  leaves = state_lib.leaves_by_path(phi)
  scales = state_lib.leaves_by_path(regrow.scales(theta))
  return PackState(
    tx=tx,
    layout=layout,
    power=jax.tree.map(jnp.array, power),
    phi=phi,
    net_state=jax.tree.map(jnp.array, net_state),
    protected=jax.tree.map(lambda p: jnp.zeros_like(p, bool), phi),
    initial={path: jnp.array(leaves[path]) for path in layout.heads},
    scale={path: scales[path] for path in layout.shared},
  )


def learn(
  state: PackState,
  task_id: TaskId,
  task: Any,
  train: Train,
  evaluate: Evaluate,
  config: PackConfig,
  key: int | jax.Array,
  *,
  retrain: Train | None = None,
) -> tuple[PackState, TaskReport]:
  """Packs one more task into the network.

  Trains it densely, protected weights included, of which none moves; finds the
  sparsest mask whose validation score is at least γ of the dense one; and
  protects what the mask holds. The state is not changed, so that nothing is
  lost if something fails here.

  Args:
    state: as from init_pack, or from learn for the task before.
    task_id: its name, not yet in use.
    task: handed to train and evaluate; anything.
    train: called with a Learner whose arrays it may donate.
    evaluate: called as evaluate(θ⊙M, net_state, task); returns the validation
      score, positive, larger = better. jit what it computes once, outside.
    config: as for init_pack; what says how the leaves are shared must be as it
      was there, the rest may differ from task to task.
    key: from which free weights are drawn; one for each task, an int or a PRNG
      key.
    retrain: called like train once the mask is chosen: the network computes
      with M^t and only weights that are new in it move. None: no retraining.

  Returns:
    (state, report) with the task packed.

  Raises:
    CapacityError: if fewer than config.min_free shared weights are free.
    ValueError: if the task exists already, config shares other leaves than
      before, evaluate returns no sensible score, or train returns weights that
      are not finite, of other shapes, or moved where they are protected.
    TypeError: if the task's name is neither an integer nor a string.

  Note:
    With private='freeze' the state that train returns for a later task is
    dropped: let it compute with the statistics it was given, as in evaluation.
    A layer without free weights is used as it is. Counts are num_kept's, which
    rounds a share of weights up; the paper's ⌊s·dim⌋ rounds down.
    The printed algorithm lists the optional retraining last; it has to come
    before the backward mask changes, and may move only M^t ∧ B, or it would
    change earlier tasks.

  Example:
    >>> from powerprop_jax.optim.sparsify import sparsify
    >>> tx = sparsify(optax.sgd(0.1), protected_lib.protected())
    >>> theta = {'linear': {'w': jnp.array([[1., 2., 3., 4.]])}}
    >>> config = PackConfig('efficient_packnet', (0.25, 0.5), gamma=0.9)
    >>> state, report = learn(
    ...     init_pack(tx, theta, {}, config), 'first', task=None,
    ...     train=lambda learner, task: learner,
    ...     evaluate=lambda theta, net_state, task: theta['linear']['w'].max(),
    ...     config=config, key=0)
    >>> report.density, report.num_new, report.num_free
    (0.25, 1, 3)

  Source:
    Schwarz et al., Powerpropagation, 2021, Algorithm 1
    (https://arxiv.org/abs/2110.00296); Mallya & Lazebnik, PackNet, 2018
    (https://arxiv.org/abs/1711.05769).
  """
  task_id = _checked_id(state, task_id)
  layout = config_lib.layout_of(config, state.phi)
  if layout != state.layout:
    raise ValueError(
      'select, heads and private must be those of init_pack, which gave '
      f'{state.layout}; now they give {layout}.'
    )
  free = _free_counts(state, task_id, config)
  trainable = jax.tree.map(jnp.logical_not, state.protected)
  full = masks_lib.full_masks(state.phi)
  learner = Learner(_start(state, config, key), state.net_state, None)
  phi, net_state = _trained(
    state, task_id, train, learner, task, full, trainable
  )

  def score_of(masks: Masks, what: str) -> float:
    theta = state_lib.masked_theta(phi, state.power, masks)
    return search_lib.checked_score(evaluate(theta, net_state, task), what)

  def masks_at(density: float) -> Masks:
    return _masks(state, config, phi, free, density)

  dense_score = score_of(full, f'task {task_id!r}, dense')
  found = search_lib.sparsest(
    lambda density: score_of(
      masks_at(density), f'task {task_id!r} at density {density:g}'
    ),
    config.densities,
    config.gamma * dense_score,
    config.search,
  )
  masks, score = masks_at(found.density), found.score
  if retrain is not None:
    learner = Learner(phi, net_state, None)
    phi, net_state = _trained(
      state, task_id, retrain, learner, task, masks, trainable
    )
    score = score_of(masks, f'task {task_id!r}, retrained')
  return _packed(
    state, task_id, phi, net_state, masks, dense_score, found, score
  )


def _checked_id(state: PackState, task_id: Any) -> TaskId:
  if isinstance(task_id, np.integer):
    task_id = int(task_id)
  if not isinstance(task_id, int | str):
    raise TypeError(
      f'a task is named by an integer or a string, got {task_id!r}.'
    )
  if task_id in state.task_ids:
    raise ValueError(
      f'task {task_id!r} is in this network already; it holds '
      f'{state_lib.listed(state.task_ids)}. Give each task a name of its own.'
    )
  return task_id


def _free_counts(
  state: PackState, task_id: TaskId, config: PackConfig
) -> dict[str, int]:
  """Free weights by leaf; refuses a task for which there are too few."""
  free = state_lib.num_free(state)
  if (total := sum(free.values())) < config.min_free:
    raise CapacityError(
      f'no room for task {task_id!r}: {total:,} shared weights are free, and '
      f'it needs at least {config.min_free:,}. {len(state.tasks)} tasks did '
      f'fit, {state_lib.listed(state.task_ids)}; they stay as they are. Use a '
      'wider network, smaller densities or a smaller gamma.',
      state.task_ids,
    )
  return free


def _start(state: PackState, config: PackConfig, key: int | jax.Array) -> Any:
  """φ with which a task begins."""
  phi = state_lib.with_leaves(state.phi, state.initial)
  if not state.tasks:
    return phi
  rule = config_lib.restart_rule(config, state.power)
  if rule == 'keep':
    return phi
  key = jax.random.key(key) if isinstance(key, int | np.integer) else key
  initialise = config.initialise if rule == 'redraw' else None
  scale = {path: s * (rule == 'redraw') for path, s in state.scale.items()}
  return weights.redrawn(
    phi, state.protected, scale, state.power, key, initialise
  )


def _trained(
  state: PackState,
  task_id: TaskId,
  train: Train,
  start: Learner,
  task: Any,
  masks: Masks,
  trainable: Masks,
) -> tuple[Any, Any]:
  """φ and the network's state after training with the given sets."""
  opt_state = protected_lib.with_protection(
    state.tx.init(start.phi), masks=masks, trainable=trainable
  )
  # Copies, which train may donate.
  phi, net_state = jax.tree.map(jnp.array, (start.phi, start.net_state))
  learner = train(Learner(phi, net_state, opt_state), task)
  what = f'the φ that train returned for task {task_id!r}'
  masks_lib.check_same_shapes(learner.phi, state.phi, what, 'the state')
  masks_lib.check_same_shapes(
    learner.net_state,
    state.net_state,
    f'the net_state that train returned for task {task_id!r}',
    'the state',
  )
  _check_alpha(state, task_id, learner.opt_state)
  phi, faults = weights.merged(state.protected, state.phi, learner.phi)
  for leaf in trees.named_leaves(phi):
    is_finite, is_kept = faults[leaf.path]
    if not is_finite:
      raise ValueError(
        f'{what}: leaf {leaf.path!r} holds a number that is not finite. Its '
        'training diverged; try a smaller learning rate.'
      )
    if not is_kept:
      raise ValueError(
        f'{what}: protected weights of {leaf.path!r} have moved, which would '
        'change earlier tasks. Take the steps with the transformation given to '
        'init_pack and its state, and put nothing outside its sparsify that '
        'moves weights by itself, such as weight decay.'
      )
  frozen = state.layout.private == 'freeze' and state.tasks
  return phi, state.net_state if frozen else learner.net_state


def _check_alpha(
  state: PackState, task_id: TaskId, opt_state: OptState
) -> None:
  before = state_lib.alphas(state.power)
  after = state_lib.alphas(opt_state)
  if after not in ([], before):
    raise ValueError(
      f'train changed α from {before} to {after} for task {task_id!r}, which '
      'would move the latent weights of all tasks. Leave it as it was in '
      'init_pack.'
    )


def _masks(
  state: PackState,
  config: PackConfig,
  phi: Params,
  free: dict[str, int],
  density: float,
) -> Masks:
  """The forward mask that keeps a share of the weights."""
  is_packnet = config.method == 'packnet'
  leaves = state_lib.leaves_by_path(phi)
  sizes = free if is_packnet else {p: leaves[p].size for p in free}
  if config.scope == 'global':
    sizes = {ranking.SHARED: sum(sizes.values())}
  counts = {
    # Traced, so that one program serves all densities and tasks.
    name: np.int32(masks_lib.num_kept(size, 1 - density))
    for name, size in sizes.items()
  }
  owned = state.protected if is_packnet else None
  select = weights.Named(frozenset(state.layout.shared))
  return weights.ranked(phi, state.power, counts, owned, select)


def _packed(
  state: PackState,
  task_id: TaskId,
  phi: Params,
  net_state: Tree,
  masks: Masks,
  dense_score: float,
  found: Found,
  score: float,
) -> tuple[PackState, TaskReport]:
  """The state with one more task, and what it owns protected."""
  layout = state.layout
  shared = state_lib.leaves_by_path(masks)
  shared = {path: shared[path] for path in layout.shared}
  frozen = layout.others if layout.private == 'freeze' else ()

  def protect(module: str, name: str, old: Tree, mask: Tree) -> Any:
    path = trees.join_name(module, name)
    if path in frozen:
      return jnp.ones_like(old)
    return old | mask if path in shared else old

  after = dataclasses.replace(
    state,
    phi=phi,
    net_state=net_state,
    protected=trees.map_named(protect, state.protected, masks),
  )
  num_free = sum(state_lib.num_free(after).values())
  report = TaskReport(
    task_id=task_id,
    dense_score=dense_score,
    density=found.density,
    met=found.met,
    trials=tuple((trial.density, trial.score) for trial in found.trials),
    score=score,
    num_kept=sum(int(np.count_nonzero(mask)) for mask in shared.values()),
    num_new=sum(state_lib.num_free(state).values()) - num_free,
    num_free=num_free,
  )
  leaves = state_lib.leaves_by_path(phi)
  stored = PackedTask(
    report,
    masks_lib.pack_masks(shared),
    {path: np.array(leaves[path]) for path in layout.stored},
    jax.tree.map(np.array, net_state) if layout.private == 'per_task' else None,
  )
  return dataclasses.replace(after, tasks=(*state.tasks, stored)), report
