"""Sweeps are the same runs with every launcher, and survive interruptions."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import stream_runs

from experiments.launch import processes, slurm, submitit_jobs, sweeps
from experiments.launch.sweeps import Sweep
from powerprop_jax.train.runs.errors import UserError

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parents[1]
PRESETS = ['good', 'preempted', 'bad']


@pytest.fixture
def write_sweep(tmp_path, monkeypatch):
  """Writes a file for the program of the tests, and gives its path."""
  # Where the runs find the program, beside where they find the library.
  path = os.pathsep.join(map(str, (TESTS, TESTS.parent, ROOT)))
  monkeypatch.setenv('PYTHONPATH', path)
  # The tests' own eight devices are not for the runs.
  monkeypatch.setenv('XLA_FLAGS', '')

  def write(name='sweep', **fields):
    stored = {
      'program': 'launch_program',
      'out': str(tmp_path / 'out'),
      'vary': {'preset': PRESETS},
    }
    file = tmp_path / f'{name}.json'
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
    assert [run.name for run in found] == [
      f'{preset}_width_factor_{width}_kept_1_0.1'
      for preset in ('a', 'b')
      for width in ('1', '0.5')
    ]
    assert shlex.join(found[1].command[1:]) == (
      '-m program --fast --preset a --net.width-factor 0.5 --kept 1 0.1 '
      '--out out/a_width_factor_0.5_kept_1_0.1 --resume'
    )

  def test_names_are_those_of_folders_beside_each_other(self):
    sweep = Sweep('program', 'out', {'data.dir': ['../x', '/y z', '.']})
    folders = [run.folder for run in sweeps.runs(sweep)]
    assert {folder.parent for folder in folders} == {pathlib.Path('out')}
    assert [folder.name for folder in folders] == [
      *('dir_.._x', 'dir__y_z', 'dir_.'),
    ]  # fmt: skip

  def test_example_is_a_sweep_of_the_real_program(self):
    [file] = (ROOT / 'experiments' / 'launch').glob('*.json')
    found = sweeps.load(str(file))
    assert len(found) == 21
    assert found[-1].name == 'top_kast_90_erk_powerprop_key_2'

  @pytest.mark.parametrize(
    ('fields', 'message'),
    [
      ({'vary': {'key': [0, '0']}}, 'two runs .* called key_0'),
      ({'vary': {'key': []}}, "'vary' must have a list .* got {'key': "),
      ({'vary': ['key']}, "'vary' must have a list"),
      ({'args': '--fast'}, "'args' must be a list of texts, got '--fast'"),
      ({'out': 3}, "'out' must be text, got 3"),
      ({'seeds': [0]}, 'seeds.* has the fields program, out, vary, args'),
      ({'program': 'no_such_program'}, "cannot find .* 'no_such_program'"),
      ({'program': 'stream_runs'}, 'stream_runs is no program of this kind'),
      ({'args': ['--speed', '3']}, 'good: .*--speed'),
      ({'vary': {'preset': ['bed']}}, "bed: unknown preset 'bed'; there are"),
      ({'vary': {'delay': ['long']}}, 'delay_long: .*--delay.*long'),
    ],
  )
  def test_mistakes_are_named(self, write_sweep, fields, message):
    with pytest.raises(UserError, match=message):
      sweeps.load(write_sweep(**fields))

  def test_every_launcher_says_them_in_one_line(self, tmp_path, capsys):
    missing = str(tmp_path / 'no.json')
    incomplete = tmp_path / 'incomplete.json'
    incomplete.write_text('{"out": "a"}')
    for launcher in (processes, slurm, submitit_jobs):
      for args, message in (
        ([missing], f'cannot read {missing} as JSON'),
        ([str(incomplete)], "'program' and 'vary'"),
        ([], 'SWEEP.json'),
      ):
        assert launcher.run(args) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith('error: ') and message in line


@contextlib.contextmanager
def launched(*args):
  """The plain launcher as a program of its own."""
  with subprocess.Popen(
    [sys.executable, '-m', 'experiments.launch.processes', *args],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  ) as launcher:
    # A test that waits for ever tells nobody why.
    watch = threading.Timer(300, launcher.kill)
    watch.start()
    try:
      yield launcher
    finally:
      watch.cancel()
      launcher.kill()


def wait_for(text, log):
  for _ in range(1200):
    if log.exists() and text in log.read_text():
      return
    time.sleep(0.1)
  raise AssertionError(f'{log} does not say {text!r}')


def times(folder):
  return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}


@pytest.mark.slow
class ProcessesTest:
  def test_failures_are_reported_and_the_rest_is_done(
    self, write_sweep, tmp_path, capsys
  ):
    file = write_sweep()
    good, preempted, bad = (tmp_path / 'out' / name for name in PRESETS)
    assert processes.run([file, '--workers', '2']) == 1
    printed = capsys.readouterr()
    assert '2 of 3 runs are complete.' in printed.out
    assert 'preempted: stopped by a signal, queued again' in printed.out
    [line] = printed.err.strip().splitlines()
    assert line.startswith('error: bad failed with status 2: error: loss, ')
    assert line.endswith(f'See {bad}.log.')
    # Interrupted or not, the run is the same.
    assert (preempted / 'complete.json').exists()
    assert stream_runs.lines(preempted) == stream_runs.lines(good)
    assert 'saved at step 9 of 24' in preempted.with_suffix('.log').read_text()
    # Again: what is complete is left alone.
    before = times(good) | times(preempted)
    assert processes.run([write_sweep(vary={'preset': PRESETS[:2]})]) == 0
    assert '2 of 2 runs are complete.' in capsys.readouterr().out
    assert times(good) | times(preempted) == before
    # Other settings in the same folder are for the program to refuse.
    other = write_sweep(args=['--num-steps', '30'], vary={'preset': ['good']})
    assert processes.run([other]) == 1
    assert 'num_steps: 24 → 30' in capsys.readouterr().err
    assert times(good) | times(preempted) == before

  @pytest.mark.parametrize(
    ('number', 'status'),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130)],
    ids=['preempted', 'interrupted'],
  )
  def test_stopped_launcher_goes_on_later(
    self, write_sweep, tmp_path, number, status
  ):
    vary = {'preset': ['good'], 'num_steps': [20, 24]}
    file = write_sweep(vary=vary, args=['--delay', '0.2'])
    first, second = (tmp_path / 'out' / f'good_num_steps_{n}' for n in (20, 24))
    log = first.with_name(f'{first.name}.log')
    with launched(file) as launcher:
      wait_for('step 7', log)
      launcher.send_signal(number)
      printed, _ = launcher.communicate()
      assert launcher.returncode == status
    assert 'good_num_steps_20: stopped, to be continued' in printed
    assert '0 of 2 runs are complete.' in printed
    assert not second.exists()
    if number == signal.SIGTERM:  # once is enough
      assert processes.run([file]) == 0
      assert (first / 'complete.json').exists()
      steps = re.findall(r'step (\d+)$', log.read_text(), re.MULTILINE)
      assert [int(step) for step in steps] == list(range(1, 21))

  def test_runs_of_a_killed_launcher_are_waited_for(
    self, write_sweep, tmp_path, capsys
  ):
    file = write_sweep(vary={'preset': ['good']}, args=['--delay', '0.1'])
    log = tmp_path / 'out' / 'good.log'
    with launched(file) as launcher:
      wait_for('step 2', log)
      launcher.kill()
    assert processes.run([file]) == 0
    printed = capsys.readouterr().out
    assert 'good: waiting, as another launcher has it' in printed
    assert 'good: started' not in printed and '1 of 1 runs' in printed
    assert log.read_text().count('step 24') == 1


class SettingsTest:
  @pytest.mark.parametrize(
    ('args', 'message'),
    [
      (['--workers', '0'], '--workers must be at least 1, got 0'),
      (['--gpus', '0', '0'], '--gpus must differ'),
      (['--gpus', '0', '--workers', '2'], 'no effect with --gpus'),
      (['--requeues', '-1'], '--requeues must be at least 0'),
    ],
  )
  def test_wrong_ones_are_refused(self, write_sweep, capsys, args, message):
    assert processes.run([write_sweep(), *args]) == 2
    assert message in capsys.readouterr().err

  def test_unwritable_folder_is_refused(self, write_sweep, tmp_path, capsys):
    (tmp_path / 'out').write_text('a file')
    file = write_sweep()
    assert processes.run([file]) == 2
    assert slurm.run([file]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
      assert line.startswith('error: cannot write') and "another 'out'" in line

  def test_last_line_is_the_last_that_says_anything(self, tmp_path):
    log = tmp_path / 'log'
    assert processes.last_line(log) == ''
    log.write_text('x' * 20_000 + '\nerror:  a\tb \n\n \n')
    assert processes.last_line(log) == 'error: a b'


def complete(run):
  """Makes a run look as if it were done."""
  run.folder.mkdir(parents=True)
  (run.folder / 'complete.json').write_text('{}')
  stored = {
    'format': 'powerprop_jax run, version 1',
    'program': 'program',
    'config': {},
    'date': 'today',
    'command': shlex.join(['program.py', *run.command[3:]]),
  }
  (run.folder / 'config.json').write_text(json.dumps(stored))


class SlurmTest:
  def write(self, write_sweep, tmp_path, *args):
    assert slurm.run([write_sweep(), *args]) == 0
    return tmp_path / 'out' / 'sweep.sbatch'

  def options(self, script):
    return re.findall(r'^#SBATCH --(.*)$', script.read_text(), re.MULTILINE)

  def start(self, script, index, srun, folder):
    """Runs the script where srun and scontrol are other programs."""
    for name, text in (
      ('srun', srun),
      ('scontrol', f'echo "$@" >> {folder}/asked'),
    ):
      (folder / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
      (folder / name).chmod(0o755)
    return subprocess.run(
      ['bash', script],
      env=os.environ
      | {
        'PATH': f'{folder}:{os.environ["PATH"]}',
        'SLURM_ARRAY_JOB_ID': '70',
        'SLURM_ARRAY_TASK_ID': str(index),
        'SLURM_JOB_ID': '70',
      },
      capture_output=True,
      text=True,
      check=False,
    )

  def test_index_chooses_the_run(self, write_sweep, tmp_path, capsys):
    script = self.write(write_sweep, tmp_path, '--at-once', '2')
    assert f'sbatch {script}' in capsys.readouterr().out
    subprocess.run(['bash', '-n', script], check=True)
    options = self.options(script)
    assert options == [
      'job-name=sweep', 'array=0-2%2', f'output={tmp_path}/out/%x_%a.log',
      'open-mode=append', 'requeue', 'signal=USR1@120', 'time=24:00:00',
    ]  # fmt: skip
    runs = sweeps.load(write_sweep())
    for index, run in enumerate(runs):
      found = self.start(script, index, 'printf "%s\\n" "$@"', tmp_path)
      assert found.stdout.splitlines() == list(run.command)
      assert found.returncode == 0
    found = self.start(script, 3, 'echo', tmp_path)
    assert found.returncode == 2 and 'index 3' in found.stderr

  @pytest.mark.parametrize('status', [0, 2, 75])
  def test_status_75_is_queued_again(self, write_sweep, tmp_path, status):
    script = self.write(write_sweep, tmp_path)
    # As Slurm ends it: the signal reaches this script as well.
    found = self.start(script, 1, f'kill -TERM $PPID; exit {status}', tmp_path)
    assert found.returncode == status
    asked = tmp_path / 'asked'
    assert asked.exists() == (status == 75)
    if status == 75:
      assert asked.read_text() == 'requeue 70_1\n'

  def test_complete_runs_are_left_out(self, write_sweep, tmp_path, capsys):
    runs = sweeps.load(write_sweep())
    complete(runs[1])
    script = self.write(
      write_sweep, tmp_path, '--options', 'gpus=8', 'exclusive', '--lead', '60'
    )
    assert '1 of 3 runs are complete' in capsys.readouterr().out
    options = self.options(script)
    assert 'array=0-1' in options and 'signal=USR1@60' in options
    assert options[-2:] == ['gpus=8', 'exclusive']
    found = self.start(script, 1, 'printf "%s\\n" "$@"', tmp_path)
    assert found.stdout.splitlines() == list(runs[2].command)
    complete(runs[0])
    complete(runs[2])
    script.unlink()
    assert not self.write(write_sweep, tmp_path).exists()
    assert 'sbatch' not in capsys.readouterr().out

  def test_words_with_spaces_stay_one(self, tmp_path):
    sweep = Sweep('p', str(tmp_path / 'a b'), {'title': ['it\'s "x" $HOME']})
    runs = sweeps.runs(sweep)
    script = tmp_path / 'script'
    script.write_text(slurm.script(runs, slurm.Config('a b.json')))
    found = self.start(script, 0, 'printf "%s\\n" "$@"', tmp_path)
    assert found.stdout.splitlines() == list(runs[0].command)

  def test_numbers_out_of_range_are_refused(self, write_sweep, capsys):
    for args in (['--at-once', '0'], ['--lead', '0']):
      assert slurm.run([write_sweep(), *args]) == 2
      assert f'{args[0]} must be at least 1' in capsys.readouterr().err


@pytest.mark.slow
class SubmititTest:
  @pytest.fixture(autouse=True)
  def _needs_submitit(self):
    pytest.importorskip('submitit')

  def test_jobs_are_the_runs(self, write_sweep, tmp_path, capsys):
    local = ['--cluster', 'local', '--wait']
    vary = {'preset': ['preempted', 'bad']}
    assert submitit_jobs.run([write_sweep(vary=vary), *local]) == 1
    printed = capsys.readouterr()
    assert re.search(r'^preempted: job \d+$', printed.out, re.MULTILINE)
    [line] = printed.err.strip().splitlines()
    assert line.startswith('error: bad failed. See ')
    log = (tmp_path / 'out' / 'submitit').glob('*.err')
    assert any('saved at step 9 of 24' in path.read_text() for path in log)
    # Again, what is left.
    vary = {'preset': ['preempted']}
    assert submitit_jobs.run([write_sweep(vary=vary), *local]) == 0
    assert '1 of 1 runs are complete.' in capsys.readouterr().out

  def test_job_whose_time_is_up_saves_and_goes_on(self, write_sweep, tmp_path):
    import submitit

    [run] = sweeps.load(
      write_sweep(vary={'preset': ['good']}, args=['--delay', '0.2'])
    )
    executor = submitit.AutoExecutor(tmp_path / 'jobs', cluster='local')
    executor.update_parameters(timeout_min=10)
    job = executor.submit(submitit_jobs.Job(run.command))
    wait_for('step 5', job.paths.stdout)
    os.kill(_child(int(job.job_id)), signal.SIGUSR2)
    assert job.result() == 0
    assert run.is_complete
    steps = re.findall(
      r'^step (\d+)$', job.paths.stdout.read_text(), re.MULTILINE
    )
    assert [int(step) for step in steps] == list(range(1, 25))

  def test_wrong_parameters_are_refused(self, write_sweep, capsys):
    for text, message in (
      ('timeout_min', 'are name=value'),
      ('timeouts=3', 'submitit cannot do this'),
    ):
      args = ['--cluster', 'local', '--parameters', text]
      assert submitit_jobs.run([write_sweep(), *args]) == 2
      assert message in capsys.readouterr().err


def _child(process):
  """The only process that a process has started."""
  [child] = (
    pathlib.Path(f'/proc/{process}/task/{process}/children').read_text().split()
  )
  return int(child)


def test_lock_is_of_the_file_and_ends_with_it(write_sweep, tmp_path, capsys):
  file = write_sweep(vary={'preset': ['good']})
  [run] = sweeps.load(file)
  complete(run)
  with run.log.open('ab') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    release = threading.Timer(1.0, log.close)
    release.start()
    assert processes.run([file]) == 0
    release.join()
  assert 'good: waiting' in capsys.readouterr().out
