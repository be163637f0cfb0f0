"""A training run on photographs, put together from settings.

assemble ─▶ ImageRun: data, network, step, state on a mesh of devices
Evaluation: scores of a state; Best: the file with the best network
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import haiku as hk
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments.imagenet_resnet50 import config as config_lib
from experiments.imagenet_resnet50 import setup
from experiments.imagenet_resnet50.config import PROGRAM, Config
from experiments.imagenet_resnet50.setup import Weights
from powerprop_jax import nets
from powerprop_jax.core.trees import Tree
from powerprop_jax.export import export
from powerprop_jax.export.exported import Exported
from powerprop_jax.files.tables import Row
from powerprop_jax.train import evaluate
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli.pruned_model import Model
from powerprop_jax.train.images import sources
from powerprop_jax.train.images.batches import Batches
from powerprop_jax.train.images.sources import Images
from powerprop_jax.train.images.stream import DeviceStream, Stream
from powerprop_jax.train.runs.contents import Contents, Page
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import guard, sharding
from powerprop_jax.train.scale.guard import GuardedState


class ImageRun(NamedTuple):
  """What a run is made of; nothing has been computed yet.

  Attributes:
    config: the settings.
    images: the batches of this host.
    net: the network.
    mesh: the devices.
    make: makes the state before the first step; pure.
    shapes: its shapes.
    step: (state, images, labels) -> (state, metrics); pure.
  """

  config: Config
  images: Images
  net: hk.TransformedWithState
  mesh: jax.sharding.Mesh
  make: Callable[[], GuardedState]
  shapes: Tree
  step: guard.GuardedStep

  @property
  def shardings(self) -> Tree:
    """Where each leaf of the state lies."""
    mode = self.config.mesh.mode
    return sharding.state_shardings(self.shapes, self.mesh, mode)

  def template(self) -> Tree:
    """Shapes of the state that say where they lie, to restore it to."""
    return sharding.template(self.shapes, self.shardings)

  def create(self) -> GuardedState:
    """The state before the first step, where it lies."""
    state: GuardedState = sharding.create_sharded(
      self.make, self.mesh, self.config.mesh.mode
    )
    return state

  def jitted_step(self) -> guard.GuardedStep:
    """The compiled step; its first argument is donated."""
    return sharding.on_mesh(self.step, self.shardings, self.mesh)

  def stream(self, batches: Batches) -> DeviceStream:
    """Those of images.train or images.test, on the devices."""
    stream = Stream(batches, num_workers=self.config.data.workers)
    return DeviceStream(stream, sharding.batch_sharding(self.mesh))


def assemble(config: Config) -> ImageRun:
  """Puts a run together and refuses what cannot be trained."""
  config_lib.check(config)
  mesh = _mesh(config)
  for size in (config.recipe.batch_size, config.data.test_batch):
    if size is not None:
      sharding.check_batch(size, mesh)
  images = sources.open_images(
    config.data,
    config.recipe.batch_size,
    key=config.key,
    host_index=jax.process_index(),
    host_count=jax.process_count(),
  )
  net = setup.make_net(config.net, images.num_classes)
  side = config.data.image_size
  theta = setup.shapes(net, side)
  tx = setup.make_tx(config, images.num_examples, theta, config.key)

  def make() -> GuardedState:
    key, first = jax.random.key(config.key), jnp.zeros((1, side, side, 3))
    return guard.create(step_lib.create(net, tx, key, first))

  try:
    shapes = jax.eval_shape(make)
  except ValueError as error:
    raise UserError(
      f'{config.method} at sparsity {config.sparsity:g}: {error}'
    ) from error
  step = guard.guarded(setup.make_step(net, tx, config.recipe))
  return ImageRun(config, images, net, mesh, make, shapes, step)


def _mesh(config: Config) -> jax.sharding.Mesh:
  num, there = config.mesh.devices, jax.devices()
  if num is not None and not 1 <= num <= len(there):
    raise UserError(
      f'--mesh.devices must be from 1 to {len(there)}, as many as there are, '
      f'got {num}.'
    )
  return sharding.make_mesh(
    config.mesh.data, config.mesh.model, devices=there[:num]
  )


# What commands that export a network are told.
_EXPORTED = (
  'its best network is exported already, as best.npz in its folder. Give '
  'powerprop bench that file, or export.read in Python.'
)
# Takes in a network, the step that it is of, and its scores.
Keep = Callable[[Weights, int, dict[str, float]], None]


class Evaluation:
  """Scores of a run's states on the evaluation split.

  Called with a state, it gives validation_loss, validation_accuracy and
  validation_top_5, and validation_accuracy_ema where there is a running mean.
  keep is given what was evaluated, the mean where there is one, such as a Best.
  """

  def __init__(self, run: ImageRun, keep: Keep | None = None):
    self._run = run
    self._keep = keep
    self._score = jax.jit(
      evaluate.make_score(run.net, setup.normalise),
      out_shardings=sharding.replicated(run.mesh),
    )
    weights = functools.partial(setup.weights, config=run.config)
    self._weights = [jax.jit(functools.partial(weights, mean=False))]
    if run.config.recipe.ema:
      self._weights.append(jax.jit(functools.partial(weights, mean=True)))
    self._last: tuple[int, dict[str, float]] = -1, {}

  def __call__(self, state: GuardedState) -> dict[str, float]:
    """Scores of a state."""
    found = [weights(state.train) for weights in self._weights]
    scores = [self.of_weights(each) for each in found]
    named = {f'validation_{name}': x for name, x in scores[0].items()}
    if len(scores) > 1:
      named['validation_accuracy_ema'] = scores[1]['accuracy']
    step = _batches_seen(state)
    self._last = step, named
    if self._keep is not None:
      self._keep(found[-1], step, scores[-1])
    return named

  def final(self, state: GuardedState) -> Row:
    """Scores of the state after the last step, as a flat record.

    It has step, num_skipped, loss, accuracy, top_5, density, and perhaps
    accuracy_ema; for one-shot pruning accuracy_dense, that of the network
    before.
    """
    step, scores = self._last
    if step != _batches_seen(state):
      scores = self(state)
    record: Row = {
      'step': _batches_seen(state),
      'num_skipped': int(state.num_skipped),
      **{k.removeprefix('validation_'): v for k, v in scores.items()},
      'density': setup.density(self._weights[0](state.train)),
    }
    config = self._run.config
    if config.method == 'one_shot':
      dense = dataclasses.replace(config, method='dense', sparsity=0.0)
      before = self.of_weights(setup.weights(state.train, dense))
      record['accuracy_dense'] = before['accuracy']
    return record

  def of_export(self, exported: Exported) -> Row:
    """loss, accuracy, top_5 and density of a network of the run's settings."""
    whole = sharding.replicated(self._run.mesh)
    found = Weights(*jax.device_put(exported[:3], whole))
    return {**self.of_weights(found), 'density': setup.density(found)}

  def of_weights(self, found: Weights) -> dict[str, float]:
    """loss, accuracy and top_5 of a network."""
    with self._run.stream(self._run.images.test) as stream:
      score = functools.partial(self._score, found.theta, found.net_state)
      scores = evaluate.evaluate(score, stream)
    return {name: scores[name] for name in ('loss', 'accuracy', 'top_5')}


class Best:
  """Writes best.npz whenever the accuracy is higher than ever before.

  All hosts call it, the first one writes. The settings, made of what JSON
  holds, are what the file says about the run.
  """

  def __init__(self, folder: RunFolder, settings: Row, run: ImageRun):
    self._path = folder.path / 'best.npz'
    self._about = {'settings': settings, **model(run)}
    whole = sharding.replicated(run.mesh)
    self._gather = jax.jit(lambda tree: tree, out_shardings=whole)
    self._accuracy = self._stored() if folder.is_resumed else -1.0

  def _stored(self) -> float:
    """That of the file, the same on all hosts; -1 for none."""
    best = -1.0
    if self._path.exists() and not jax.process_index():
      best = float(export.read(self._path).about['scores']['accuracy'])
    if jax.process_count() > 1:
      best = float(multihost_utils.broadcast_one_to_all(np.float32(best)))
      # Rounded, it may be below what was rounded.
      best = math.nextafter(best, 1.0) if best > 0 else best
    return best

  def __call__(
    self, found: Weights, step: int, scores: dict[str, float]
  ) -> None:
    """Writes the network of a step, if it is the best one."""
    # All hosts know the same scores, and gather the weights together.
    if scores['accuracy'] <= self._accuracy:
      return
    self._accuracy = scores['accuracy']
    gathered = self._gather(found)
    if jax.process_index():
      return
    about = {**self._about, 'step': step, 'scores': scores}
    theta, masks, net_state = jax.device_get(gathered)
    best = Exported(theta, masks, net_state, about)
    export.write(self._path, best, format='npz', overwrite=True)


def model(run: ImageRun) -> Row:
  """What `powerprop bench` needs to know of a network that is in nets."""
  config, side = run.config.net, run.config.data.image_size
  net = f'resnet_{config.depth}'
  if net not in nets.NAMES or config.width != 1:
    return {}
  found = Model(net, run.images.num_classes, (side, side, 3))
  return {'model': found._asdict()}


def _batches_seen(state: GuardedState) -> int:
  """Steps of the loop: those that were made and those that were skipped."""
  return int(state.train.step) + int(state.num_skipped)


def open_folder(
  out: str, settings: Row, *, resume: bool, page: Page | None = None
) -> RunFolder:
  """The RunFolder that all hosts share; the first one makes it.

  Its is_resumed is the same on all hosts, and so is a UserError.
  """
  open_as = functools.partial(
    RunFolder,
    out,
    settings,
    program=PROGRAM,
    contents=Contents(page=page, instead=_EXPORTED),
  )
  if jax.process_count() == 1:
    return open_as(resume=resume)
  # 0: refused; 1: a new run; 2: one that goes on.
  problem, folder, status = None, None, 0
  if not jax.process_index():
    try:
      folder = open_as(resume=resume)
      status = 1 + folder.is_resumed
    except UserError as error:
      problem = error
  status = int(multihost_utils.broadcast_one_to_all(np.int32(status)))
  if not status:
    raise problem or UserError(f'host 0 cannot use {out} as the output folder.')
  folder = folder or open_as(resume=True)
  folder.is_resumed = status == 2
  return folder
