"""`powerprop train`: one network, dense or by a method of sparse training."""

from collections.abc import Collection
import dataclasses
import functools
import pathlib
import shlex
import sys
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Tree
from powerprop_jax.costs import summary
from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.optim import views
from powerprop_jax.report import analysis, plotting
from powerprop_jax.train import condensed, ensemble, methods, optimizers
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import loop as loop_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.cli.arguments import Net
from powerprop_jax.train.condensed import Execution
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig, Splits
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import Method, SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import (
  contents,
  divergence,
  errors,
  mask_watch,
  metrics,
  writers,
)
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Contents, Networks
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunConfig, RunFolder
from powerprop_jax.train.scale import fusing
from powerprop_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
  """Trains one network, dense or sparse."""

  # Folder for the results; made if missing.
  out: str = 'runs/train'
  # The data set.
  data: DataConfig = DataConfig()
  # Subtract the mean of each channel and divide by its standard deviation.
  normalise: bool = False
  # Shift by up to 4 pixels and mirror at random in training.
  augment: bool = False
  net: Net = 'lenet_300_100'
  # Which weights exist, and how that changes; powerprop methods explains each.
  method: Method = 'dense'
  # Share of the weights that are zero, in [0, 1); more than 0 but for dense.
  sparsity: float = 0.0
  # The power, at least 1; 1 is ordinary training.
  alpha: float = 2.0
  # Seed of the initial weights, of masks and of the order of the data. It must
  # be at least 0.
  key: int = 0
  # The optimiser.
  optimizer: OptimizerConfig = OptimizerConfig(
    learning_rate=0.1, schedule='cosine', decay_phi=2e-3
  )
  # Lengths.
  loop: LoopConfig = LoopConfig(num_steps=6_000)
  # How connections move. Each method has some of these settings.
  sparse: SparseConfig = SparseConfig()
  # masked: weights that do not exist are multiplied too. condensed: they are
  # left out, with the same numbers but for rounding; for static, SET and RigL.
  # auto: left out of layers with so few connections that they are faster so.
  execution: Execution = 'masked'


@dataclasses.dataclass(frozen=True)
class ExtendConfig:
  """Trains the network of a finished run on, for more steps."""

  # Folder of a run of powerprop train, which is continued there.
  run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')] = (
    tyro.MISSING
  )
  # Training steps in all, more than it has made.
  num_steps: int = tyro.MISSING
  # Continue an extension that was interrupted.
  resume: bool = False
  # Write TensorBoard files too (needs the extra 'tensorboard').
  tensorboard: bool = False
  # Log to Weights & Biases too (needs the extra 'wandb').
  wandb: bool = False


def extend(config: ExtendConfig) -> None:
  """Trains the network of a run on; only its length becomes another.

  The run goes on as one of the new length: what is a share of it, such as the
  cosine of the learning rate and the last step at which connections move, is a
  share of all steps. A line says what that amounts to.
  """
  path, stored, before = _to_extend(config)
  done, is_complete = before.loop.num_steps, (path / 'complete.json').exists()
  if config.num_steps < done or (config.num_steps == done and is_complete):
    raise UserError(
      f'{path} is of {done:,} steps; --num-steps must be more, got '
      f'{config.num_steps:,}.'
    )
  if config.num_steps > done and not is_complete:
    raise UserError(
      f'{path} was stopped before its end, at {done:,} steps. Continue it '
      f'first: {stored["command"]} --resume'
    )
  if config.num_steps == done and not config.resume:
    raise UserError(
      f'{path} was stopped before its end; pass --resume to continue it.'
    )
  loop = dataclasses.replace(before.loop, num_steps=config.num_steps)
  after = dataclasses.replace(
    before,
    loop=loop,
    out=str(path),
    resume=True,
    tensorboard=config.tensorboard,
    wandb=config.wandb,
  )
  if config.num_steps > done:
    print(f'note: {path} {goes_on(before, after)}', file=sys.stderr)
  main(after, may_differ=('loop.num_steps',))


def _to_extend(config: ExtendConfig) -> tuple[pathlib.Path, Row, TrainConfig]:
  """The folder, its config.json and its settings."""
  path = pathlib.Path(config.run).expanduser()
  stored = run_folder.read_config(path)
  if stored['program'] != 'train':
    raise UserError(
      f'{path} holds a run of {stored["program"]}; only those of powerprop '
      'train can be extended.'
    )
  settings = run_folder.settings_of(TrainConfig, stored, path / 'config.json')
  return path, stored, dataclasses.replace(settings, out=str(path))


def refuse_changes(config: ExtendConfig, options: list[str]) -> None:
  """Refuses options of train that would change a run that is extended."""
  path, _, before = _to_extend(config)
  after = arguments.parse(
    {'': before}, options, prog='powerprop extend', reads_config=False
  )
  old, new = json_files.to_json(before), json_files.to_json(after)
  if changes := list(run_folder.differences(old, new)):
    raise UserError(
      f'powerprop extend changes nothing but the length of {path}, got '
      f'{"; ".join(changes)}. Leave that out, or train a new run: powerprop '
      f'train --config {path} {shlex.join(options)} --out FOLDER'
    )


def goes_on(before: TrainConfig, after: TrainConfig) -> str:
  """What becomes of schedules when a run becomes longer, for a message."""
  done, more = before.loop.num_steps, after.loop.num_steps
  said = [f'goes on from step {done:,} as a run of {more:,} steps']
  rates = [
    float(rate(done)) if callable(rate) else float(rate)
    for rate in (
      optimizers.learning_rate(config.optimizer, config.loop.num_steps)
      for config in (before, after)
    )
  ]
  said += [f'its learning rate goes from {rates[0]:.4g} to {rates[1]:.4g}']
  if after.optimizer.schedule == 'cosine':
    said[-1] += f' and falls to 0 along the cosine of {more:,} steps'
  if after.method != 'dense':
    stop = methods.stop_of(after.method, after.sparse, more)
    moves = f'may move again until step {stop:,}'
    said += [f'connections {moves if stop > done else "stay as they are"}']
  return '; '.join(said) + '.'


def main(config: TrainConfig, may_differ: Collection[str] = ()) -> None:
  """Trains one network and writes what came out.

  For settings that may differ from those of a run see RunFolder.
  """
  _check(config)
  splits = data.load(config.data, show_progress=True)
  data.check_batch_size(config.loop.batch_size, len(splits.train.labels))
  prepare: data.Prepare = data.to_float
  if config.normalise:
    data.check_images(splits, '--normalise')
    prepare = data.normalise(splits.train.images)
  if config.augment:
    data.check_images(splits, '--augment')
    data.crop_and_flip(jax.random.key(0), splits.example)
  net = nets.make(config.net, splits.num_classes)
  key = jax.random.key(config.key)
  theta = step_lib.shapes(net, splits.example)
  tx = methods.for_settings(
    config.optimizer,
    config.alpha,
    config.method,
    1 - config.sparsity,
    config.sparse,
    methods.lengths_of(config.loop, theta, len(splits.train.labels)),
    jax.random.fold_in(key, 2),  # another stream than those of the state
  )
  state = step_lib.create(net, tx, key, splits.example)
  folder = RunFolder(
    config.out,
    config,
    program='train',
    resume=config.resume,
    contents=_contents(config),
    may_differ=may_differ,
    hints={
      'loop.num_steps': 'To make it longer: powerprop extend '
      f'{config.out} --num-steps STEPS.'
    },
  )
  print(summary.selection_table(select_lib.is_weight, state.phi))
  divergence.say_scale(splits, prepare)
  score = evaluate_lib.on_state(net, prepare=prepare)
  options: Row = {
    'prepare': prepare,
    'augment': data.crop_and_flip if config.augment else None,
  }
  thin = condensed.advance_of(
    state,
    net=net,
    tx=tx,
    images=splits.train.images[: config.loop.batch_size],
    execution=config.execution,
    **options,
  )
  advance = thin or fusing.make_advance(net, tx, **options)
  state = _fit(state, advance, score, splits, config, folder)
  evaluate = jax.jit(score)
  scores = {
    split: jax.device_get(evaluate(state, arrays))
    for split, arrays in (
      ('validation', splits.validation),
      ('test', splits.test),
    )
  }
  lost = _write(folder, config, state, scores)
  divergence.check_any_left(folder.path, lost)


def _check(config: TrainConfig) -> None:
  """Refuses settings that do not fit each other."""
  errors.check_key(config.key)
  masks_lib.check_sparsity(config.sparsity)
  methods.check_settings(config.method, config.sparse)
  if config.method == 'dense' and config.sparsity:
    raise UserError(
      f'sparsity is {config.sparsity:g}, but the dense network has 0. Choose a '
      '--method, as powerprop methods lists them, or train it dense and use '
      'powerprop prune.'
    )
  if config.method != 'dense' and not config.sparsity:
    raise UserError(
      f'{config.method} needs a sparsity. Give the share of the weights that '
      'are to be zero, e.g. --sparsity 0.9.'
    )


def _fit(
  state: TrainState,
  advance: step_lib.Advance,
  score: Any,
  splits: Splits,
  config: TrainConfig,
  folder: RunFolder,
) -> TrainState:
  """Trains; what is logged of a sparse network includes that of MaskWatch."""
  stacked = lambda tree: jax.tree.map(lambda x: x[None], tree)
  members = ensemble.product([config.alpha], [config.key])
  (name,) = ensemble.names(members)
  watch = mask_watch.MaskWatch(stacked(state))

  def records(trained: Tree, found: Tree) -> list[Row]:
    scores, masks = jax.device_get(found)
    of_masks = watch.records(members, stacked(masks))
    return [loop_lib.record(trained, scores, **name), *of_masks]

  return loop_lib.fit(
    state,
    advance,
    lambda state, arrays: (score(state, arrays), mask_watch.masks_of(state)),
    splits,
    config.loop,
    folder,
    indices=functools.partial(data.batch_indices, config.key),
    records=records,
    begin=None
    if config.method == 'dense'
    else lambda state: watch.begin(stacked(state)),
    writers=writers.of_run(folder, config),
  )


def _write(
  folder: RunFolder,
  config: TrainConfig,
  state: TrainState,
  scores: dict[str, Row],
) -> list[bool]:
  """Writes and prints what came out; whether the network diverged."""
  theta = jax.device_get(state.theta)
  masks = None
  if config.method != 'dense':
    masks = jax.device_get(views.current_masks(state.phi, state.opt_state))
  density = mask_watch.density(jax.device_get(mask_watch.masks_of(state)))
  folder.write_results(
    [
      {
        'alpha': config.alpha,
        'key': config.key,
        'method': config.method,
        'step': config.loop.num_steps,
        'split': split,
        'sparsity': masks_lib.density_to_sparsity(density),
        'density': density,
        **{name: float(value) for name, value in found.items()},
      }
      for split, found in scores.items()
    ]
  )
  folder.write_json('weights.json', summary.summary(theta, masks))
  plotting.save(
    plotting.weight_histograms(
      analysis.weight_histograms({config.alpha: theta}),
      title=f'Weights after training, {config.net} on {config.data.name}',
    ),
    folder.path / 'weight_histograms',
  )
  report = run_report.write(folder.path)
  folder.mark_complete()
  print(f'\n{summary.summary_table(theta, masks)}\n')
  for split, found in scores.items():
    print(f'{split} accuracy: {np.asarray(found["accuracy"]):.4f}')
  print(f'Figures and report: {report}')
  return divergence.say_weights(
    folder.path,
    {(config.alpha, config.key): divergence.lost_leaf(theta)},
    config.loop.num_steps,
    metrics.read_metrics(folder.metrics_path),
  )


def _contents(config: TrainConfig) -> Contents:
  title = f'{config.net} on {config.data.name}'
  if config.method != 'dense':
    title += f', {config.method} at {100 * config.sparsity:g} % of zeros'
  networks = Networks(
    config.net,
    config.data,
    config.loop.num_steps,
    (config.alpha,),
    (config.key,),
    is_stacked=False,
    normalise=config.normalise,
  )
  histograms = contents.Figure('weight_histograms', 'histograms of the weights')
  records = contents.Records('metrics.jsonl', settings={'method': 'method'})
  of_masks: tuple[contents.Section, ...] = ()
  if config.method != 'dense':
    of_masks = contents.mask_sections(('', title, records))
  sections = (
    contents.Section('Results', tables=(contents.Table(),)),
    contents.training_section(
      title, contents.Records('metrics.jsonl', having=('loss',))
    ),
    *of_masks,
    contents.weights_section(histograms),
  )
  subtitle = f'α = {config.alpha:g}, key {config.key}'
  page = contents.Page(f'Training of {title}', subtitle, sections)
  return Contents(networks, page)
