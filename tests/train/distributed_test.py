"""Several processes train as one; run as a program, this file is one."""

import dataclasses
import os
import pathlib
import sys
import time

import jax
import processes
import pytest
import tyro

from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import distributed
from powerprop_jax.train.scale.distributed import HostsConfig, LocalConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """What one of the processes does."""

  out: pathlib.Path = pathlib.Path()
  hosts: HostsConfig = HostsConfig()


def main(config):
  distributed.initialise(config.hosts)
  index = jax.process_index()
  try:
    distributed.check_agreement({'optimizer': {'rate': (0.1, 0.5)[index]}})
  except UserError as error:
    (config.out / f'{index}.txt').write_text(str(error))


class AgreementTest:
  @pytest.mark.slow
  def test_other_settings_are_named_on_every_host(self, tmp_path):
    processes.free_port()
    hosts = (*processes.TWO_HOSTS, '--', sys.executable)
    processes.run(*hosts, __file__, '--out', tmp_path)
    assert_disagree(tmp_path)

  @pytest.mark.slow
  def test_hosts_learn_from_slurm_who_they_are(self, tmp_path):
    port = str(processes.free_port())
    first, second = (
      processes.started(
        *(__file__, '--out', tmp_path, '--hosts.coordinator', 'cluster'),
        SLURM_JOB_ID='7',
        SLURM_STEP_NODELIST='localhost',
        SLURM_NTASKS='2',
        SLURM_PROCID=index,
        SLURM_LOCALID=index,
        JAX_COORDINATOR_PORT=port,
      )
      for index in '01'
    )
    with first as one, second as other:
      assert [one.wait(120), other.wait(120)] == [0, 0]
    assert_disagree(tmp_path)


def assert_disagree(folder):
  for index in (0, 1):
    text = (folder / f'{index}.txt').read_text()
    assert 'host 1 differs from host 0' in text
    assert 'settings.optimizer.rate: 0.1 → 0.5' in text
    assert 'same command' in text


class SettingsTest:
  @pytest.mark.parametrize(
    ('config', 'message'),
    [
      (HostsConfig('somewhere', 2, 0), "'address:port' or 'cluster', got 'so"),
      (HostsConfig('here:1', 2), 'needs hosts.count and hosts.index.*2 and No'),
      (HostsConfig('here:1', 2, 2), 'from 0 to hosts.count - 1, got 2 of 2'),
      (HostsConfig('here:1', 0, 0), 'hosts.count must be at least 1, got 0'),
      (HostsConfig(timeout=0), 'at least 1 second, got 0'),
    ],
  )
  def test_wrong_ones_are_refused(self, config, message):
    with pytest.raises(UserError, match=message):
      distributed.initialise(config)


class RunLocalTest:
  def run(self, code, **settings):
    processes.free_port()
    return distributed.run_local(
      [sys.executable, '-c', code], LocalConfig(**settings)
    )

  def test_every_host_is_told_who_it_is(self, tmp_path):
    code = f"""
import os, sys
where, count, index = sys.argv[1:]
open({str(tmp_path)!r} + '/' + index, 'w').write(
    where + ' ' + count + ' ' + os.environ['XLA_FLAGS'].split()[-1])
"""
    assert self.run(code, count=3, devices=2) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
      f'--hosts.index={i}' for i in range(3)
    }
    # All of them listen to the same one.
    (text,) = {path.read_text() for path in tmp_path.iterdir()}
    assert text.startswith('--hosts.coordinator=127.0.0.1:')
    assert text.endswith('=3 --xla_force_host_platform_device_count=2')

  def test_failure_of_one_ends_the_others(self, tmp_path):
    code = f"""
import os, pathlib, sys, time
file = pathlib.Path({str(tmp_path)!r}, 'pid')
if sys.argv[-1][-1] == '1':
  while not file.exists():
    time.sleep(0.05)
  sys.exit(3)
file.with_suffix('.part').write_text(str(os.getpid()))
file.with_suffix('.part').rename(file)
time.sleep(120)
"""
    assert self.run(code) == 3
    with pytest.raises(ProcessLookupError):
      os.kill(int((tmp_path / 'pid').read_text()), 0)

  def test_sigterm_is_passed_on(self, tmp_path):
    code = f"""
import pathlib, signal, sys, time
file = lambda name: pathlib.Path({str(tmp_path)!r}, name + sys.argv[-1][-1])
def end(*_):
  file('saved').touch()
  sys.exit(75)
signal.signal(signal.SIGTERM, end)
file('ready').touch()
time.sleep(300)
"""
    arguments = (*processes.TWO_HOSTS, '--', sys.executable, '-c', code)
    with processes.started(*arguments) as launcher:
      while not all((tmp_path / f'ready{i}').exists() for i in (0, 1)):
        assert launcher.poll() is None
        time.sleep(0.05)
      launcher.terminate()
      assert launcher.wait(60) == 75
    assert all((tmp_path / f'saved{i}').exists() for i in (0, 1))

  @pytest.mark.parametrize(
    ('args', 'message'),
    [
      (['--counts', '2', '--', 'true'], '--counts'),
      ([], 'write it behind --'),
      (['--count', '0', '--', 'true'], 'count must be at least 1'),
      (['--', '/does/not/exist'], 'cannot run /does/not/exist'),
    ],
  )
  def test_mistakes_are_one_line(self, capsys, args, message):
    assert distributed.main(args) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('error: ') and message in line


if __name__ == '__main__':
  main(tyro.cli(Config))
