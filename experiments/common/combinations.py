"""Many runs of one program, each in a folder of its own, some at a time.

What programs that compare many combinations of settings have in common: one
after another or in processes side by side, with progress; what is finished is
read and not done again.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import pathlib
from typing import Any, Protocol, TypeVar

from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs import divergence, json_files, metrics, workers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder

Records = list[Row]


class Named(Protocol):
  """A combination of settings."""

  @property
  def name(self) -> str:
    """The name of its folder."""


C = TypeVar('C', bound=Named)


def path(out: str, combination: Named) -> pathlib.Path:
  """The folder of a combination within that of the program."""
  return pathlib.Path(out).expanduser() / 'combinations' / combination.name


def check_workers(num_workers: int) -> None:
  """Refuses a number of processes that is not positive."""
  if num_workers < 1:
    raise UserError(f'--workers must be at least 1, got {num_workers}.')


def settings(config: Any, *left_out: str) -> Row:
  """What the results of a program depend on.

  Args:
    config: its settings, a dataclass.
    left_out: those that change nothing beside `workers`, the number of
      processes that share the work.

  Returns:
    All others, as JSON holds them.
  """
  every = json_files.to_json(config)
  return {k: v for k, v in every.items() if k not in ('workers', *left_out)}


def run_all(
  work: Callable[[str, C], Records],
  combinations: Sequence[C],
  out: str,
  num_workers: int,
  num_steps: int,
  when_done: Callable[[C, Records], None],
) -> dict[C, Records]:
  """Does the work for every combination.

  Args:
    work: (description, combination) -> results, a function at the top level of
      a module or a functools.partial of one; the description is for its
      progress, '' for no progress.
    combinations: what to call it with.
    out: the folder of the program, see path.
    num_workers: with 1, one after another in this process; otherwise so many
      at a time, each in a process of its own with one thread.
    num_steps: training steps of each combination, for the progress.
    when_done: (combination, results) -> None, called for each of them as soon
      as it is done, to print what came out.

  Returns:
    The results of each combination, in the order of the combinations.
  """
  found: dict[C, Records] = {}
  for combination, results in _run_all(
    work, combinations, out, num_workers, num_steps
  ):
    found[combination] = results
    when_done(combination, results)
  return {combination: found[combination] for combination in combinations}


def _run_all(
  work: Callable[[str, C], Records],
  combinations: Sequence[C],
  out: str,
  num_workers: int,
  num_steps: int,
) -> Iterator[tuple[C, Records]]:
  """Combinations and results in the order in which they are done."""
  if num_workers == 1:
    for number, combination in enumerate(combinations, start=1):
      description = f'{number}/{len(combinations)} {combination.name}'
      yield combination, work(description, combination)
    return
  total = len(combinations) * num_steps
  start = _steps_done(out, combinations)
  with metrics.Progress('training', total, start=start) as progress:
    yield from workers.run(
      functools.partial(work, ''),
      combinations,
      num_workers,
      watch=lambda: progress.update(_steps_done(out, combinations)),
    )


def once(
  train: Callable[[RunFolder], Records],
  out: str,
  combination: Named,
  settings: Row,
  program: str,
) -> Records:
  """Results of a combination: trained, or read where that is done.

  Args:
    train: trains it, given its folder.
    out: the folder of the program.
    combination: which one.
    settings: what its results depend on.
    program: name of the program.

  Returns:
    The records that train gave, now or earlier.
  """
  folder = RunFolder(
    path(out, combination),
    settings,
    program=program,
    resume=True,
    is_part=True,
  )
  if folder.is_complete:
    watch = divergence.Watch(folder.path)
    for record in looks(out, combination):
      watch.look(record['step'], [record])
    return folder.read_json('results.json')
  results = train(folder)
  folder.write_results(results)
  folder.mark_complete()
  return results


def looks(out: str, combination: Named) -> Records:
  """What was logged while a combination was trained; empty before."""
  logged = path(out, combination) / 'metrics.jsonl'
  return metrics.read_metrics(logged) if logged.exists() else []


def check_any_left(out: str, combinations: Sequence[Named]) -> None:
  """Ends a program with the status of one of which every network diverged.

  Args:
    out: the folder of the program.
    combinations: what it trained.

  Raises:
    divergence.Diverged: if the last look at each network says so.
  """
  lost: list[bool] = []
  for combination in combinations:
    lost += divergence.lost(looks(out, combination)).values()
  divergence.check_any_left(out, lost)


def _steps_done(out: str, combinations: Sequence[Named]) -> int:
  """Steps of all combinations together, up to their last looks."""
  logged = [looks(out, combination) for combination in combinations]
  return sum(records[-1]['step'] for records in logged if records)
