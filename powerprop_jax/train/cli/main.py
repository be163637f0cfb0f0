"""The command `powerprop`: train a network, prune it, report on it.

    powerprop train --alpha 2 --out runs/alpha_2
    powerprop prune runs/alpha_2 --kept 0.1 0.05
    powerprop report runs/alpha_2
    powerprop export runs/alpha_2 --kept 0.05 --out net.safetensors
    powerprop bench net.safetensors
    powerprop methods
    powerprop data get mnist

Training writes a folder; pruning reads it and writes another; a report is made
again from what a folder holds. An export is a pruned network in one file, and
bench says how fast it is. All but train take the folder of any run that says in
its config.json what it holds.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib
import pathlib
import sys
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from powerprop_jax import nets
from powerprop_jax.core import masks, names
from powerprop_jax.files import tables
from powerprop_jax.report import records
from powerprop_jax.train import ensemble, methods
from powerprop_jax.train.cli import (
  arguments,
  bench,
  completion,
  data,
  export,
  pruned_model,
  train,
)
from powerprop_jax.train.runs import contents, errors, load, mask_watch
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Contents
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')]


@dataclasses.dataclass(frozen=True)
class PruneConfig:
  """Scores a run's networks, pruned once; export writes one to a file."""

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


def prune(config: PruneConfig) -> None:
  """Prunes the networks of a run and writes their test accuracies."""
  errors.check_several(config, 'kept', differ=False)
  sparsities = [masks.density_to_sparsity(k, '--kept') for k in config.kept]
  rule = pruned_model.output_rule(config.scope, config.output_factor)
  run = pathlib.Path(config.run).expanduser()
  found = load.load(run)
  load.check_any_finite(run, found)
  title = f'{found.net_name} on {found.splits.name}'
  num_keys = len(set(found.members.key.tolist()))
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
        f'One-shot pruning of {title}',
        f'networks of the run {run.resolve().name}',
        (
          contents.pruning_section(
            title, found.splits.num_classes, (config.scope,), num_keys
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
  state = ensemble.take(found.state, 0)
  density = mask_watch.density(jax.device_get(mask_watch.masks_of(state)))
  if density < max(config.kept):
    print(
      f'note: {run} was trained with {density:.4g} of its weights; a larger '
      'share leaves it as it is.'
    )
  print(f'Test accuracy{records.over_keys(num_keys)}:\n')
  print(tables.text_table(records.pivot(results)))
  print(f'\nFigures and report: {report}')


def report(config: ReportConfig) -> None:
  """Rebuilds the figures and the page of a run."""
  print(f'Figures and report: {run_report.write(config.run)}')


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
  """Lists the methods of training, for train --method."""


def list_methods(config: MethodsConfig) -> None:
  """Prints a line for each method, and one about what it can be told."""
  del config
  for name in methods.METHODS:
    print(f'{name:10}{methods.about(name)}')
    if settings := methods.settings_of(name):
      options = ','.join(settings).replace('_', '-')
      print(f'{"":10}--sparse.{{{options}}}')
  print(
    '\nTrain with one: powerprop train --method rigl --sparsity 0.9. What its '
    'settings mean: powerprop train --help.'
  )


@dataclasses.dataclass(frozen=True)
class NetsConfig:
  """Lists the networks, for train --net."""


def list_nets(config: NetsConfig) -> None:
  """Prints a line for each network."""
  del config
  width = 2 + max(map(len, nets.NAMES))
  for name in nets.NAMES:
    print(f'{name:{width}}{nets.about(name)}')


def complete(config: completion.CompletionConfig) -> None:
  """Prints the script."""
  options = {}
  for name, command in COMMANDS.items():
    options[name] = completion.options_of(type(command.defaults))
    if command.reads_config:
      options[name]['--config'] = ()
    if command.draws:
      options[name]['--figures'] = ('column', 'page')
  print(completion.script(config.shell, options), end='')


class _Command(NamedTuple):
  """A command.

  Attributes:
    main: takes its settings.
    defaults: of these.
    reads_config: whether it has --config, see arguments.parse.
    draws: whether it has --figures, see arguments.run.
    static_alpha: see arguments.run. Flags that make powerprop fast make a dense
      network slower, so that bench leaves them alone.
    others: see arguments.parse.
  """

  main: Callable[[Any], None]
  defaults: Any
  reads_config: bool = False
  draws: bool = False
  static_alpha: bool | None = False
  others: Callable[[Any, list[str]], None] | None = None

  @property
  def about(self) -> str:
    """What it does, in a line."""
    return str(type(self.defaults).__doc__)


COMMANDS = {
  'train': _Command(train.main, train.TrainConfig(), True, True, True),
  'extend': _Command(
    train.extend, train.ExtendConfig(), False, True, True, train.refuse_changes
  ),
  'prune': _Command(prune, PruneConfig(), draws=True),
  'report': _Command(report, ReportConfig(), draws=True),
  'export': _Command(export.main, export.ExportConfig()),
  'bench': _Command(bench.main, bench.BenchConfig(), static_alpha=None),
  'methods': _Command(list_methods, MethodsConfig()),
  'nets': _Command(list_nets, NetsConfig()),
  'data': _Command(data.main, data.DataConfig()),
  'completion': _Command(complete, completion.CompletionConfig()),
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
  if name not in COMMANDS:
    return run_folder.run_main(_refuse, name)
  chosen = COMMANDS[name]
  return arguments.run(
    chosen.main,
    {'default': chosen.defaults},
    prog=f'powerprop {name}',
    description=chosen.about,
    args=given[1:],
    static_alpha=chosen.static_alpha,
    reads_config=chosen.reads_config,
    draws=chosen.draws,
    others=chosen.others,
  )


def _help() -> str:
  lines = [f'  {name:12}{c.about}' for name, c in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: powerprop COMMAND [OPTIONS]',
      '',
      'Sparse training with Powerpropagation.',
      '',
      *lines,
      '',
      'powerprop COMMAND --help explains the settings of a command.',
      'powerprop --version says which version this is.',
    ]
  )


def _refuse(name: str) -> None:
  choices = f'There are: {", ".join(COMMANDS)}. See powerprop --help.'
  if not name:
    raise UserError(f'no command given. {choices}')
  hint = names.hint(name, COMMANDS)
  raise UserError(f'unknown command {name!r}.{hint} {choices}')


if __name__ == '__main__':
  sys.exit(main())
