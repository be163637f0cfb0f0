"""Where the connections of a sparse network are: random, scored, or moving.

Three ways to a support. Random ones are drawn with a budget for each layer;
scored ones are what a method of pruning at initialisation keeps; those of SET
and RigL start at random and move.

Programs train all of them alike: make_tx gives the gradient transformation of a
support. A scored one starts with every connection, and `install` puts the masks
in place before the first step, for they depend on the weights and on data.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.core import distributions, scores, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Params
from powerprop_jax.prune import at_init
from powerprop_jax.train import methods
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.data.splits import Prepare
from powerprop_jax.train.methods import Lengths, SparseConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.step import TrainState

SupportName = Literal[
  'uniform',
  'epf',
  'epl',
  'er',
  'erk',
  'magnitude',
  'snip',
  'iterative_snip',
  'force',
  'grasp',
  'synflow',
  'set',
  'rigl',
]
NAMES = get_args(SupportName)

_BUDGETS = {
  'uniform': pp.uniform,
  'epf': distributions.equal_per_filter,
  'epl': distributions.equal_per_layer,
  'er': pp.distributions.er,
  'erk': pp.erk,
}
MOVING = ('set', 'rigl')
_IN_STEPS: dict[str, Callable[..., pp.Masks]] = {
  'iterative_snip': at_init.iterative_snip,
  'force': pp.at_init.force,
}
SCORED = tuple(n for n in NAMES if n not in _BUDGETS and n not in MOVING)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """What pruning at initialisation may look at."""

  # Batches of training examples over which the gradient is taken.
  num_batches: int = 1
  # Examples in each.
  batch_size: int = 100
  # Rounds of iterative_snip and force.
  rounds: int = 10
  # Rounds of synflow, which needs no data.
  synflow_rounds: int = 100


class Scorer(NamedTuple):
  """What scored supports are found with, built once for each network.

  Attributes:
    loss_fn: (theta, images, labels) -> mean cross-entropy in a training step.
    grasp_loss_fn: the same of logits divided by GraSP's temperature.
    flow_fn: (theta, images) -> outputs, with norms that are the identity.
    examples: the training split.
    config: how much of it to look at.
  """

  loss_fn: at_init.Loss
  grasp_loss_fn: at_init.Loss
  flow_fn: Callable[[Any, jax.Array], jax.Array]
  examples: Arrays
  config: ScoreConfig


def make_scorer(
  net: hk.TransformedWithState,
  net_state: hk.State,
  examples: Arrays,
  prepare: Prepare,
  config: ScoreConfig,
) -> Scorer:
  """What scored supports of a network are found with.

  Args:
    net_state: its own state at initialisation, with any key: in a training step
      norms divide by the statistics of the batch.
    examples: the training split.
    config: how much to look at, see check.
  """

  def logits_fn(theta: Params, images: jax.Array) -> jax.Array:
    key = jax.random.key(0)  # of dropout, where the network has it
    return net.apply(theta, net_state, key, prepare(images), True)[0]

  neutral = at_init.neutral_norm_state(net_state)

  def flow_fn(theta: Params, images: jax.Array) -> jax.Array:
    return net.apply(theta, neutral, None, images, False)[0]

  return Scorer(
    at_init.classification_loss(logits_fn),
    at_init.classification_loss(logits_fn, temperature=200.0),
    flow_fn,
    examples,
    config,
  )


def check(config: ScoreConfig, num_examples: int) -> None:
  """Refuses settings that are not positive, or need more data than there is."""
  names = (field.name for field in dataclasses.fields(config))
  errors.check_positive(config, *names, prefix='')
  if config.num_batches * config.batch_size > num_examples:
    raise UserError(
      f'{config.num_batches} batches of {config.batch_size} are more than the '
      f'{num_examples:,} examples to train on. Lower --score.num-batches or '
      '--score.batch-size.'
    )


def is_possible(name: str, *, dct: bool) -> bool:
  """Whether a support can be found for a network.

  All scores have the weights as a factor. Those beside a cosine transform start
  at zero, or at random values that say nothing of what the transform does, so
  no weight is better than another.

  Note:
    The authors of DCT plus sparse refuse FORCE there as well. Scoring the
    weights together with the transform would rank what is not trained.

  Example:
    >>> is_possible('snip', dct=True), is_possible('erk', dct=True)
    (False, True)
  """
  return not (dct and name in SCORED)


def make_tx(
  inner: optax.GradientTransformation,
  name: SupportName,
  density: float,
  config: SparseConfig,
  lengths: Lengths,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that trains a support.

  As methods.make_tx. A scored support has all connections until `install`.
  """
  sparsity = masks_lib.density_to_sparsity(density)
  if name in _BUDGETS:
    return pp.static(inner, sparsity, distribution=_BUDGETS[name], key=key)
  if name == 'set' or name == 'rigl':
    return methods.make_tx(inner, name, density, config, lengths, key)
  full = lambda key, theta: (masks_lib.full_masks(theta), ())
  return pp.sparsify(inner, pp.Topology(full, regrow='zero'), key=key)


def check_density(
  name: SupportName, theta: Params, density: float, what: str
) -> None:
  """Refuses less than one connection for each layer, of all ranked together.

  Supports that are not scored check their own budgets. theta may be shapes;
  what is the combination, for the message.
  """
  if name not in SCORED:
    return
  sizes = [
    leaf.value.size for leaf in trees.named_leaves(theta) if pp.is_weight(*leaf)
  ]
  sparsity = masks_lib.density_to_sparsity(density)
  kept = masks_lib.num_kept(sum(sizes), sparsity)
  if kept < len(sizes):
    raise UserError(
      f'{what}: {kept} connections for {len(sizes)} layers are less than one '
      'each. Raise the density.'
    )


def find(
  scorer: Scorer,
  name: SupportName,
  theta: Params,
  density: float,
  key: jax.Array,
) -> pp.Masks:
  """The masks of a scored support, of all layers ranked together.

  The key chooses the examples to look at; those of each round are others. A
  layer that is left without connections is a LayerCollapseWarning.

  Raises:
    ValueError: if the scores cannot be computed, or the density is less than
      one weight for each layer.
  """
  config = scorer.config
  sparsity = masks_lib.density_to_sparsity(density)
  batches = functools.partial(_batches, scorer, key)
  if name == 'synflow':
    shape = (1, *scorer.examples.images.shape[1:])
    return at_init.synflow_masks(
      scorer.flow_fn, theta, shape, sparsity, steps=config.synflow_rounds
    )
  if name in _IN_STEPS:
    return _IN_STEPS[name](
      scorer.loss_fn, theta, batches, sparsity, steps=config.rounds
    )
  if name == 'snip':
    found = pp.at_init.snip(scorer.loss_fn, theta, batches(0))
  elif name == 'grasp':
    found = pp.at_init.grasp(scorer.grasp_loss_fn, theta, batches(0))
  else:
    found = scores.magnitude(theta)
  return at_init.masks_from_scores(found, sparsity)


def _batches(
  scorer: Scorer, key: jax.Array, step: int
) -> list[tuple[jax.Array, jax.Array]]:
  """Different training examples at every step of a method."""
  images, labels = scorer.examples
  rows = jax.random.permutation(jax.random.fold_in(key, step), len(labels))
  size = scorer.config.batch_size
  chosen = np.asarray(rows)[: size * scorer.config.num_batches]
  return [
    (jnp.asarray(images[part]), jnp.asarray(labels[part]))
    for part in chosen.reshape(-1, size)
  ]


def install(state: TrainState, masks: pp.Masks) -> TrainState:
  """Stacked states with the stacked masks of a scored support.

  φ is zero without a connection. The states are those before the first step,
  and donated.
  """

  def one(state: TrainState, masks: pp.Masks) -> TrainState:
    return state._replace(
      phi=pp.apply_masks(state.phi, masks),
      opt_state=pp.with_masks(state.opt_state, masks),
    )

  return jax.jit(jax.vmap(one), donate_argnums=0)(state, masks)
