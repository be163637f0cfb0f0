"""A training run on photographs, put together from settings.

assemble ─▶ ImageRun: data, network, step, state on a mesh of devices
Evaluation: scores of a state, and the file with the best network
"""

from collections.abc import Callable
import functools
import math
import pathlib
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments.imagenet_resnet50 import setup
from experiments.imagenet_resnet50.setup import (
  NetConfig,
  RecipeConfig,
  Task,
  Weights,
)
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.export import export
from powerprop_jax.export.exported import Exported
from powerprop_jax.files.tables import Row
from powerprop_jax.train import evaluate
from powerprop_jax.train import state as state_lib
from powerprop_jax.train.images import sources
from powerprop_jax.train.images.sources import Images, ImagesConfig
from powerprop_jax.train.images.stream import Stream
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import distributed, guard, sharding
from powerprop_jax.train.scale.device_stream import DeviceStream
from powerprop_jax.train.scale.guard import GuardedState
from powerprop_jax.train.scale.sharding import Mode

_BEST = 'best.npz'


class ImageRun(NamedTuple):
  """What a run is made of; nothing has been computed yet.

  Attributes:
    images: the batches of this host.
    net: the network.
    task: what is asked of it.
    num_steps: training steps in all.
    mesh: the devices.
    mode: whether the state is replicated or sharded.
    make: makes the state before the first step, a GuardedState; pure.
    shapes: its shapes.
    step: (state, images, labels) -> (state, metrics); pure.
    has_mean: whether there is a running mean of θ.
  """

  images: Images
  net: hk.TransformedWithState
  task: Task
  num_steps: int
  mesh: jax.sharding.Mesh
  mode: Mode
  make: Callable[[], GuardedState]
  shapes: Tree
  step: guard.GuardedStep
  has_mean: bool

  @property
  def shardings(self) -> Tree:
    """Where each leaf of the state lies."""
    return sharding.state_shardings(self.shapes, self.mesh, self.mode)

  def template(self) -> Any:
    """Shapes of the state that say where they lie, to restore it to."""
    return sharding.template(self.shapes, self.shardings)

  def create(self) -> GuardedState:
    """The state before the first step, where it lies."""
    state: GuardedState = sharding.create_sharded(
      self.make, self.mesh, self.mode
    )
    return state

  def jitted_step(self) -> Any:
    """The compiled step; its first argument is donated."""
    return sharding.on_mesh(self.step, self.shardings, self.mesh)

  def open_training_stream(self, workers: int) -> DeviceStream:
    """Batches to train on, on the devices."""
    stream = Stream(self.images.train, num_workers=workers)
    return DeviceStream(stream, sharding.batch_sharding(self.mesh))

  def open_test_stream(self, workers: int) -> DeviceStream:
    """Batches to evaluate on, on the devices."""
    stream = Stream(self.images.test, num_workers=workers)
    return DeviceStream(stream, sharding.batch_sharding(self.mesh))


def assemble(
  *,
  data: ImagesConfig,
  net: NetConfig,
  recipe: RecipeConfig,
  sparse: SparseConfig,
  make_task: Callable[[int], Task],
  key: int = 0,
  mesh: jax.sharding.Mesh,
  mode: Mode = 'replicated',
) -> ImageRun:
  """Puts a run together and refuses what cannot be trained.

  Args:
    data: the images.
    net: the network.
    recipe: how it is trained.
    sparse: how connections move.
    make_task: from the number of training examples to the task.
    key: seed of weights, masks, and the order of the images.
    mesh: the devices, from sharding.make_mesh.
    mode: whether the state is replicated or sharded.

  Returns:
    The run.

  Raises:
    UserError: naming the setting that is out of range, or does not fit the
      devices or the others.
  """
  for size in (recipe.batch_size, data.test_batch):
    if size is not None:
      sharding.check_batch(size, mesh)
  images = sources.open_images(
    data,
    recipe.batch_size,
    key=key,
    host_index=distributed.host_index(),
    host_count=distributed.host_count(),
  )
  task = make_task(images.num_examples)
  network = setup.make_net(net, images.num_classes)
  theta = setup.shapes(network, data.image_size)
  tx = setup.make_tx(recipe, sparse, task, theta, key)
  first = jnp.zeros((1, data.image_size, data.image_size, 3))

  def make() -> GuardedState:
    return guard.create(
      state_lib.create(network, tx, jax.random.key(key), first)
    )

  try:
    shapes = jax.eval_shape(make)
  except ValueError as error:
    raise UserError(
      f'{task.method} at sparsity {task.sparsity:g}: {error}'
    ) from error
  # Refuses an unknown mode.
  sharding.state_shardings(shapes, mesh, mode)
  step = guard.guarded(setup.make_step(network, tx, recipe))
  return ImageRun(
    images=images,
    net=network,
    task=task,
    num_steps=setup.num_steps(recipe),
    mesh=mesh,
    mode=mode,
    make=make,
    shapes=shapes,
    step=step,
    has_mean=recipe.ema > 0,
  )


class Evaluation:
  """Scores of a run's states on the evaluation split.

  Called with a state, it gives validation_loss, validation_accuracy and
  validation_top_5, and validation_accuracy_ema where there is a running mean.
  Given a folder, it writes best.npz there whenever the accuracy is higher than
  ever before, of the mean where there is one.

  Args:
    run: the run.
    workers: processes that decode.
    folder: where best.npz goes; None writes nothing.
    settings: what best.npz says about the run, made of what JSON holds.
  """

  def __init__(
    self,
    run: ImageRun,
    *,
    workers: int = 0,
    folder: RunFolder | None = None,
    settings: Row | None = None,
  ):
    self._run = run
    self._workers = workers
    self._path = folder.path / _BEST if folder else None
    self._settings = settings or {}
    whole = sharding.replicated(run.mesh)
    score = evaluate.make_score(run.net, setup.normalise)
    self._score = jax.jit(score, out_shardings=whole)
    self._weights = {
      mean: jax.jit(functools.partial(setup.weights, task=run.task, mean=mean))
      for mean in ((False, True) if run.has_mean else (False,))
    }
    self._gather = jax.jit(lambda tree: tree, out_shardings=whole)
    self._last: tuple[int, dict[str, float]] = -1, {}
    self._best = _stored_best(self._path, folder)

  def __call__(self, state: GuardedState) -> dict[str, float]:
    """Scores of a state."""
    found = {mean: f(state.train) for mean, f in self._weights.items()}
    scores = {mean: self._scores_of(part) for mean, part in found.items()}
    step = _batches_seen(state)
    named = {
      f'validation_{name}': scores[False][name]
      for name in ('loss', 'accuracy', 'top_5')
    }
    if True in scores:
      named['validation_accuracy_ema'] = scores[True]['accuracy']
    self._last = step, named
    # The mean, where there is one.
    has_mean = True in scores
    self._keep_if_best(found[has_mean], step, scores[has_mean])
    return named

  def final(self, state: GuardedState) -> Row:
    """Scores of the state after the last step, as a flat record.

    For one-shot pruning accuracy_dense is that of the network before.

    Args:
      state: the state.

    Returns:
      step, num_skipped, loss, accuracy, top_5, density, and perhaps
      accuracy_ema.
    """
    step, scores = self._last
    if step != _batches_seen(state):
      scores = self(state)
    found = self._weights[False](state.train)
    record: Row = {
      'step': _batches_seen(state),
      'num_skipped': int(state.num_skipped),
      **{k.removeprefix('validation_'): v for k, v in scores.items()},
      'density': setup.density(found),
    }
    if self._run.task.method == 'one_shot':
      dense = self._run.task._replace(method='dense', sparsity=0.0)
      theta, _, net_state = setup.weights(state.train, dense)
      record['accuracy_dense'] = self._evaluate(theta, net_state)['accuracy']
    return record

  def of_export(self, exported: Exported) -> Row:
    """Scores of an exported network.

    Args:
      exported: the network; it must be one of the run's settings.

    Returns:
      loss, accuracy, top_5 and density.
    """
    whole = sharding.replicated(self._run.mesh)
    theta, masks, net_state = jax.device_put(exported[:3], whole)
    found = Weights(theta, masks, net_state)
    scores = self._scores_of(found)
    return {**scores, 'density': setup.density(found)}

  def _scores_of(self, found: Weights) -> dict[str, float]:
    scores = self._evaluate(found.theta, found.net_state)
    return {name: scores[name] for name in ('loss', 'accuracy', 'top_5')}

  def _evaluate(self, theta: Params, net_state: Tree) -> dict[str, float]:
    with self._run.open_test_stream(self._workers) as stream:
      return evaluate.evaluate(self._score, theta, net_state, stream)

  def _keep_if_best(
    self, found: Weights, step: int, scores: dict[str, float]
  ) -> None:
    # All hosts know the same scores, and gather the weights together.
    if self._path is None or scores['accuracy'] <= self._best:
      return
    self._best = scores['accuracy']
    gathered = self._gather(found)
    if distributed.host_index():
      return
    about = {'step': step, 'settings': self._settings, 'scores': scores}
    theta, masks, net_state = jax.device_get(gathered)
    best = Exported(theta, masks, net_state, about)
    export.write(self._path, best, format='npz', overwrite=True)


def _batches_seen(state: GuardedState) -> int:
  """Steps of the loop: those that were made and those that were skipped."""
  return int(state.train.step) + int(state.num_skipped)


def open_folder(
  out: str, settings: Row, *, program: str, resume: bool
) -> RunFolder:
  """The folder of a run that all hosts share; the first one makes it.

  Args:
    out: the folder.
    settings: those of the run; see RunFolder.
    program: name of the program.
    resume: continue the run that the folder holds.

  Returns:
    The folder; is_resumed is the same on all hosts.

  Raises:
    UserError: as for RunFolder, on all hosts.
  """
  if distributed.host_count() == 1:
    return RunFolder(out, settings, program=program, resume=resume)
  # 0: refused; 1: a new run; 2: one that goes on.
  problem, folder, status = None, None, 0
  if not distributed.host_index():
    try:
      folder = RunFolder(out, settings, program=program, resume=resume)
      status = 1 + folder.is_resumed
    except UserError as error:
      problem = error
  status = int(multihost_utils.broadcast_one_to_all(np.int32(status)))
  if not status:
    raise problem or UserError(f'host 0 cannot use {out} as the output folder.')
  folder = folder or RunFolder(out, settings, program=program, resume=True)
  folder.is_resumed = status == 2
  return folder


def _stored_best(path: pathlib.Path | None, folder: RunFolder | None) -> float:
  """The best accuracy so far, the same on all hosts; -1 for none."""
  best = -1.0
  if path is not None and folder is not None and folder.is_resumed:
    if path.exists() and not distributed.host_index():
      best = float(export.read(path).about['scores']['accuracy'])
    if distributed.host_count() > 1:
      best = float(multihost_utils.broadcast_one_to_all(np.float32(best)))
      # Rounded, it may be below what was rounded.
      best = math.nextafter(best, 1.0) if best > 0 else best
  return best
