"""Many tasks in one network: PackNet, EfficientPackNet, streams and metrics.

`task_streams` makes streams of tasks, `metrics` says how well they were
learned. The optimiser is sparsify(inner, protected()) with any inner.
"""

from powerprop_jax.continual import metrics, task_streams
from powerprop_jax.continual.config import PackConfig, equal_density
from powerprop_jax.continual.packnet import Learner, init_pack, learn
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
from powerprop_jax.optim.topologies.protected import (
  Protection,
  protected,
  with_protection,
)

__all__ = (
  'CapacityError',
  'Found',
  'Layout',
  'Learner',
  'PackConfig',
  'PackState',
  'PackedTask',
  'Protection',
  'TaskReport',
  'Trial',
  'equal_density',
  'from_arrays',
  'init_pack',
  'learn',
  'metrics',
  'num_free',
  'predict',
  'protected',
  'sparsest',
  'task_masks',
  'task_params',
  'task_streams',
  'to_arrays',
  'with_protection',
)
