"""One combination of method, density and α, trained or read."""

from experiments.common import combinations as combination_runs
from experiments.common import sparse_runs
from experiments.common.sparse_runs import Combination
from experiments.sparse_training.config import Config
from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs.folder import RunFolder

PROGRAM = 'sparse_training'


def train_or_read(
  config: Config, description: str, combination: Combination
) -> list[Row]:
  """Results of a combination: trained, or read where that is done."""

  def train(folder: RunFolder) -> list[Row]:
    trained = sparse_runs.train(
      config,
      combination,
      folder,
      execution=config.execution,
      description=description,
    )
    return sparse_runs.results(combination, trained)

  settings = combination_runs.settings(config) | combination._asdict()
  return combination_runs.once(
    train, config.out, combination, settings, PROGRAM
  )
