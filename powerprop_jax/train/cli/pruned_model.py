"""One trained network, from a run or from a file, ready to be used.

from_run prunes a network of a run as `powerprop prune` does, and describes it
well enough that a file of it says all there is to know; model_of gives the
function back, from that description.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Tree
from powerprop_jax.export import export
from powerprop_jax.export import exported as exported_lib
from powerprop_jax.export.exported import Exported
from powerprop_jax.export.inference import Function
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import views
from powerprop_jax.prune import one_shot
from powerprop_jax.train import ensemble
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train.runs import divergence
from powerprop_jax.train.runs import load as load_run
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.load import Trained


@dataclasses.dataclass(frozen=True)
class PruneOnce:
  """Which network of a run, and what is left of it."""

  # Of a run: share of weights to keep, in (0, 1]; 1 leaves it as it is.
  kept: float = 1.0
  # Rank the weights of each layer by themselves, or of all layers together.
  scope: Literal['layer', 'global'] = 'layer'
  # Per layer, the output layer keeps this many times the share, at most all.
  output_factor: float = 1.0
  # Of a run of several networks, the α of the one to take.
  alpha: float | None = None
  # Of a run of several networks, the key of the one to take.
  key: int | None = None

  def check(self) -> None:
    """Raises a UserError for shares that make no sense."""
    masks_lib.density_to_sparsity(self.kept, '--kept')
    output_rule(self.scope, self.output_factor)

  def settings(self) -> Row:
    """These settings alone, where a command has others besides."""
    names = [field.name for field in dataclasses.fields(PruneOnce)]
    return {name: getattr(self, name) for name in names}


class Model(NamedTuple):
  """The network that the description of an exported one is of.

  Attributes:
    net: its name, see nets.make.
    num_classes: labels are below it.
    image_shape: (height, width, channels); of a text, (context,).
    dct: whether its layers have a cosine transform.
  """

  net: str
  num_classes: int
  image_shape: tuple[int, ...]
  dct: bool = False

  def inputs(self, rows: int) -> np.ndarray[Any, Any]:
    """So many random images or texts."""
    rng, shape = np.random.default_rng(0), (rows, *self.image_shape)
    if self.net in nets.TEXT_NAMES:
      return rng.integers(0, self.num_classes, shape, np.int32)
    return rng.random(shape, np.float32)

  def function(self, net_state: Tree) -> Function:
    """The logits of images, as a function of (theta, images)."""
    net = nets.make(self.net, self.num_classes, dct=self.dct)
    return lambda theta, images: net.apply(
      theta, net_state, None, images, False
    )[0]


def output_rule(
  scope: str, factor: float
) -> Callable[[float], dict[str, float]] | None:
  """Overrides for a factor; None for 1, all that --scope global may have."""
  rule = ensemble.keep_more_outputs(factor)
  if factor == 1:
    return None
  if scope == 'global':
    raise UserError(
      '--output-factor is for --scope layer; with --scope global the output '
      'layer is ranked with the others, so leave it out.'
    )
  return rule


def from_run(path: str | pathlib.Path, pruning: PruneOnce) -> Exported:
  """A network of a run, pruned once; nothing in the run is changed.

  Returns:
    The network on the host. Its description has `model` (see Model), `run`
    (settings), step, alpha, key, the pruning, the density of the weights and
    the scores on the test split.
  """
  pruning.check()
  found = load_run.load(path, pruning.alpha, pruning.key)
  index = _chosen(path, found, pruning)
  state = ensemble.take(found.state, index)
  theta = state.theta
  alpha, key = float(found.members.alpha[index]), int(found.members.key[index])
  divergence.refuse(path, (alpha, key), divergence.lost_leaf(theta))
  sparsity = masks_lib.density_to_sparsity(pruning.kept)
  rule = output_rule(pruning.scope, pruning.output_factor)
  more = rule(sparsity) if rule else None
  masks = masks_lib.intersect(
    one_shot.prune(theta, sparsity, scope=pruning.scope, overrides=more),
    views.current_masks(state.phi, state.opt_state),
  )
  theta = masks_lib.apply_masks(theta, masks)
  evaluate = evaluate_lib.make_evaluate(found.net)
  scores = jax.jit(evaluate)(theta, state.net_state, found.splits.test)
  model = Model(
    found.net_name,
    found.splits.num_classes,
    found.splits.train.images.shape[1:],
    found.dct,
  )
  about = {
    'model': model._asdict(),
    'run': found.settings,
    'step': found.step,
    'num_steps': found.num_steps,
    **pruning.settings(),
    'alpha': alpha,
    'key': key,
    'density': float(masks_lib.density(masks, select=select_lib.is_weight)),
    'test': {name: float(value) for name, value in scores.items()},
  }
  return exported_lib.on_host(Exported(theta, masks, state.net_state, about))


def _chosen(
  path: str | pathlib.Path, found: Trained, pruning: PruneOnce
) -> int:
  """Number of the one network that α and key choose."""
  pairs = list(zip(*found.members, strict=True))
  fits = [
    index
    for index, (alpha, key) in enumerate(pairs)
    if pruning.alpha in (None, alpha) and pruning.key in (None, key)
  ]
  if len(fits) == 1:
    return fits[0]
  names = ', '.join(f'{alpha:g} {key}' for alpha, key in pairs)
  raise UserError(
    f'{path} has {"more than one" if fits else "none"} of the networks asked '
    'for; say which with --alpha and --key. Its pairs of α and key are: '
    f'{names}.'
  )


def load(path: str | pathlib.Path, pruning: PruneOnce) -> Exported:
  """A network, on the host, from a run or from a file that export.write wrote.

  Of a file the pruning must be the default, as it is what it is.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    return from_run(path, pruning)
  if not path.exists():
    raise UserError(
      f'there is no {path}. Give the folder of a run, or a file that powerprop '
      'export wrote.'
    )
  if pruning.settings() != PruneOnce().settings():
    raise UserError(
      f'{path} is a file, and is not pruned once more. Leave out --kept and '
      'the options that go with it, or give the folder of its run.'
    )
  exported = export.read(path)
  network = exported.about.get('alpha'), exported.about.get('key')
  divergence.refuse(path, network, divergence.lost_leaf(exported.theta))
  return exported


def model_of(about: Row) -> Model:
  """The network that a description, as from from_run, is of."""
  model = about.get('model') if isinstance(about, dict) else None
  needed = Model._fields[:3]
  if not isinstance(model, dict) or not set(needed) <= set(model):
    raise UserError(
      'the file does not say which network it is of: its description has no '
      "'model' with net, num_classes and image_shape, as that of powerprop "
      'export has. For a network of your own, write its function too: '
      'powerprop_jax.export.program.write.'
    )
  net, num_classes, shape = (model[name] for name in needed)
  return Model(net, num_classes, tuple(shape), model.get('dct', False))
