"""What version 0.1.0 had elsewhere: it still works, once, with a warning."""

from collections.abc import Sequence
import importlib
from importlib import abc, machinery, util
import sys
from types import CodeType, ModuleType
from typing import Any
import warnings

# Names of `pp.` by the room that they are in now.
_NAMES = {
  'at_init': (
    *('LayerCollapseWarning', 'classification_loss', 'iterative_snip'),
    *('masks_from_scores', 'neutral_norm_state', 'synflow_masks'),
    *('force', 'grasp', 'snip', 'synflow'),
  ),
  'costs': (
    *('flops_table', 'inference_flops', 'layer_costs', 'model_bytes'),
    'training_flops',
  ),
  'core.top_k.topk': ('top_k_masks',),
  'core.top_k.topk_columns': ('top_k_columns',),
  'distributions': ('equal_per_filter', 'equal_per_layer', 'er'),
  'masks': (
    *('density', 'full_masks', 'intersect', 'num_kept', 'overlap'),
    *('pack_masks', 'union', 'unpack_masks'),
  ),
  'nets': (*('DctConv2D', 'DctLinear'),),
  'optim.alphas.alpha': ('AlphaState', 'next_alpha'),
  'schedules': ('at', 'constant', 'every', 'never', 'one_shot', 'polynomial'),
  'scores': ('gradient', 'magnitude', 'random', 'saliency'),
}
_ROOMS = {name: room for room, names in _NAMES.items() for name in names}

# Modules that its documentation named.
_MODULES = {
  'report.export': 'export.export',
  'report.export_program': 'export.program',
  'report.inference': 'export.inference',
  'report.sparse_matrices': 'export.sparse_matrices',
  'report.sparse_mlp': 'export.sparse_mlp',
  'report.flops': 'costs.flops',
  'train.checkpoint': 'train.checkpoints.checkpoint',
  'train.device_stream': 'train.images.stream',
  'train.distributed': 'train.scale.distributed',
  'train.guard': 'train.scale.guard',
  'train.image_batches': 'train.images.batches',
  'train.image_stream': 'train.images.stream',
  'train.sharding': 'train.scale.sharding',
  'train.state': 'train.step',
}
_PACKAGE = 'powerprop_jax'


def attribute(name: str) -> Any:
  """What `pp.name` was.

  Raises:
    AttributeError: if there never was one.
  """
  room = _ROOMS.get(name)
  if room is None:
    raise AttributeError(f'module {_PACKAGE!r} has no attribute {name!r}')
  is_public = '.' not in room
  new = f'pp.{room}.{name}' if is_public else f'{_PACKAGE}.{room}.{name}'
  warnings.warn(f'pp.{name} is now {new}.', DeprecationWarning, stacklevel=3)
  root = sys.modules[_PACKAGE]
  found = (
    getattr(root, room)
    if is_public
    else importlib.import_module(f'{_PACKAGE}.{room}')
  )
  return getattr(found, name)


class _Finder:
  """Finds modules under the names that they had."""

  def find_spec(
    self, name: str, path: Sequence[str] | None, target: Any = None
  ) -> machinery.ModuleSpec | None:
    old = name.removeprefix(f'{_PACKAGE}.')
    if old == name or old not in _MODULES:
      return None
    return machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

  def create_module(self, spec: machinery.ModuleSpec) -> ModuleType | None:
    return None

  def exec_module(self, module: ModuleType) -> None:
    # What is in sys.modules afterwards is what the import gives.
    sys.modules[module.__name__] = importlib.import_module(
      _new(module.__name__)
    )

  def get_code(self, name: str) -> CodeType | None:
    """What python -m runs."""
    spec = util.find_spec(_new(name))
    assert spec is not None and isinstance(spec.loader, abc.InspectLoader)
    return spec.loader.get_code(spec.name)


def _new(old: str) -> str:
  new = f'{_PACKAGE}.{_MODULES[old.removeprefix(f"{_PACKAGE}.")]}'
  warnings.warn(f'{old} is now {new}.', DeprecationWarning, stacklevel=3)
  return new


def keep_modules() -> None:
  """Makes imports of modules that moved find them."""
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
