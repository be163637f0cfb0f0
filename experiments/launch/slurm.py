r"""An array of Slurm jobs for a sweep, one job for each run.

    python -m experiments.launch.slurm SWEEP.json --at-once 4 \
        --options time=24:00:00 gpus=8
    sbatch runs/imagenet_90/sweep.sbatch

The script has the command line of each run, chosen by the index of the job;
runs that are complete are left out. Two minutes before the time is up (--lead)
Slurm signals the run, which saves and ends with status 75, and the job queues
itself again. The same happens when Slurm takes the machine away and gives time
for it. Other options of sbatch: --options, or in front of the script.

Runs on several hosts: nodes=4 ntasks=4 among the options of Slurm, and
"--hosts.coordinator", "cluster" among the arguments of the sweep. Then srun
starts as many processes, which find each other (train/scale/distributed.py).
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import shlex
import sys

import tyro

from experiments.launch import sweeps
from experiments.launch.sweeps import Run
from powerprop_jax.files import whole
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import preemption


@dataclasses.dataclass(frozen=True)
class Config:
  """An array of Slurm jobs for a sweep, one job for each run."""

  # What to run; see experiments/launch/sweeps.py.
  sweep: sweeps.SweepFile = tyro.MISSING
  # Jobs that Slurm runs at the same time. Default: as many as it likes.
  at_once: int | None = None
  # Seconds before the time is up in which a run saves.
  lead: int = 120
  # Options of sbatch, without dashes, e.g. time=24:00:00 gpus=8 exclusive.
  options: tuple[str, ...] = ('time=24:00:00',)


def main(config: Config) -> None:
  """Writes the script beside the folders of the runs."""
  if config.at_once is not None and config.at_once < 1:
    raise UserError(f'--at-once must be at least 1, got {config.at_once}.')
  if config.lead < 1:
    raise UserError(f'--lead must be at least 1 second, got {config.lead}.')
  chosen = sweeps.load(config.sweep)
  left = [run for run in chosen if not run.is_complete]
  print(f'{len(chosen) - len(left)} of {len(chosen)} runs are complete.')
  if not left:
    return
  path = left[0].folder.with_name('sweep.sbatch')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(path, script(left, config).encode())
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {error}. Choose another 'out' for the sweep."
    ) from error
  print(f'Submit the others: sbatch {shlex.quote(str(path))}')


def script(chosen: Sequence[Run], config: Config) -> str:
  """What sbatch is to run.

  Args:
    chosen: the runs, at least one.
    config: the settings.

  Returns:
    A script of bash.

  Example:
    >>> [run] = sweeps.runs(sweeps.Sweep('program', 'runs/a', {'key': [0]}))
    >>> text = script([run], Config('a.json', at_once=4))
    >>> [line for line in text.splitlines() if 'array=' in line]
    ['#SBATCH --array=0-0%4']
  """
  at_once = '' if config.at_once is None else f'%{config.at_once}'
  name = pathlib.Path(config.sweep).stem
  log = chosen[0].folder.with_name('%x_%a.log')
  options = [
    f'job-name={shlex.quote(name)}',
    f'array=0-{len(chosen) - 1}{at_once}',
    f'output={shlex.quote(str(log))}',
    'open-mode=append',
    'requeue',
    f'signal=USR1@{config.lead}',
    *config.options,
  ]
  cases = [
    f'  {index}) run=({shlex.join(run.command)}) ;;'
    for index, run in enumerate(chosen)
  ]
  return _SCRIPT.format(
    options='\n'.join(f'#SBATCH --{option}' for option in options),
    cases='\n'.join(cases),
    again=preemption.EXIT_STATUS,
  )


_SCRIPT = """\
#!/usr/bin/env bash
# Written by experiments.launch.slurm. Each job of the array is one run.
{options}

case "$SLURM_ARRAY_TASK_ID" in
{cases}
  *) echo "no run has the index $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac

# Asked to make room, the run ends by itself; this script must outlive it.
trap : TERM USR1
srun "${{run[@]}}"
status=$?
if [ "$status" -eq {again} ]; then
  # Not $SLURM_JOB_ID, which for one job of an array is that of all of them.
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""


def run(args: Sequence[str] | None = None) -> int:
  """The program.

  Args:
    args: the command line; None is that of this process.

  Returns:
    The exit status.
  """
  return sweeps.run_launcher('slurm', main, Config(), __doc__, args)


if __name__ == '__main__':
  sys.exit(run())
