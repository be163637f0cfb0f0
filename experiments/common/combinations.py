"""Many runs of one program, each in a folder of its own, some at a time.

What programs that compare many combinations of settings have in common: one
after another or in processes side by side, with progress; what is finished is
read and not done again.

    def train(config, description, combination):
      folder = combinations.folder(config, combination, PROGRAM)
      if folder.is_complete:
        return combinations.read(folder)
      …
      return combinations.write(folder, results)

    found = combinations.run_all(
      functools.partial(train, config), chosen, config, num_steps, print)
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any, Protocol, TypeVar

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.runs import contents, divergence, metrics, workers
from powerprop_jax.train.runs.contents import Contents, Networks, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

Records = list[Row]


class Named(Protocol):
  """A combination of settings, a NamedTuple."""

  @property
  def name(self) -> str:
    """The name of its folder."""

  def _asdict(self) -> Row: ...


C = TypeVar('C', bound=Named)


def path(out: str, combination: Named) -> pathlib.Path:
  """The folder of a combination within that of the program."""
  return pathlib.Path(out).expanduser() / 'combinations' / combination.name


def settings(config: Any, *left_out: str) -> Row:
  """What the results of a program depend on, as JSON holds it.

  Left out are those that change nothing: the number of `workers` that share the
  work, and others by name.
  """
  every = json_files.to_json(config)
  return {k: v for k, v in every.items() if k not in ('workers', *left_out)}


def run_all(
  work: Callable[[str, C], Records],
  combinations: Sequence[C],
  config: Any,
  num_steps: int,
  when_done: Callable[[C, Records], None],
) -> dict[C, Records]:
  """Does the work for every combination; their results, in their order.

  Args:
    work: (description, combination) -> results, a function at the top level of
      a module or a functools.partial of one; the description is for its
      progress, '' for no progress.
    config: out, the folder of the program, and workers: with 1, one after
      another in this process; otherwise so many at a time, each in a process of
      its own with one thread.
    num_steps: training steps of each combination, for the progress.
    when_done: called for each of them as soon as it is done, to print what came
      out.
  """
  found: dict[C, Records] = {}
  total = len(combinations)
  if config.workers == 1:
    for number, combination in enumerate(combinations, start=1):
      description = f'{number}/{total} {combination.name}'
      found[combination] = work(description, combination)
      when_done(combination, found[combination])
    return found
  steps_done = functools.partial(_steps_done, config.out, combinations)
  with progress_lib.Progress(
    'training', total * num_steps, start=steps_done()
  ) as progress:
    for combination, results in workers.run(
      functools.partial(work, ''),
      combinations,
      config.workers,
      lambda: progress.update(steps_done()),
    ):
      found[combination] = results
      when_done(combination, results)
  return {combination: found[combination] for combination in combinations}


def run_folder(
  config: Any, program: str, page: Page, *left_out: str, instead: str = ''
) -> RunFolder:
  """The folder of a program, `out` of the settings.

  For what is left out of them see settings, for page and instead Contents.
  """
  return RunFolder(
    config.out,
    settings(config, *left_out),
    program=program,
    resume=config.resume,
    contents=Contents(page=page, instead=instead),
  )


def folder(
  config: Any,
  combination: Named,
  program: str,
  *left_out: str,
  networks: Networks | None = None,
  instead: str = '',
  sections: Sequence[Section] = (),
) -> RunFolder:
  """The folder of a combination; it is complete where nothing is left to do.

  It lies in `out` of the settings; for what is left out of them see settings.
  Its page shows results, training, and more sections; for networks and instead
  see Contents.
  """
  name = combination.name
  curves = contents.Records('metrics.jsonl', having=('loss', 'alpha'))
  shown = (
    Section('Results', tables=(contents.Table(),)),
    contents.training_section(name, curves),
    *sections,
  )
  page = Page(name, f'Part of {program}', shown)
  return RunFolder(
    path(config.out, combination),
    settings(config, *left_out) | combination._asdict(),
    program=program,
    resume=True,
    is_part=True,
    contents=Contents(networks, page, instead),
  )


def read(folder: RunFolder) -> Records:
  """Results of a complete folder; says again which networks diverged."""
  if folder.metrics_path.exists():
    logged = metrics.read_metrics(folder.metrics_path)
    divergence.Watch(folder.path).look(logged)
  found: Records = folder.read_json('results.json')
  return found


def write(folder: RunFolder, results: Records) -> Records:
  """Results of a combination, kept; its folder is complete."""
  folder.write_results(results)
  folder.mark_complete()
  return results


def logged(out: str, combination: Named) -> Records:
  """What was logged while a combination was trained; empty before."""
  file = path(out, combination) / 'metrics.jsonl'
  return metrics.read_metrics(file) if file.exists() else []


def check_any_left(out: str, combinations: Sequence[Named]) -> None:
  """Ends a program with the status of one of which every network diverged.

  Raises:
    divergence.Diverged: if the last evaluation of each network says so.
  """
  lost: list[bool] = []
  for combination in combinations:
    lost += divergence.lost(logged(out, combination)).values()
  divergence.check_any_left(out, lost)


def _steps_done(out: str, combinations: Sequence[Named]) -> int:
  """Steps of all combinations together, up to their last evaluations."""
  records = [logged(out, combination) for combination in combinations]
  return sum(found[-1]['step'] for found in records if found)
