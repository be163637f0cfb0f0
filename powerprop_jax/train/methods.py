"""A method of sparse training from settings, around an optimiser.

The library's own way is one of the functions of optim/aliases.py; this is for
programs, which compare all methods and read their settings from a command line.
A setting that is None has the value of the method's own paper or code.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax

from powerprop_jax.core import distributions
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Select
from powerprop_jax.optim import aliases
from powerprop_jax.optim.aliases.structures import Structure
from powerprop_jax.optim.topologies.neuron_ablation import Ablation
from powerprop_jax.optim.topology import Regrow
from powerprop_jax.train.runs.errors import UserError

Method = Literal[
  'dense', 'static', 'pruning', 'set', 'rigl', 'snfs', 'dsr', 'top_kast'
]
METHODS = get_args(Method)


def uniform_dense_stem(
  theta: Params, sparsity: float, *, select: Select = select_lib.is_weight
) -> dict[str, float]:
  """The same sparsity for every leaf but the first convolution, left dense.

  The whole network is then a little denser than 1 - sparsity.

  Args:
    theta: parameters of a network whose first layer is called 'stem'.
    sparsity: share of zeros of each other layer, in [0, 1).
    select: which leaves take part.

  Returns:
    Sparsity of each selected leaf, keyed 'module/name'.

  Raises:
    ValueError: if there is no layer 'stem', or as for distributions.uniform.

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
  # Default: erk for SET and RigL, else uniform. In uniform_dense_stem the first
  # convolution is dense and the others have the density asked for, as in RigL.
  distribution: Literal['uniform', 'er', 'erk', 'uniform_dense_stem'] | None = (
    None
  )
  # Steps from one rewiring to the next. Default: 100 for SET, RigL and
  # Top-KAST, an epoch for SNFS and DSR, a hundredth of the run for pruning.
  period: int | None = None
  # Share of the run after which connections stay as they are, in (0, 1].
  # Default: 1 for SNFS and Top-KAST, 0.95 for DSR, else 0.75.
  stop: float | None = None
  # Share of the connections that a rewiring drops, in (0, 1); for SET, RigL and
  # SNFS it falls along half a cosine. Default: 0.3, SNFS 0.5, DSR 0.05.
  drop_fraction: float | None = None
  # First value of a new connection. Default: zero for α = 1, otherwise keep
  # (see optim/sparsify.py). Pruning and Top-KAST prescribe their own.
  regrow: Regrow | None = None
  # constant_fan_in: all neurons of a layer have as many inputs. Not for DSR and
  # Top-KAST.
  structure: Structure = 'unstructured'
  # SET and RigL with constant fan-in: neurons of which less than this share of
  # the inputs is salient lose all of them, in (0, 1]; never in the layer
  # 'logits'. Default: neurons stay.
  ablation: float | None = None
  # SNFS: whether connections move between layers.
  redistribute: bool = True
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
    method: one of METHODS.
    density: share of the weights that are connections, in (0, 1]; for pruning
      in the end. The dense network takes 1 only.
    config: the settings.
    lengths: what the settings are shares of.
    key: seed of first masks and random growth, an int or a PRNG key.

  Returns:
    sparsify around inner; inner itself for 'dense'.

  Raises:
    UserError: if the method is unknown or a setting does not fit it; the line
      names the method and the density. That a layer would lose all its weights
      is a ValueError from init.

  Note:
    RigL has distribution erk, period 100 and drop fraction 0.3 on every data
    set; so has SET, whose own recipe the comparisons in the literature do not
    follow either. SNFS and DSR start from equal densities in all layers, as
    their codes do, and 'static' and 'pruning' have them too, as where SNFS
    compares with them.
  """
  if method not in _MAKERS:
    raise UserError(
      f'unknown method {method!r}; there are: {", ".join(METHODS)}.'
    )
  sparsity = density_to_sparsity(density)
  if method == 'dense' and sparsity:
    raise UserError(f'the dense network has density 1, got {density:g}.')
  _check(config)
  if config.structure != 'unstructured' and method in ('dsr', 'top_kast'):
    raise UserError(
      f'{method} has no structure {config.structure!r}. Leave the structure or '
      'the method away.'
    )
  try:
    return _MAKERS[method](inner, sparsity, config, lengths, key)
  except ValueError as error:
    raise UserError(f'{method} at density {density:g}: {error}') from error


def density_to_sparsity(density: float) -> float:
  """1 - density as people write it: 0.9, not 0.09999999999999998, for 0.1.

  Raises:
    UserError: if density is outside (0, 1].

  Example:
    >>> density_to_sparsity(0.05)
    0.95
  """
  if not 0 <= round(1 - density, 12) < 1:
    raise UserError(
      'densities are shares of the weights that are connections, in (0, 1], '
      f'got {density:g}. A sparsity of 0.9 is a density of 0.1.'
    )
  return round(1 - density, 12)


def _check(config: SparseConfig) -> None:
  def refuse(name: str, expected: str) -> None:
    value = getattr(config, name)
    raise UserError(f'{name} must be {expected}, got {value:g}.')

  if config.period is not None and config.period < 1:
    refuse('period', 'at least 1')
  if config.stop is not None and not 0 < config.stop <= 1:
    refuse('stop', 'a share of the run, in (0, 1]')
  if config.drop_fraction is not None and not 0 < config.drop_fraction < 1:
    refuse('drop_fraction', 'in (0, 1)')
  if config.ablation is not None and not 0 < config.ablation <= 1:
    refuse('ablation', 'a share of the inputs of a neuron, in (0, 1]')
  if not 0 <= config.pruning_start < 1:
    refuse('pruning_start', 'a share of the run, in [0, 1)')
  if not 1 <= config.backward_factor < float('inf'):
    refuse('backward_factor', 'at least 1 and finite')
  if not 0 <= config.penalty < float('inf'):
    refuse('penalty', 'at least 0 and finite')


def _distribution(config: SparseConfig, default: str) -> Any:
  return _DISTRIBUTIONS[config.distribution or default]


def _period(config: SparseConfig, default: int) -> int:
  return default if config.period is None else config.period


def _stop(config: SparseConfig, lengths: Lengths, default: float) -> int:
  share = default if config.stop is None else config.stop
  return round(share * lengths.num_steps)


def _drop_fraction(config: SparseConfig, default: float) -> float:
  return default if config.drop_fraction is None else config.drop_fraction


def _ablation(config: SparseConfig) -> Ablation | None:
  if config.ablation is None:
    return None
  hidden = select_lib.exclude(select_lib.is_weight, 'logits')
  return Ablation(hidden, config.ablation)


def _dense(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  del sparsity, config, lengths, key
  return optax.with_extra_args_support(inner)


def _static(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  del lengths
  distribution = _distribution(config, 'uniform')
  return aliases.static(
    inner,
    sparsity,
    structure=config.structure,
    distribution=distribution,
    key=key,
  )


def _pruning(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  del key
  return aliases.gradual_pruning(
    inner,
    sparsity,
    start=round(config.pruning_start * lengths.num_steps),
    stop=_stop(config, lengths, 0.75),
    period=_period(config, max(1, lengths.num_steps // 100)),
    structure=config.structure,
    distribution=_distribution(config, 'uniform'),
  )


def _drop_and_grow(
  alias: Callable[..., Any],
  inner: Any,
  sparsity: float,
  config: SparseConfig,
  lengths: Lengths,
  key: Any,
) -> Any:
  return alias(
    inner,
    sparsity,
    stop=_stop(config, lengths, 0.75),
    period=_period(config, 100),
    drop_fraction=_drop_fraction(config, 0.3),
    structure=config.structure,
    ablation=_ablation(config),
    distribution=_distribution(config, 'erk'),
    regrow=config.regrow,
    key=key,
  )


def _snfs(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  # The last epoch ends with the run, so its rewiring never comes.
  return aliases.snfs(
    inner,
    sparsity,
    stop=_stop(config, lengths, 1.0),
    period=_period(config, lengths.steps_per_epoch),
    drop_fraction=_drop_fraction(config, 0.5),
    redistribute=config.redistribute,
    structure=config.structure,
    distribution=_distribution(config, 'uniform'),
    regrow=config.regrow,
    key=key,
  )


def _dsr(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  connections = (1 - sparsity) * lengths.num_weights
  return aliases.dsr(
    inner,
    sparsity,
    stop=_stop(config, lengths, 0.95),
    period=_period(config, lengths.steps_per_epoch),
    # The authors' 600 are 4.5 % of LeNet-300-100 at density 0.05.
    num_dropped=max(1, round(_drop_fraction(config, 0.05) * connections)),
    distribution=_distribution(config, 'uniform'),
    regrow=config.regrow,
    key=key,
  )


def _top_kast(
  inner: Any, sparsity: float, config: SparseConfig, lengths: Lengths, key: Any
) -> Any:
  del key
  trained = min(1.0, config.backward_factor * (1 - sparsity))
  return aliases.top_kast(
    inner,
    sparsity,
    round(1 - trained, 12),
    stop=_stop(config, lengths, 1.0),
    period=_period(config, 100),
    penalty=config.penalty,
    distribution=_distribution(config, 'uniform'),
  )


_MAKERS: dict[str, Callable[..., Any]] = {
  'dense': _dense,
  'static': _static,
  'pruning': _pruning,
  'set': functools.partial(_drop_and_grow, aliases.sparse_evolution),
  'rigl': functools.partial(_drop_and_grow, aliases.rigl),
  'snfs': _snfs,
  'dsr': _dsr,
  'top_kast': _top_kast,
}
