"""Sweeps are the runs they say, and survive interruptions."""

import json
import os
import pathlib
import re
import shlex
import signal
import sys
import time

import processes
import programs
import pytest

from experiments.launch import __main__ as launch
from experiments.launch import sweeps
from experiments.launch.sweeps import Sweep

LOCAL = ['--cluster', 'local']
# Or it would write to what sys.stderr is while it is imported.
os.environ['SUBMITIT_LOG_LEVEL'] = 'NOCONFIG'


@pytest.fixture
def write_sweep(tmp_path, monkeypatch):
  """Writes a file for the program of the tests, and gives its path."""
  # Where the runs find the program, beside where they find the library.
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
  # The tests' own eight devices are not for the runs.
  monkeypatch.setenv('XLA_FLAGS', '')

  def write(*presets, **fields):
    stored = {
      'program': 'launch_program',
      'out': str(tmp_path / 'out'),
      'vary': {'preset': presets or ['good', 'preempted', 'bad']},
    }
    file = tmp_path / 'sweep.json'
    file.write_text(json.dumps(stored | fields))
    return str(file)

  return write


class SweepTest:
  def test_runs_are_all_combinations_in_order(self):
    sweep = Sweep(
      'program',
      'out',
      {'preset': ['a', 'b'], 'net.width-factor': [1, 0.5], 'kept': [[1, 0.1]]},
      ('--fast',),
    )
    found = sweeps.runs(sweep)
    starts = ('a', '1'), ('a', '0.5'), ('b', '1'), ('b', '0.5')
    names = [f'{preset}_width_factor_{w}_kept_1_0.1' for preset, w in starts]
    assert [run.name for run in found] == names
    assert shlex.join(found[1].command[1:]) == (
      '-m program --fast --preset a --net.width-factor 0.5 --kept 1 0.1 '
      '--out out/a_width_factor_0.5_kept_1_0.1 --resume'
    )

  def test_names_are_those_of_folders_beside_each_other(self):
    sweep = Sweep('program', 'out', {'data.dir': ['../x', '/y z', '.']})
    folders = [str(run.folder) for run in sweeps.runs(sweep)]
    assert folders == ['out/dir_.._x', 'out/dir__y_z', 'out/dir_.']

  def test_example_is_a_sweep_of_the_real_program(self):
    [file] = (processes.ROOT / 'experiments' / 'launch').glob('*.json')
    found = sweeps.load(str(file))
    assert len(found) == 21
    assert found[-1].name == 'top_kast_90_erk_powerprop_key_2'


def test_last_line_is_the_last_that_says_anything(tmp_path):
  log = tmp_path / 'log'
  assert launch.last_line(log) == ''
  log.write_text('x\nerror:  a\tb \n\n \n')
  assert launch.last_line(log) == 'error:  a\tb'


def test_submitit_says_what_it_cannot_do(write_sweep, capsys):
  pytest.importorskip('submitit')
  status = launch.run([write_sweep(), *LOCAL, '--parameters', 'timeouts=3'])
  assert 'submitit cannot do this' in programs.error(status, capsys)


def wait_for(text, log):
  for _ in range(1200):
    if log.exists() and text in log.read_text():
      return
    time.sleep(0.1)
  raise AssertionError(f'{log} does not say {text!r}')


def steps(log):
  found = re.findall(r'step (\d+)$', log.read_text(), re.MULTILINE)
  return [int(step) for step in found]


def launched(file):
  """The launcher as a program of its own."""
  return processes.started('-m', 'experiments.launch', file, *LOCAL)


@pytest.mark.slow
class RunsTest:
  @pytest.fixture(autouse=True)
  def _needs_submitit(self):
    pytest.importorskip('submitit')

  def test_failures_are_reported_and_the_rest_is_done(
    self, write_sweep, tmp_path, capsys
  ):
    out = tmp_path / 'out'
    assert launch.run([write_sweep(), *LOCAL, '--at-once', '2']) == 1
    printed = capsys.readouterr()
    assert re.search(r'^preempted: job \d+$', printed.out, re.MULTILINE)
    [line] = printed.err.strip().splitlines()
    log = out / 'bad.log'
    assert line == f'error: bad failed: error: step 3 is bad. See {log}.'
    assert (out / 'preempted' / 'complete.json').exists()
    assert steps(out / 'preempted.log') == steps(out / 'good.log')
    assert 'saved at step 9 of 24' in (out / 'preempted.log').read_text()
    # Again: what is complete is left alone.
    both = lambda: [programs.times(out / x) for x in ('good', 'preempted')]
    before = both()
    assert launch.run([write_sweep('good', 'preempted'), *LOCAL]) == 0
    assert '2 of 2 runs are complete.' in capsys.readouterr().out
    # Other settings in the same folder are for the program to refuse.
    other = write_sweep('good', args=['--num-steps', '30'])
    assert launch.run([other, *LOCAL]) == 1
    assert 'num_steps: 24 → 30' in capsys.readouterr().err
    assert both() == before

  @pytest.mark.parametrize(
    ('number', 'status'),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130)],
    ids=['preempted', 'interrupted'],
  )
  def test_stopped_launcher_goes_on_later(
    self, write_sweep, tmp_path, number, status
  ):
    # Time enough for a busy machine to hand the signal on before the end.
    vary = {'preset': ['good'], 'num_steps': [50, 54]}
    file = write_sweep(vary=vary, args=['--delay', '0.2'])
    first, second = (tmp_path / 'out' / f'good_num_steps_{n}' for n in (50, 54))
    log = first.with_name(f'{first.name}.log')
    with launched(file) as launcher:
      wait_for('step 7', log)
      launcher.send_signal(number)
      printed, _ = launcher.communicate(timeout=300)
      assert launcher.returncode == status
    assert 'good_num_steps_50: stopped, to be continued' in printed
    assert 'saved at step' in log.read_text() and not second.exists()
    if number == signal.SIGTERM:  # once is enough
      assert launch.run([file, *LOCAL]) == 0
      assert (first / 'complete.json').exists()
      assert steps(log) == list(range(1, 51))

  def test_runs_of_a_killed_launcher_are_waited_for(
    self, write_sweep, tmp_path
  ):
    file = write_sweep('good', args=['--delay', '0.1'])
    log = tmp_path / 'out' / 'good.log'
    with launched(file) as launcher:
      wait_for('step 2', log)
      launcher.kill()
      # The run goes on, and is not begun a second time.
      assert launch.run([file, *LOCAL]) == 0
    assert steps(log) == list(range(1, 25))

  def test_job_whose_time_is_up_saves_and_goes_on(self, write_sweep, tmp_path):
    import submitit

    [run] = sweeps.load(write_sweep('good', args=['--delay', '0.2']))
    executor = submitit.AutoExecutor(tmp_path / 'jobs', cluster='local')
    executor.update_parameters(timeout_min=10)
    run.log.parent.mkdir()
    job = executor.submit(launch.Job(run))
    wait_for('step 5', run.log)
    # The job is the only process that submitit's own has started.
    children = f'/proc/{job.job_id}/task/{job.job_id}/children'
    os.kill(int(pathlib.Path(children).read_text()), signal.SIGUSR2)
    assert job.result() == 0
    assert run.is_complete
    assert steps(run.log) == list(range(1, 25))
