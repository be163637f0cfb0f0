"""One trained network, from a run or from a file, ready to be used.

from_run prunes a network of a run as `powerprop prune` does, and describes it
well enough that a file of it says all there is to know; make gives the function
back, from that description.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import jax
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.export import export, sparse_mlp
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export.exported import Exported
from powerprop_jax.export.inference import Make
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import views
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train.runs import divergence
from powerprop_jax.train.runs import load as trained
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.load import Trained


@dataclasses.dataclass(frozen=True)
class PruneOnce:
  """Which network of a run, and what is left of it.

  Attributes:
    kept: share of the weights to keep, in (0, 1]; 1 leaves it as it is.
    scope: rank the weights of each layer by themselves, or of all together.
    output_factor: per layer, the output layer keeps this many times the share.
    alpha: of a run of several networks, the α of the one to take.
    key: likewise its key.
  """

  kept: float = 1.0
  scope: Literal['layer', 'global'] = 'layer'
  output_factor: float = 1.0
  alpha: float | None = None
  key: int | None = None

  def check(self) -> None:
    """Raises a UserError for shares that make no sense."""
    masks_lib.density_to_sparsity(self.kept, '--kept')
    check_output_factor(self.scope, self.output_factor)


def check_output_factor(scope: str, factor: float) -> None:
  """Refuses a factor that is not positive, or goes with --scope global.

  Args:
    scope: 'layer' or 'global'.
    factor: how many times the share the output layer keeps.

  Raises:
    UserError: saying so.
  """
  ensemble.keep_more_outputs(factor)
  if scope == 'global' and factor != 1:
    raise UserError(
      '--output-factor is for --scope layer; with --scope global the output '
      'layer is ranked with the others, so leave it away.'
    )


def from_run(path: str | pathlib.Path, pruning: PruneOnce) -> Exported:
  """A network of a run, pruned once; nothing in the run is changed.

  Args:
    path: folder of a run, see trained.load.
    pruning: which network, and how much of it to keep.

  Returns:
    The network on the host. Its description has `model` (what make needs),
    `run` (settings), step, alpha, key, the pruning, the density of the weights
    and the scores on the test split.

  Raises:
    UserError: as trained.load; if the pruning makes no sense, the run has
      several networks and it does not say which, or a weight is not finite.
  """
  pruning.check()
  found = trained.load(path)
  lane = _lane(path, found, pruning)
  state = jax.tree.map(lambda x: x[lane], found.state)
  theta = state.theta
  alpha, key = float(found.lanes.alpha[lane]), int(found.lanes.key[lane])
  divergence.refuse(path, (alpha, key), divergence.lost_leaf(theta))
  masks = _masks(state, theta, pruning)
  theta = masks_lib.apply_masks(theta, masks)
  evaluate = jax.jit(evaluate_lib.make_evaluate(found.net))
  scores = evaluate(theta, state.net_state, found.splits.test)
  about = {
    'model': {
      'net': found.settings['net'],
      'num_classes': found.splits.num_classes,
      'image_shape': list(found.splits.train.images.shape[1:]),
    },
    'run': found.settings,
    'step': found.step,
    'num_steps': found.num_steps,
    **dataclasses.asdict(pruning),
    'alpha': alpha,
    'key': key,
    'density': float(masks_lib.density(masks, select=select_lib.is_weight)),
    'test': {name: float(value) for name, value in scores.items()},
  }
  return exported_lib.on_host(Exported(theta, masks, state.net_state, about))


def _lane(path: str | pathlib.Path, found: Trained, pruning: PruneOnce) -> int:
  """Number of the one network that α and key choose."""
  fits = np.ones(len(found.lanes.key), bool)
  for name in ('alpha', 'key'):
    wanted = getattr(pruning, name)
    if wanted is not None:
      fits &= getattr(found.lanes, name) == wanted
  if fits.sum() == 1:
    return int(fits.argmax())
  pairs = ', '.join(f'{a:g} {k}' for a, k in zip(*found.lanes, strict=True))
  asked = 'more than one' if fits.any() else 'none'
  raise UserError(
    f'{path} has {asked} of the networks asked for; say which with --alpha and '
    f'--key. Its pairs of α and key are: {pairs}.'
  )


def _masks(state: Tree, theta: Params, pruning: PruneOnce) -> Tree:
  factor = pruning.output_factor
  sparsity = masks_lib.density_to_sparsity(pruning.kept)
  overrides = (
    ensemble.keep_more_outputs(factor)(sparsity) if factor != 1 else None
  )
  masks = one_shot.prune(
    theta, sparsity, scope=pruning.scope, overrides=overrides
  )
  return masks_lib.intersect(
    masks, views.current_masks(state.phi, state.opt_state)
  )


def load(path: str | pathlib.Path, pruning: PruneOnce) -> Exported:
  """A network from a run or from an exported file.

  Args:
    path: folder of a run, or a file that export.write wrote.
    pruning: for a run; the default for a file, which is what it is.

  Returns:
    The network on the host.

  Raises:
    UserError: as from_run; if there is nothing at the path, the pruning of a
      file is asked for, or a weight in it is not finite.
    ValueError: as export.read.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    return from_run(path, pruning)
  if not path.exists():
    raise UserError(
      f'there is no {path}. Give the folder of a run, or a file that powerprop '
      'export wrote.'
    )
  if pruning != PruneOnce():
    raise UserError(
      f'{path} is a file, and is not pruned once more. Leave away --kept and '
      'the options that go with it, or give the folder of its run.'
    )
  exported = export.read(path)
  network = exported.about.get('alpha'), exported.about.get('key')
  divergence.refuse(path, network, divergence.lost_leaf(exported.theta))
  return exported


def make(about: Row) -> Make:
  """The network that a description is of.

  Args:
    about: as from from_run.

  Returns:
    A function of the supports, as nets.make is.

  Raises:
    UserError: if the description does not say.
  """
  model = _model(about)
  return functools.partial(nets.make, model['net'], model['num_classes'])


def net_name(about: Row) -> str:
  """What nets.make calls a network; see make."""
  return str(_model(about)['net'])


def image_shape(about: Row) -> tuple[int, ...]:
  """(height, width, channels) of the images of a network; see make."""
  return tuple(_model(about)['image_shape'])


def _model(about: Row) -> Row:
  model = about.get('model') if isinstance(about, dict) else None
  if not isinstance(model, dict) or not {
    'net',
    'num_classes',
    'image_shape',
  } <= set(model):
    raise UserError(
      'the file does not say which network it is of: its description has no '
      "'model' with net, num_classes and image_shape, as that of powerprop "
      'export has.'
    )
  return model


def is_mlp(exported: Exported) -> bool:
  """Whether SciPy can run a network: layers follow each other, ReLU between."""
  return sparse_mlp.is_mlp(exported.theta, exported.net_state)
