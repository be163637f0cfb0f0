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
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.continual import config as config_lib
from powerprop_jax.continual import search as search_lib
from powerprop_jax.continual import state as state_lib
from powerprop_jax.continual import weights
from powerprop_jax.continual.config import PackConfig
from powerprop_jax.continual.state import (
  CapacityError,
  PackedTask,
  PackMethod,
  PackState,
  Private,
  TaskId,
  TaskReport,
)
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import names, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.top_k import ranking
from powerprop_jax.core.trees import NamedLeaf, OptState, Params, Select, Tree
from powerprop_jax.optim import regrow, views
from powerprop_jax.optim.powerprop import PowerState
from powerprop_jax.optim.topologies import protected as protected_lib


class Learner(NamedTuple):
  """What a training function carries from step to step.

  The optimiser's state holds what the network computes with and what may move;
  see optim.views.effective_params.
  """

  phi: Params
  net_state: Tree
  opt_state: OptState


# (learner, task) -> trained learner; may donate what it is given.
Train = Callable[[Learner, Any], Learner]
# (theta, net_state, task) -> validation score, larger = better.
Evaluate = Callable[[Params, Tree, Any], Any]


def init_pack(
  tx: optax.GradientTransformation,
  theta: Params,
  net_state: Tree,
  method: PackMethod,
  *,
  select: Select = select_lib.is_weight,
  heads: Select | None = None,
  private: Private = 'freeze',
  initialise: Callable[[jax.Array], Params] | None = None,
) -> PackState:
  """A network without tasks.

  Args:
    tx: sparsify(inner, protected()) with any inner, powerprop included; it may
      be in a chain or MultiSteps. Every task starts with a fresh state of it.
    net_state: {} if the network has none.
    method: 'packnet' ranks only the weights a task may move, and the task
      computes with what it keeps and with all that earlier tasks own.
      'efficient_packnet' ranks all shared weights, so that re-use is free, and
      the task computes with what it keeps.
    select: which leaves are shared, heads aside.
    heads: leaves of which each task has its own, which start as they do here;
      None if one head serves all.
    private: the leaves that are neither, and the network's state: 'freeze'
      after the first task, or 'per_task', where each goes on from those of the
      task before.
    initialise: key -> θ as the network initialises it, the distribution from
      which free weights are drawn anew; a function that jax.jit takes. None is
      a normal one with the root mean square that each leaf has here.

  Returns:
    A PackState, with copies of theta and net_state.

  Example:
    >>> tx = pp.sparsify(optax.sgd(0.1), protected_lib.protected())
    >>> theta = {'linear': {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}}
    >>> state_lib.num_free(init_pack(tx, theta, {}, 'efficient_packnet'))
    {'linear/w': 6}
  """
  names.check_choice('method', method, get_args(PackMethod))
  names.check_choice('private', private, get_args(Private))
  phi, opt_state = views.init(tx, theta)
  protected_lib.with_protection(opt_state)  # refuses another optimiser
  layout = state_lib.make_layout(theta, select, heads, private)
  powers = trees.find_states(opt_state, PowerState)
  power = powers[0]._replace(inner_state=()) if powers else ()
  leaves, scales = trees.by_path(phi), trees.by_path(regrow.scales(theta))
  return PackState(
    tx=tx,
    method=method,
    initialise=initialise,
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
    key: from which free weights are drawn; one for each task.
    retrain: called like train once the mask is chosen: the network computes
      with M^t and only weights that are new in it move. None: no retraining.

  Raises:
    CapacityError: if fewer than config.min_free shared weights are free.
    ValueError: if the task exists already, config.restart is 'zero' where some
      α > 1, evaluate returns no sensible score, or train returns weights that
      are not finite or moved where they are protected.

  Note:
    With private='freeze' the state that train returns for a later task is
    dropped: let it compute with the statistics it was given, as in evaluation.
    A layer without free weights is used as it is. Counts are num_kept's, which
    rounds a share of weights up; the paper's ⌊s·dim⌋ rounds down.
    The printed algorithm lists the optional retraining last; it has to come
    before the backward mask changes, and may move only M^t ∧ B, or it would
    change earlier tasks.

  Example:
    >>> tx = pp.sparsify(optax.sgd(0.1), protected_lib.protected())
    >>> theta = {'linear': {'w': jnp.array([[1., 2., 3., 4.]])}}
    >>> state, report = learn(
    ...     init_pack(tx, theta, {}, 'efficient_packnet'), 'first', task=None,
    ...     train=lambda learner, task: learner,
    ...     evaluate=lambda theta, net_state, task: theta['linear']['w'].max(),
    ...     config=PackConfig((0.25, 0.5), gamma=0.9), key=0)
    >>> report.density, report.num_new, report.num_free
    (0.25, 1, 3)

  Source:
    Schwarz et al., Powerpropagation, 2021, Algorithm 1
    (https://arxiv.org/abs/2110.00296); PackNet as for topologies.protected.
  """
  task_id = _checked_id(state, task_id)
  free = state_lib.num_free(state)
  if (total := sum(free.values())) < config.min_free:
    raise CapacityError(
      f'no room for task {task_id!r}: {total:,} shared weights are free, and '
      f'it needs at least {config.min_free:,}. {len(state.tasks)} tasks did '
      f'fit, {state.listed}; they stay as they are. Use a '
      'wider network, smaller densities or a smaller gamma.',
      state.task_ids,
    )
  full = masks_lib.full_masks(state.phi)
  phi, net_state = _trained(
    lambda learner: train(learner, task),
    Learner(_start(state, config, key), state.net_state, None),
    state,
    full,
    f'task {task_id!r}',
  )

  def score_of(masks: Masks, what: str) -> float:
    theta = state_lib.masked_theta(phi, state.power, masks)
    return search_lib.checked_score(
      evaluate(theta, net_state, task), f'task {task_id!r}{what}'
    )

  def masks_at(density: float) -> Masks:
    return _masks(state, config, phi, free, density)

  dense_score = score_of(full, ', dense')
  found = search_lib.sparsest(
    lambda density: score_of(masks_at(density), f' at density {density:g}'),
    config.densities,
    config.gamma * dense_score,
    config.search,
  )
  masks, score = masks_at(found.density), found.score
  if retrain is not None:
    phi, net_state = _trained(
      lambda learner: retrain(learner, task),
      Learner(phi, net_state, None),
      state,
      masks,
      f'task {task_id!r}',
    )
    score = score_of(masks, ', retrained')
  kept, owned = trees.by_path(masks), trees.by_path(state.protected)
  num_new = sum(
    int(np.count_nonzero(kept[path] & ~owned[path])) for path in free
  )
  report = TaskReport(
    task_id=task_id,
    dense_score=dense_score,
    density=found.density,
    met=found.met,
    trials=found.trials,
    score=score,
    num_kept=sum(int(np.count_nonzero(kept[path])) for path in free),
    num_new=num_new,
    num_free=total - num_new,
  )
  return _packed(state, report, phi, net_state, masks), report


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
      f'{state.listed}. Give each task a name of its own.'
    )
  return task_id


def _start(
  state: PackState, config: PackConfig, key: int | jax.Array
) -> Params:
  """φ with which a task begins."""
  rule = config_lib.restart_rule(config, state)
  phi = state_lib.with_leaves(state.phi, state.initial)
  if not state.tasks or rule == 'keep':
    return phi
  key = jax.random.key(key) if isinstance(key, int | np.integer) else key
  initialise = state.initialise if rule == 'redraw' else None
  scale = {path: s * (rule == 'redraw') for path, s in state.scale.items()}
  return weights.redrawn(
    phi, state.protected, scale, state.power, key, initialise
  )


def _trained(
  train: Callable[[Learner], Learner],
  start: Learner,
  state: PackState,
  masks: Masks,
  what: str,
) -> tuple[Params, Tree]:
  """φ and the network's state after training under masks."""
  opt_state = protected_lib.with_protection(
    state.tx.init(start.phi),
    masks=masks,
    trainable=jax.tree.map(jnp.logical_not, state.protected),
  )
  # Copies, which train may donate.
  phi, net_state = jax.tree.map(jnp.array, (start.phi, start.net_state))
  learner = train(Learner(phi, net_state, opt_state))
  for name, found, expected in (
    ('φ', learner.phi, state.phi),
    ('net_state', learner.net_state, state.net_state),
  ):
    returned = f'the {name} that train returned for {what}'
    masks_lib.check_same_shapes(found, expected, returned, 'the state')
  before, now = map(state_lib.alphas, (state.power, learner.opt_state))
  if now not in ([], before):
    raise ValueError(
      f'train changed α from {before} to {now} for {what}, which would move '
      'the latent weights of all tasks. Leave it as it was in init_pack.'
    )
  phi, checks = weights.merged(state.protected, state.phi, learner.phi)
  for path in trees.by_path(phi):
    is_finite, is_kept = checks[path]
    if not is_finite:
      raise ValueError(
        f'the φ that train returned for {what}: leaf {path!r} holds a number '
        'that is not finite. Its training diverged; try a smaller learning '
        'rate.'
      )
    if not is_kept:
      raise ValueError(
        f'the φ that train returned for {what}: protected weights of {path!r} '
        'have moved, which would change earlier tasks. Take the steps with the '
        'transformation given to init_pack and its state, and put nothing '
        'outside its sparsify that moves weights by itself, such as weight '
        'decay.'
      )
  frozen = state.layout.private == 'freeze' and state.tasks
  return phi, state.net_state if frozen else learner.net_state


def _masks(
  state: PackState,
  config: PackConfig,
  phi: Params,
  free: dict[str, int],
  density: float,
) -> Masks:
  """The forward mask that keeps a share of the weights."""
  is_packnet = state.method == 'packnet'
  leaves = trees.by_path(phi)
  sizes = free if is_packnet else {p: leaves[p].size for p in free}
  if config.scope == 'global':
    sizes = {ranking.SHARED: sum(sizes.values())}
  counts = {
    # Traced, so that one program serves all densities and tasks.
    name: np.int32(masks_lib.num_kept(size, 1 - density))
    for name, size in sizes.items()
  }
  owned = state.protected if is_packnet else None
  shared = state.layout.shared
  return weights.ranked(phi, state.power, counts, owned, shared)


def _packed(
  state: PackState,
  report: TaskReport,
  phi: Params,
  net_state: Tree,
  masks: Masks,
) -> PackState:
  """The state with one more task, and what it owns protected."""
  layout = state.layout
  frozen = layout.others if layout.private == 'freeze' else ()

  def protect(leaf: NamedLeaf, mask: jax.Array) -> jax.Array:
    old: jax.Array = leaf.value
    if leaf.path in frozen:
      return jnp.ones_like(old)
    return old | mask if leaf.path in layout.shared else old

  leaves, kept = trees.by_path(phi), trees.by_path(masks)
  own = jax.tree.map(np.array, net_state)
  task = PackedTask(
    report,
    masks_lib.pack_masks({path: kept[path] for path in layout.shared}),
    {path: np.array(leaves[path]) for path in layout.stored},
    own if layout.private == 'per_task' else None,
  )
  return dataclasses.replace(
    state,
    phi=phi,
    net_state=net_state,
    protected=trees.map_leaves(protect, state.protected, masks),
    tasks=(*state.tasks, task),
  )
