"""A run's folder is its own: nothing else is written to, nothing is lost."""

import dataclasses
import enum
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import json_files
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Data:
  name: str = 'digits'
  num_validation: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  alphas: tuple[float, ...] = (1.0, 2.0)
  data: Data = Data()
  out: str = 'somewhere'
  resume: bool = False


def open_run(path, config=None, program='one_shot_pruning', resume=False):
  config = Config() if config is None else config
  return RunFolder(path, config, program=program, resume=resume)


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def refusal(*args, **kwargs):
  """The message with which a folder is refused: a single line."""
  with pytest.raises(UserError) as caught:
    open_run(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


class OpeningTest:
  @pytest.mark.parametrize('resume', [False, True])
  @pytest.mark.parametrize('exists', [False, True])
  def test_missing_or_empty_folder_becomes_a_run(
    self, tmp_path, resume, exists
  ):
    path = tmp_path / 'a' / 'b'
    if exists:
      path.mkdir(parents=True)
      (path / '.config.json.x1y2').write_text('{"for')
    folder = open_run(path, resume=resume)
    assert not folder.is_resumed
    assert not folder.is_complete
    stored = json.loads((path / 'config.json').read_text())
    assert stored['config'] == {
      'alphas': [1.0, 2.0],
      'data': {'name': 'digits', 'num_validation': None},
    }
    assert stored['program'] == 'one_shot_pruning'
    assert stored['versions']['powerprop_jax'] is not None
    assert stored['versions']['jax'] is not None
    assert {'date', 'command', 'devices'} < set(stored)
    assert run_folder.read_config(path) == stored

  def test_same_settings_continue(self, tmp_path):
    open_run(tmp_path)
    before = contents(tmp_path)
    config = Config(out='elsewhere', resume=True)
    assert open_run(tmp_path, config, resume=True).is_resumed
    assert contents(tmp_path) == before

  def test_run_without_resume_is_refused(self, tmp_path):
    open_run(tmp_path)
    before = contents(tmp_path)
    message = refusal(tmp_path)
    assert 'already holds a run' in message
    assert '--resume' in message
    assert '--out' in message
    assert contents(tmp_path) == before

  def test_other_settings_are_refused_by_name(self, tmp_path):
    open_run(tmp_path)
    before = contents(tmp_path)
    config = Config(alphas=(1.0, 3.0), data=Data('mnist'))
    message = refusal(tmp_path, config, resume=True)
    assert 'alphas: [1.0, 2.0] → [1.0, 3.0]' in message
    assert "data.name: 'digits' → 'mnist'" in message
    assert 'num_validation' not in message
    assert contents(tmp_path) == before

  def test_settings_that_came_or_went_are_named(self, tmp_path):
    open_run(tmp_path)
    stored = json.loads((tmp_path / 'config.json').read_text())
    stored['config']['old'] = stored['config'].pop('alphas')
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    message = refusal(tmp_path, resume=True)
    assert "old: [1.0, 2.0] → 'not set'" in message
    assert "alphas: 'not set' → [1.0, 2.0]" in message

  def test_other_program_is_refused(self, tmp_path):
    open_run(tmp_path)
    message = refusal(tmp_path, program='train', resume=True)
    assert 'holds a run of one_shot_pruning, not of train' in message

  @pytest.mark.parametrize('resume', [False, True])
  def test_folder_of_something_else_is_refused(self, tmp_path, resume):
    for name in 'abcd':
      (tmp_path / f'{name}.txt').write_text('mine')
    before = contents(tmp_path)
    message = refusal(tmp_path, resume=resume)
    assert 'it has a.txt, b.txt, c.txt, …' in message
    assert contents(tmp_path) == before

  @pytest.mark.parametrize(
    ('content', 'expected'),
    [
      ('{"model_type": "bert"}', 'was not written by this version'),
      ('[1]', 'was not written by this version'),
      ('{"conf', 'cannot read'),
    ],
  )
  def test_foreign_config_is_refused(self, tmp_path, content, expected):
    (tmp_path / 'config.json').write_text(content)
    assert expected in refusal(tmp_path, resume=True)
    assert (tmp_path / 'config.json').read_text() == content

  def test_file_is_refused(self, tmp_path):
    (tmp_path / 'file').write_text('mine')
    assert 'is a file, not a folder' in refusal(tmp_path / 'file')
    assert 'cannot use' in refusal(tmp_path / 'file' / 'below')

  def test_no_run_to_read(self, tmp_path):
    with pytest.raises(UserError, match='holds no run'):
      run_folder.read_config(tmp_path)


class WritingTest:
  def test_results_are_strict_json(self, tmp_path):
    folder = open_run(tmp_path)
    folder.write_results(
      [
        {'alpha': np.float32(1.5), 'key': np.int64(0), 'accuracy': np.nan},
        {'alpha': jnp.float32(2), 'loss': float('inf'), 'name': None},
      ]
    )
    text = (tmp_path / 'results.json').read_text()
    assert 'NaN' not in text
    assert json.loads(text) == folder.read_json('results.json')
    assert folder.read_json('results.json') == [
      {'alpha': 1.5, 'key': 0, 'accuracy': None},
      {'alpha': 2.0, 'loss': None, 'name': None},
    ]

  def test_nested_results_are_refused(self, tmp_path):
    folder = open_run(tmp_path)
    with pytest.raises(ValueError, match="flat records, but 'accuracy'"):
      folder.write_results([{'accuracy': np.ones(3)}])
    assert not (tmp_path / 'results.json').exists()

  def test_failed_write_leaves_the_old_file(self, tmp_path):
    folder = open_run(tmp_path)
    folder.write_results([{'alpha': 1.0}])
    before = contents(tmp_path)
    with pytest.raises(TypeError, match='is not JSON'):
      folder.write_results([{'alpha': object()}])
    assert contents(tmp_path) == before

  def test_complete_is_remembered(self, tmp_path):
    folder = open_run(tmp_path)
    folder.mark_complete()
    assert folder.is_complete
    assert open_run(tmp_path, resume=True).is_complete

  def test_paths_are_inside(self, tmp_path):
    folder = open_run(tmp_path)
    assert folder.metrics_path == tmp_path / 'metrics.jsonl'
    assert folder.checkpoints_path == tmp_path / 'checkpoints'

  def test_home_is_expanded(self, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert open_run('~/run').path == tmp_path / 'run'


class Colour(enum.IntEnum):
  RED = 1


class Point(NamedTuple):
  x: float


class ToJsonTest:
  @pytest.mark.parametrize(
    ('value', 'expected'),
    [
      (np.bool_(True), True),
      (np.float64('-inf'), None),
      (jnp.bfloat16(1.5), 1.5),
      (jnp.array([[1, 2]]), [[1, 2]]),
      (np.array([1.0, np.nan]), [1.0, None]),
      (pathlib.Path('a/b'), 'a/b'),
      (Colour.RED, 'RED'),
      (Point(2.0), [2.0]),
      (Data(), {'name': 'digits', 'num_validation': None}),
      ({2: (1, 'α')}, {'2': [1, 'α']}),
    ],
  )
  def test_values(self, value, expected):
    found = json_files.to_json(value)
    assert json.dumps(found, allow_nan=False) == json.dumps(expected)

  @pytest.mark.parametrize('value', [print, object(), Data, 1j])
  def test_others_are_refused(self, value):
    with pytest.raises(TypeError, match='is not JSON'):
      json_files.to_json(value)


def raise_(error):
  raise error


# A ValueError raised in a test counts as another library's: powerprop_jax and
# the programs are the user's side.
class RunMainTest:
  def test_success_is_zero(self, capsys):
    assert run_folder.run_main(print, 'done') == 0
    assert capsys.readouterr() == ('done\n', '')

  def test_mistake_is_one_line_and_two(self, capsys):
    error = UserError('no data set\n  here; try there.')
    assert run_folder.run_main(raise_, error) == 2
    assert capsys.readouterr() == ('', 'error: no data set here; try there.\n')

  def test_value_error_of_the_library_is_a_mistake(self, tmp_path, capsys):
    def main():
      RunFolder(tmp_path, Config(), program='x').write_results([{'a': [1]}])

    assert run_folder.run_main(main) == 2
    assert capsys.readouterr().err.startswith('error: results are flat records')

  def test_value_error_from_elsewhere_keeps_its_traceback(self):
    with pytest.raises(ValueError, match='invalid literal'):
      run_folder.run_main(lambda: raise_(ValueError('invalid literal')))

  def test_interruption_names_resume(self, capsys):
    assert run_folder.run_main(raise_, KeyboardInterrupt()) == 130
    assert '--resume' in capsys.readouterr().err

  def test_a_reader_that_goes_away_is_no_mistake(self):
    program = (
      'from powerprop_jax.train import run_folder\n'
      'def main():\n'
      '  for _ in range(10_000):\n'
      '    print("a line")\n'
      'run_folder.run_main(main)\n'
    )
    with subprocess.Popen(
      [sys.executable, '-c', program],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    ) as process:
      process.stdout.readline()
      process.stdout.close()
      assert process.stderr.read() == b''

  def test_program_exits_with_the_status(self, tmp_path):
    (tmp_path / 'file').write_text('')
    program = (
      'import sys\n'
      'from powerprop_jax.train import run_folder\n'
      'def main(out):\n'
      '  if out == "0":\n'
      '    raise ValueError("out must not be 0.")\n'
      '  run_folder.RunFolder(out, {}, program="p")\n'
      'sys.exit(run_folder.run_main(main, sys.argv[1]))\n'
    )
    for out, message in (
      (str(tmp_path / 'file'), 'error: .*is a file'),
      ('0', 'error: out must not be 0.'),
    ):
      found = subprocess.run(
        [sys.executable, '-c', program, out],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      )
      assert found.returncode == 2
      assert found.stdout == ''
      assert len(found.stderr.splitlines()) == 1
      assert re.match(message, found.stderr)
