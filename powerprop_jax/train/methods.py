"""A method of sparse training from settings, around an optimiser.

The library's own way is one of the functions of optim/aliases.py; this is for
programs, which compare all methods and read their settings from a command line.
A setting that is None has the value of the method's own paper or code.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import optax

from powerprop_jax.core import distributions, names, trees
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.top_k.patterns import Structure
from powerprop_jax.core.trees import Params, Select
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import aliases
from powerprop_jax.optim.topologies.gradual import Scope
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Regrow
from powerprop_jax.train import optimizers
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import fusing

Method = Literal[
  'dense',
  'static',
  'pruning',
  'one_shot',
  'set',
  'rigl',
  'snfs',
  'dsr',
  'top_kast',
]
METHODS = get_args(Method)
# Those whose networks have all weights at first.
DENSE_FIRST: tuple[Method, ...] = ('dense', 'pruning', 'one_shot')


def uniform_dense_stem(
  theta: Params, sparsity: float, *, select: Select = select_lib.is_weight
) -> dict[str, float]:
  """The same sparsity for every leaf but the first convolution, left dense.

  The whole network is then a little denser than 1 - sparsity. Its first layer
  is called 'stem'.

  Example:
    >>> import numpy as np
    >>> theta = {'net/stem': {'w': np.ones((3, 2))},
    ...          'net/logits': {'w': np.ones((2, 4))}}
    >>> uniform_dense_stem(theta, 0.5)
    {'net/logits/w': 0.5, 'net/stem/w': 0.0}

  Source:
    Evci et al., Rigging the lottery, 2020, section 3(1)
    (https://arxiv.org/abs/1911.11134).
  """
  found = distributions.uniform(theta, sparsity, select=select)
  stems = [name for name in found if name.endswith('/stem/w')]
  if found and not stems:
    raise ValueError(
      "uniform_dense_stem needs a layer called 'stem'; there are: "
      f'{", ".join(found)}. Use uniform.'
    )
  return found | dict.fromkeys(stems, 0.0)


_DISTRIBUTIONS = {
  'uniform': distributions.uniform,
  'er': distributions.er,
  'erk': distributions.erk,
  'uniform_dense_stem': uniform_dense_stem,
}


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """Which connections there are, and how they move."""

  # How the density is shared out between layers, for SNFS and DSR at the start.
  # Default: erk for SET, RigL, DSR and Top-KAST, else uniform. With
  # uniform_dense_stem the first convolution is dense and the others have the
  # density asked for, as in RigL.
  distribution: Literal['uniform', 'er', 'erk', 'uniform_dense_stem'] | None = (
    None
  )
  # Steps from one rewiring to the next. Default: 100 for SET, RigL, DSR and
  # Top-KAST, an epoch for SNFS, a hundredth of the run for pruning.
  period: int | None = None
  # Share of the run after which connections stay as they are, in (0, 1]; where
  # one_shot prunes. Default: 1 for SNFS and Top-KAST, else 0.75.
  stop: float | None = None
  # Share of the connections that a rewiring drops, in (0, 1); for SET, RigL and
  # SNFS it falls along half a cosine. Default: 0.3, SNFS 0.5.
  drop_fraction: float | None = None
  # First value of a new connection: zero, the one it had (keep), one drawn like
  # the initial ones (redraw), or the smallest of its layer. Default: zero for
  # α = 1, otherwise keep. Pruning and Top-KAST prescribe their own.
  regrow: Regrow | None = None
  # constant_fan_in: all neurons of a layer have as many inputs. Not for DSR and
  # Top-KAST.
  structure: Structure = 'unstructured'
  # SET and RigL with constant fan-in: neurons of which less than this share of
  # the inputs is salient lose all of them, in (0, 1]; those of 'logits' never
  # do. Default: neurons stay.
  ablation: float | None = None
  # SNFS: whether connections move between layers.
  redistribute: bool = True
  # Pruning: whether each layer is ranked by itself, or all layers together, so
  # that some become sparser than others.
  scope: Scope = 'layer'
  # Pruning: share of the run before which the network is dense, in [0, stop).
  pruning_start: float = 0.2
  # Top-KAST: connections that are trained for each that is computed with.
  backward_factor: float = 2.0
  # Top-KAST: coefficient of the exploration penalty.
  penalty: float = 1e-4


class Lengths(NamedTuple):
  """What the settings are shares of.

  Attributes:
    num_steps: training steps of the run.
    steps_per_epoch: training steps in which every example is seen once.
    num_weights: weights that could be connections, in all layers together.
  """

  num_steps: int
  steps_per_epoch: int
  num_weights: int


class _Recipe(NamedTuple):
  """What a method takes where the settings say nothing.

  Attributes:
    alias: of optim/aliases.
    takes: names of the arguments that it has, see _arguments.
    distribution: name of the distribution.
    stop: share of the run.
    period: steps, from the lengths.
    drop_fraction: share of the connections.
  """

  alias: Callable[..., optax.GradientTransformationExtraArgs]
  takes: tuple[str, ...]
  distribution: str = 'uniform'
  stop: float = 0.75
  period: Callable[[Lengths], int] = lambda lengths: 100
  drop_fraction: float = 0.3


_RANDOM = ('key', 'structure')
_REWIRED = ('stop', 'period', 'regrow', 'key')
_epoch = lambda lengths: lengths.steps_per_epoch
_RECIPES = {
  'static': _Recipe(aliases.static, _RANDOM),
  'pruning': _Recipe(
    aliases.gradual_pruning,
    ('start', 'stop', 'period', 'structure', 'scope'),
    period=lambda lengths: max(1, lengths.num_steps // 100),
  ),
  'one_shot': _Recipe(aliases.one_shot_pruning, ('step', 'structure', 'scope')),
  'set': _Recipe(
    aliases.sparse_evolution,
    (*_REWIRED, 'drop_fraction', 'structure', 'ablation'),
    'erk',
  ),
  'rigl': _Recipe(
    aliases.rigl, (*_REWIRED, 'drop_fraction', 'structure', 'ablation'), 'erk'
  ),
  # The last epoch ends with the run, so its rewiring never comes.
  'snfs': _Recipe(
    aliases.snfs,
    (*_REWIRED, 'drop_fraction', 'structure', 'redistribute'),
    stop=1.0,
    period=_epoch,
    drop_fraction=0.5,
  ),
  # The authors' 600 are 4.5 % of LeNet-300-100 at density 0.05, too few.
  'dsr': _Recipe(aliases.dsr, (*_REWIRED, 'num_dropped'), 'erk'),
  'top_kast': _Recipe(
    aliases.top_kast,
    ('backward_sparsity', 'stop', 'period', 'penalty'),
    'erk',
    stop=1.0,
  ),
}


def make_tx(
  inner: optax.GradientTransformation,
  method: Method,
  density: float,
  config: SparseConfig,
  lengths: Lengths,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over φ that trains with a sparse method.

  Args:
    inner: the optimiser, powerprop included; see optimizers.make_tx.
    density: share of the weights that are connections, in (0, 1]; for pruning
      in the end. The dense network takes 1 only.
    key: of first masks and random growth.

  Returns:
    sparsify around inner; inner itself for 'dense'.

  Raises:
    UserError: if the method is unknown or a setting does not fit it; the line
      names the method and the density. That a layer would lose all its weights
      is a ValueError from init.

  Note:
    RigL has distribution erk, period 100 and drop fraction 0.3 on every data
    set; so has SET, whose own recipe the comparisons in the literature do not
    follow either. SNFS starts from equal densities in all layers, as its code
    does, and 'static' and 'pruning' have them too, as where SNFS compares with
    them. DSR and Top-KAST have ERK against their papers, since with equal
    densities they fall behind, or die, at 1 % of the weights; and DSR moves
    more connections than its paper's 600.
  """
  _check_known(method)
  sparsity = masks_lib.density_to_sparsity(density)
  _check(config)
  if method == 'dense':
    if sparsity:
      raise UserError(f'the dense network has density 1, got {density:g}.')
    return optax.with_extra_args_support(inner)
  recipe = _RECIPES[method]
  if config.structure != 'unstructured' and 'structure' not in recipe.takes:
    raise UserError(
      f'{method} has no structure {config.structure!r}. Leave the structure or '
      'the method out.'
    )
  every = _arguments(recipe, sparsity, config, lengths) | {'key': key}
  stop = stop_of(method, config, lengths.num_steps)
  every |= {'stop': stop, 'step': stop}
  arguments = {name: every[name] for name in ('distribution', *recipe.takes)}
  try:
    return recipe.alias(inner, sparsity, **arguments)
  except ValueError as error:
    raise UserError(f'{method} at density {density:g}: {error}') from error


def for_settings(
  optimizer: OptimizerConfig,
  alpha: float,
  method: Method,
  density: float,
  config: SparseConfig,
  lengths: Lengths,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """make_tx around powerprop around the optimiser of the settings.

  Its update is written twice where that is faster (scale/fusing.py): for an
  optimiser of a few operations a weight, and a method where the compiler has
  been told to make one loop of several.
  """
  inner = optimizers.make_tx(optimizer, alpha, lengths.num_steps)
  tx = make_tx(inner, method, density, config, lengths, key)
  is_fast = method == 'dense' or fusing.fuses_loops()
  return fusing.fused(tx) if optimizer.is_elementwise and is_fast else tx


def lengths_of(loop: LoopConfig, theta: Params, num_examples: int) -> Lengths:
  """What the settings are shares of; theta may be shapes."""
  num_weights = sum(
    leaf.value.size
    for leaf in trees.named_leaves(theta)
    if select_lib.is_weight(*leaf)
  )
  epoch = -(-num_examples // loop.batch_size)
  return Lengths(loop.num_steps, epoch, num_weights)


def about(method: Method) -> str:
  """What a method does, in a line.

  Example:
    >>> about('rigl')
    'RigL: drops the smallest weights, grows where the gradient is largest.'
  """
  _check_known(method)
  if method == 'dense':
    return 'Trains all weights.'
  return str(_RECIPES[method].alias.__doc__).partition('\n')[0]


def settings_of(method: Method) -> tuple[str, ...]:
  """Names of the settings, of SparseConfig, that a method has.

  Example:
    >>> settings_of('static')
    ('distribution', 'structure')
  """
  _check_known(method)
  if method == 'dense':
    return ()
  takes = ('distribution', *_RECIPES[method].takes)
  fields = (field.name for field in dataclasses.fields(SparseConfig))
  return tuple(
    name
    for name in fields
    if any(taken in takes for taken in (name, *_SETTINGS.get(name, ())))
  )


# What a setting is called among the arguments, where that is another name.
_SETTINGS = {
  'stop': ('step',),
  'drop_fraction': ('num_dropped',),
  'pruning_start': ('start',),
  'backward_factor': ('backward_sparsity',),
}


def stop_of(method: Method, config: SparseConfig, num_steps: int) -> int:
  """The step of a run from which on connections stay as they are.

  Example:
    >>> stop_of('rigl', SparseConfig(), 1_000)
    750
  """
  _check_known(method)
  if 'stop' not in settings_of(method):
    return 0
  stop = _RECIPES[method].stop if config.stop is None else config.stop
  return round(stop * num_steps)


def check_settings(method: Method, config: SparseConfig) -> None:
  """Refuses settings that a method does not have, in a UserError.

  For programs that train with one method; those that compare several have
  settings for all of them.
  """
  known = settings_of(method)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != field.default and field.name not in known:
      has = f'has {", ".join(known)}' if known else 'has none of these settings'
      raise UserError(
        f'sparse.{field.name} is {value}, but {method} {has}. Leave it out.'
      )


def _check_known(method: str) -> None:
  if method not in METHODS:
    raise UserError(
      f'unknown method {method!r}.{names.hint(method, METHODS)} There are: '
      f'{", ".join(METHODS)}.'
    )


def _arguments(
  recipe: _Recipe, sparsity: float, config: SparseConfig, lengths: Lengths
) -> Row:
  """All arguments that aliases may have, by their names, but steps and key."""
  drop = recipe.drop_fraction
  if config.drop_fraction is not None:
    drop = config.drop_fraction
  ablation = None
  if config.ablation is not None:
    hidden = select_lib.exclude(select_lib.is_weight, 'logits')
    ablation = Ablation(hidden, config.ablation)
  trained = min(1.0, config.backward_factor * (1 - sparsity))
  connections = (1 - sparsity) * lengths.num_weights
  return {
    'distribution': _DISTRIBUTIONS[config.distribution or recipe.distribution],
    'structure': config.structure,
    'scope': config.scope,
    'start': round(config.pruning_start * lengths.num_steps),
    'period': config.period or recipe.period(lengths),
    'drop_fraction': drop,
    'num_dropped': max(1, round(drop * connections)),
    'regrow': config.regrow,
    'redistribute': config.redistribute,
    'ablation': ablation,
    'backward_sparsity': round(1 - trained, 12),
    'penalty': config.penalty,
  }


def _check(config: SparseConfig) -> None:
  check = functools.partial(errors.check, config)
  if config.period is not None:
    check('period', config.period >= 1, 'at least 1')
  if config.stop is not None:
    check('stop', 0 < config.stop <= 1, 'a share of the run, in (0, 1]')
  if config.drop_fraction is not None:
    check('drop_fraction', 0 < config.drop_fraction < 1, 'in (0, 1)')
  if config.ablation is not None:
    needed = 'a share of the inputs of a neuron, in (0, 1]'
    check('ablation', 0 < config.ablation <= 1, needed)
  start, factor = config.pruning_start, config.backward_factor
  check('pruning_start', 0 <= start < 1, 'a share of the run, in [0, 1)')
  check('backward_factor', 1 <= factor < math.inf, 'at least 1 and finite')
  check('penalty', 0 <= config.penalty < math.inf, 'at least 0 and finite')
