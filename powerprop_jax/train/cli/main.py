"""The command `powerprop`: train a network, prune it, report on it.

    powerprop train --alpha 2 --out runs/alpha_2
    powerprop prune runs/alpha_2 --kept 0.1 0.05
    powerprop report runs/alpha_2
    powerprop export runs/alpha_2 --kept 0.05 --out net.safetensors
    powerprop bench net.safetensors

Training writes a folder; pruning reads it and writes another; a report is made
again from what a folder holds. An export is a pruned network in one file, and
bench says how fast it is. All but train take the folder of any run that says in
its config.json what it holds.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import pathlib
import sys
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from powerprop_jax import nets
from powerprop_jax.core import masks, names
from powerprop_jax.core import select as select_lib
from powerprop_jax.costs import summary
from powerprop_jax.files import tables
from powerprop_jax.report import analysis, plotting, records
from powerprop_jax.train import ensemble, loop, optimizers
from powerprop_jax.train import evaluate as evaluate_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import arguments, bench, export, pruned_model
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import (
  contents,
  divergence,
  errors,
  load,
  metrics,
)
from powerprop_jax.train.runs import (
  folder as run_folder,
)
from powerprop_jax.train.runs import (
  report as run_report,
)
from powerprop_jax.train.runs.contents import Contents, Networks
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import fusing

_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Trains one network."""

  # Folder for the results; made if missing.
  out: str = 'runs/train'
  # Continue the interrupted run in that folder.
  resume: bool = False
  # The data set.
  data: DataConfig = DataConfig()
  # The network: lenet_300_100, lenet_5, mlp, mnist_cnn, cifar_cnn, alexnet_s.
  net: str = 'lenet_300_100'
  # The power, at least 1; 1 is ordinary training.
  alpha: float = 2.0
  # Seed of the initial weights and of the order of the data, at least 0.
  key: int = 0
  # The optimiser.
  optimizer: OptimizerConfig = OptimizerConfig(
    learning_rate=0.1, schedule='cosine', decay_phi=2e-3
  )
  # Lengths.
  loop: LoopConfig = LoopConfig(num_steps=6_000)
  # Write TensorBoard files too (needs the extra 'tensorboard').
  tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class PruneConfig:
  """Prunes the networks of a run once, without retraining."""

  # Folder of a run, whose latest checkpoint is read; nothing in it is changed.
  run: _Run = tyro.MISSING
  # Folder for the results; made if missing. Default: RUN_pruned.
  out: str | None = None
  # Write the results of the same pruning in that folder again.
  resume: bool = False
  # Shares of weights to keep, each in (0, 1].
  kept: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
  # Rank the weights of each layer by themselves, or of all layers together.
  scope: Literal['layer', 'global'] = 'layer'
  # Per layer, the output layer keeps this many times the share, at most all.
  output_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """Draws the figures of a run and writes its report.html again."""

  # Folder of the run.
  run: _Run = tyro.MISSING


def train(config: TrainConfig) -> None:
  """Trains one network and writes what came out."""
  metrics.check_tensorboard(config.tensorboard)
  splits = data.load(config.data, show_progress=True)
  data.check_batch_size(config.loop.batch_size, len(splits.train.labels))
  net = nets.make(config.net, splits.num_classes)
  # A Python number: α is compiled in, which is faster than an array.
  tx = optimizers.make_tx(config.optimizer, config.alpha, config.loop.num_steps)
  errors.check_key(config.key)
  key = jax.random.key(config.key)
  state = step_lib.create(net, tx, key, splits.example)
  folder = RunFolder(
    config.out,
    config,
    program='train',
    resume=config.resume,
    contents=_contents(config),
  )
  print(select_lib.selection_table(select_lib.is_weight, state.phi))
  divergence.say_scale(splits)
  state = loop.fit(
    state,
    fusing.make_advance(
      net, fusing.fused(tx) if config.optimizer.is_elementwise else tx
    ),
    evaluate_lib.on_state(net),
    splits,
    config.loop,
    folder,
    indices=functools.partial(data.batch_indices, config.key),
    records=lambda *found: [
      loop.record(*found, alpha=config.alpha, key=config.key)
    ],
    tensorboard=config.tensorboard,
  )
  evaluate = jax.jit(evaluate_lib.on_state(net))
  found = {
    split: jax.device_get(evaluate(state, arrays))
    for split, arrays in (
      ('validation', splits.validation),
      ('test', splits.test),
    )
  }
  theta = jax.device_get(state.theta)
  folder.write_results(
    [
      {
        'alpha': config.alpha,
        'key': config.key,
        'step': config.loop.num_steps,
        'split': split,
        'sparsity': 0.0,
        'density': 1.0,
        **{name: float(value) for name, value in scores.items()},
      }
      for split, scores in found.items()
    ]
  )
  folder.write_json('weights.json', summary.summary(theta))
  plotting.save(
    plotting.weight_histograms(
      analysis.weight_histograms({config.alpha: theta}),
      title=f'Weights after training, {config.net} on {config.data.name}',
    ),
    folder.path / 'weight_histograms.png',
  )
  report = run_report.write(folder.path)
  folder.mark_complete()
  print(f'\n{summary.summary_table(theta)}\n')
  for split, scores in found.items():
    print(f'{split} accuracy: {scores["accuracy"]:.4f}')
  print(f'Figures and report: {report}')
  lost = divergence.say_weights(
    folder.path,
    {(config.alpha, config.key): divergence.lost_leaf(theta)},
    config.loop.num_steps,
    metrics.read_metrics(folder.metrics_path),
  )
  divergence.check_any_left(folder.path, lost)


def _contents(config: TrainConfig) -> Contents:
  title = f'{config.net} on {config.data.name}'
  networks = Networks(
    config.net,
    config.data,
    config.loop.num_steps,
    (config.alpha,),
    (config.key,),
    is_stacked=False,
  )
  histograms = contents.Figure('weight_histograms', 'histograms of the weights')
  sections = (
    contents.Section('Results', tables=(contents.Table(),)),
    contents.training_section(title),
    contents.weights_section(histograms),
  )
  return Contents(networks, contents.Page('Training', title, sections))


def prune(config: PruneConfig) -> None:
  """Prunes the networks of a run and writes their test accuracies."""
  errors.check_several(config, 'kept', differ=False)
  sparsities = [masks.density_to_sparsity(k, '--kept') for k in config.kept]
  rule = pruned_model.output_rule(config.scope, config.output_factor)
  run = pathlib.Path(config.run).expanduser()
  found = load.load(run)
  load.check_any_finite(run, found)
  title = f'{found.net_name} on {found.splits.name}'
  # The settings of the run too, so that this folder explains itself.
  settings = {
    **dataclasses.asdict(config),
    'run': str(run),
    'trained': {**found.settings, 'step': found.step},
  }
  folder = RunFolder(
    config.out or run.with_name(f'{run.resolve().name}_pruned'),
    settings,
    program='prune',
    resume=config.resume,
    contents=Contents(
      page=contents.Page(
        'One-shot pruning of a trained network',
        title,
        (
          contents.pruning_section(
            title, found.splits.num_classes, (config.scope,)
          ),
        ),
      )
    ),
  )
  results = ensemble.prune(
    found.net,
    found.state,
    found.members,
    found.splits.test,
    sparsities,
    scope=config.scope,
    overrides=rule,
  )
  folder.write_results([{**r, 'step': found.step} for r in results])
  report = run_report.write(folder.path)
  folder.mark_complete()
  if found.step < found.num_steps:
    print(
      f'note: the latest checkpoint of {run} is of step {found.step:,} of '
      f'{found.num_steps:,}.'
    )
  print('Test accuracy, mean over keys:\n')
  print(tables.text_table(records.pivot(results)))
  print(f'\nFigures and report: {report}')


def report(config: ReportConfig) -> None:
  """Rebuilds the figures and the page of a run."""
  print(f'Figures and report: {run_report.write(config.run)}')


class _Command(NamedTuple):
  main: Callable[[Any], None]
  defaults: Any

  @property
  def about(self) -> str:
    """What it does, in a line."""
    return str(type(self.defaults).__doc__)


_COMMANDS = {
  'train': _Command(train, TrainConfig()),
  'prune': _Command(prune, PruneConfig()),
  'report': _Command(report, ReportConfig()),
  'export': _Command(export.main, export.ExportConfig()),
  'bench': _Command(bench.main, bench.BenchConfig()),
}


def main(args: Sequence[str] | None = None) -> int:
  """Runs one of the commands; gives the exit status, see folder.run_main."""
  given = list(sys.argv[1:] if args is None else args)
  name = given[0] if given else ''
  if name in ('-h', '--help'):
    print(_help())
    return 0
  if name == '--version':
    # The root imports every layer, so that none imports the root by name.
    root = importlib.import_module('powerprop_jax')
    print(f'powerprop_jax {root.__version__}')
    return 0
  if name not in _COMMANDS:
    return run_folder.run_main(_refuse, name)
  chosen = _COMMANDS[name]
  return arguments.run(
    chosen.main,
    {'default': chosen.defaults},
    prog=f'powerprop {name}',
    description=chosen.about,
    args=given[1:],
    # Flags that make powerprop fast make a dense network slower.
    static_alpha=None if name == 'bench' else name == 'train',
  )


def _help() -> str:
  lines = [f'  {name:8}{c.about}' for name, c in _COMMANDS.items()]
  return '\n'.join(
    [
      'usage: powerprop COMMAND [OPTIONS]',
      '',
      'Sparse training with Powerpropagation.',
      '',
      *lines,
      '',
      'powerprop COMMAND --help explains the settings of a command; powerprop '
      '--version says which version this is.',
    ]
  )


def _refuse(name: str) -> None:
  choices = f'There are: {", ".join(_COMMANDS)}. See powerprop --help.'
  if not name:
    raise UserError(f'no command given. {choices}')
  hint = names.hint(name, _COMMANDS)
  raise UserError(f'unknown command {name!r}.{hint} {choices}')


if __name__ == '__main__':
  sys.exit(main())
