"""Many tasks in one network: streams, PackNet, EfficientPackNet, metrics."""

from powerprop_jax.continual.config import PackConfig, equal_density
from powerprop_jax.continual.packnet import (
  Learner,
  init_pack,
  learn,
)
from powerprop_jax.continual.search import Found, Trial, sparsest
from powerprop_jax.continual.state import (
  CapacityError,
  Layout,
  PackedTask,
  PackState,
  TaskReport,
  num_free,
  predict,
  task_masks,
  task_params,
)
from powerprop_jax.continual.storage import from_arrays, to_arrays

__all__ = (
  'CapacityError',
  'Found',
  'Layout',
  'Learner',
  'PackConfig',
  'PackState',
  'PackedTask',
  'TaskReport',
  'Trial',
  'equal_density',
  'from_arrays',
  'init_pack',
  'learn',
  'num_free',
  'predict',
  'sparsest',
  'task_masks',
  'task_params',
  'to_arrays',
)
