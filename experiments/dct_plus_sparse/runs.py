"""One combination of network, support, density and α, trained or read."""

import functools

from experiments.common import combinations
from experiments.dct_plus_sparse import (
  training,
)
from experiments.dct_plus_sparse.config import Config
from experiments.dct_plus_sparse.training import Combination
from powerprop_jax.files.tables import Row

PROGRAM = 'dct_plus_sparse'


def settings(config: Config) -> Row:
  """What the results depend on; the times of steps are measured again."""
  return combinations.settings(config, 'timed_steps')


def train_or_read(
  config: Config, description: str, combination: Combination
) -> list[Row]:
  """Results of a combination: trained, or read where that is done."""
  return combinations.once(
    functools.partial(training.train, config, combination, description),
    config.out,
    combination,
    settings(config) | combination._asdict(),
    PROGRAM,
  )
