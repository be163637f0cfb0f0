"""Many runs as one program: a member for each α and key.

The states of all members are stacked along a leading axis, and what trains or
scores one network is mapped over it: side by side with jax.vmap, or, where
memory is short, one after the other (or a few at a time) with jax.lax.map. α is
an array in either case, so both compute the same numbers up to the rounding of
batched products. Members with the same key start from the same function and see
the same batches.

    state = ensemble.create(net, make_tx, members, splits.example)
    state = loop.fit(
      state, ensemble.mapped(advance), ensemble.mapped(evaluate), splits, …)
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import reparam, scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import views
from powerprop_jax.prune import one_shot
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import loop
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import divergence, errors, metrics
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.step import TrainState


class Members(NamedTuple):
  """What distinguishes the runs of an ensemble.

  Attributes:
    alpha: float64[members], the power of each, as it was given.
    key: int[members], seed of each: its initial weights and order of the data.
  """

  alpha: np.ndarray
  key: np.ndarray


def product(alphas: Sequence[float], keys: Sequence[int]) -> Members:
  """All pairs of a power and a seed, key by key within each α.

  Example:
    >>> product([1., 2.], [0, 1]).alpha
    array([1., 1., 2., 2.])
  """
  for key in keys:
    errors.check_key(key)
  pairs = list(itertools.product(alphas, keys))
  return Members(
    np.array([alpha for alpha, _ in pairs], np.float64),
    np.array([key for _, key in pairs], np.int64),
  )


def names(members: Members) -> list[Row]:
  """What tells the records of the members apart.

  Example:
    >>> names(product([2.], [7]))
    [{'alpha': 2.0, 'key': 7}]
  """
  return [
    {'alpha': float(alpha), 'key': int(key)}
    for alpha, key in zip(*members, strict=True)
  ]


def take(tree: Tree, index: int) -> Tree:
  """What a stacked tree holds of one member."""
  return jax.tree.map(lambda x: x[index], tree)


def mapped(
  fn: Callable[..., Any], at_once: int | None = None
) -> Callable[..., Any]:
  """What loop.fit takes of one run, for all members.

  Args:
    fn: (state, arrays, ...), a pure function.
    at_once: members computed side by side; None is all of them.

  Returns:
    The same over stacked states and all that follows; arrays are shared.
  """
  if at_once is not None:
    errors.check_least(1, at_once=at_once)

  def run(state: Tree, arrays: Tree, *rest: Any) -> Any:
    one = lambda args: fn(args[0], arrays, *args[1:])
    stacked = (state, *rest)
    if at_once is None:
      return jax.vmap(one)(stacked)
    batch_size = at_once if at_once > 1 else None  # one is not a batch
    return jax.lax.map(one, stacked, batch_size=batch_size)

  return run


def create(
  net: hk.TransformedWithState,
  make_tx: Callable[[Any], optax.GradientTransformation],
  members: Members,
  images: jax.Array,
) -> TrainState:
  """The stacked states of all members before their first step.

  As step.create, but for make_tx: from α, an array, to a gradient
  transformation over φ.
  """
  # Inside vmap nobody can look at the values: check the powers, and build the
  # hardest member, outside.
  for alpha in members.alpha:
    reparam.check_alpha(float(alpha))
  hardest = int(np.argmax(members.alpha))
  key = jax.random.key(int(members.key[hardest]))
  hardest_tx = make_tx(float(members.alpha[hardest]))
  step_lib.create(net, hardest_tx, key, images)

  def create_one(alpha: jax.Array, key: jax.Array) -> TrainState:
    return step_lib.create(net, make_tx(alpha), key, images)

  alphas = jnp.asarray(members.alpha, jnp.float32)
  return jax.jit(jax.vmap(create_one))(alphas, _keys(members))


def create_by_key(
  net: hk.TransformedWithState,
  make_tx: Callable[[jax.Array], optax.GradientTransformation],
  members: Members,
  images: jax.Array,
) -> TrainState:
  """The stacked states of members that share an α which is a Python number.

  As create, but for make_tx: from a PRNG key, which may be traced, to a
  gradient transformation over φ that knows α.

  Raises:
    ValueError: if a topology refuses the shapes of the weights. Their values
      are traced, so that a leaf of zeros goes unnoticed; nets.make has none.
  """

  def create_one(key: jax.Array) -> TrainState:
    # Other streams than those of the weights and of the training steps.
    tx = make_tx(jax.random.fold_in(key, 2))
    return step_lib.create(net, tx, key, images)

  return jax.jit(jax.vmap(create_one))(_keys(members))


def _keys(members: Members) -> jax.Array:
  return jnp.stack([jax.random.key(int(key)) for key in members.key])


def batch_indices(members: Members, *stretch: int) -> np.ndarray:
  """Rows that each member trains on, int32[members, num_steps, batch_size].

  Each key has the rows of splits.batch_indices, which the stretch is for.
  """
  by_key = {
    key: data.batch_indices(key, *stretch) for key in set(members.key.tolist())
  }
  return np.stack([by_key[key] for key in members.key.tolist()])


def score_records(members: Members, trained: Tree, scores: Tree) -> list[Row]:
  """What an evaluation found, a record for each member; see loop.record."""
  trained, scores = jax.device_get((trained, scores))
  return [
    loop.record(take(trained, index), take(scores, index), **name)
    for index, name in enumerate(names(members))
  ]


def prune(
  net: hk.TransformedWithState,
  state: TrainState,
  members: Members,
  arrays: Arrays,
  sparsities: Sequence[float],
  *,
  scope: str = 'layer',
  overrides: Callable[[float], Mapping[str, float]] | None = None,
) -> list[Row]:
  """Accuracy of every member after one-shot pruning at every sparsity.

  Args:
    arrays: examples to score on.
    overrides: from a sparsity to the sparsities of leaves by pattern.

  Returns:
    One record for each member and sparsity, with alpha, key, scope, sparsity,
    density, accuracy and loss; density is the share of selected weights that is
    left, leaves with a sparsity of their own included. Of a network that was
    trained sparse, weights that were no connections are not left.
  """
  evaluate = evaluate_lib.make_evaluate(net)

  def score(state: TrainState, arrays: Arrays) -> dict[str, jax.Array]:
    theta = state.theta
    masks = views.current_masks(state.phi, state.opt_state)

    def evaluate_at(kept: Params) -> dict[str, jax.Array]:
      # Of the connections that there were: zeros outside them are kept as well.
      left = jax.tree.map(lambda x: x != 0, kept)
      weights = masks_lib.selected(left, select_lib.is_weight).values()
      found = evaluate(
        masks_lib.apply_masks(theta, left), state.net_state, arrays
      )
      counts = [jnp.sum(weight) for weight in weights]
      return found | {'left': jnp.sum(jnp.stack(counts))}

    return one_shot.sweep(
      evaluate_at,
      jax.tree.map(lambda mask, x: mask.astype(x.dtype), masks, theta),
      sparsities,
      score=lambda _: scores.magnitude(theta),
      scope=scope,
      overrides=overrides,
    )

  found = jax.device_get(
    jax.jit(mapped(score, 1))(state, jax.device_put(arrays))
  )
  weights = (
    leaf.value[0].size
    for leaf in trees.named_leaves(state.phi)
    if select_lib.is_weight(leaf.module_name, leaf.name, leaf.value[0])
  )
  size = sum(weights)
  return [
    {
      **name,
      'scope': scope,
      'sparsity': float(sparsity),
      'density': int(found['left'][index, i]) / size,
      'accuracy': float(found['accuracy'][index, i]),
      'loss': float(found['loss'][index, i]),
    }
    for index, name in enumerate(names(members))
    for i, sparsity in enumerate(sparsities)
  ]


def keep_more_outputs(factor: float) -> Callable[[float], dict[str, float]]:
  """The rule by which the output layer keeps a multiple of the others' share.

  Overrides for prune: sparsity -> {pattern of the output layer: sparsity}. The
  authors' notebook has the factor 2.

  Example:
    >>> keep_more_outputs(2.0)(0.9)
    {'logits/w$': 0.8}

  Source:
    The authors' notebook: the last layer keeps min(1, 2p).
  """
  if not 0 < factor < float('inf'):
    raise UserError(
      f'--output-factor must be positive and finite, got {factor:g}.'
    )
  return lambda sparsity: {
    'logits/w$': max(0.0, round(1 - factor * (1 - sparsity), 12))
  }


def lost_leaves(members: Members, state: TrainState) -> divergence.Leaves:
  """Of each member the first leaf of θ that is not finite, or None."""
  theta = jax.device_get(jax.jit(jax.vmap(lambda s: s.theta))(state))
  return {
    (name['alpha'], name['key']): divergence.lost_leaf(take(theta, index))
    for index, name in enumerate(names(members))
  }


def say_diverged(
  members: Members, state: TrainState, folder: RunFolder
) -> list[bool]:
  """Which members diverged, by their weights or by what was logged last.

  Lines are printed as by divergence.say_weights.
  """
  return divergence.say_weights(
    folder.path,
    lost_leaves(members, state),
    int(np.max(state.step)),
    metrics.read_metrics(folder.metrics_path),
  )
