"""A run's folder is its own: nothing else is written to, nothing is lost."""

import dataclasses
import enum
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import processes
import programs
import pytest

from powerprop_jax.files import json_files
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs import contents
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs.contents import Contents, Networks
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale.preemption import Preempted


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


CONTENTS = Contents(
  Networks('mlp', DataConfig(), 10, (2.0,), (0,)),
  contents.Page('Title', 'mlp', (contents.training_section('mlp'),)),
)


def open_run(path, config=None, program='train', resume=False, **options):
  config = Config() if config is None else config
  return RunFolder(path, config, program=program, resume=resume, **options)


def refusal(path, *args, **kwargs):
  """The message with which a folder is refused, and left as it is."""
  before = programs.contents(path)
  with pytest.raises(UserError) as caught:
    open_run(path, *args, **kwargs)
  assert programs.contents(path) == before
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
    assert stored['program'] == 'train'
    assert stored['versions']['powerprop_jax'] is not None
    assert stored['versions']['jax'] is not None
    assert {'date', 'command', 'devices'} < set(stored)
    assert run_folder.read_config(path) == stored
    assert contents.read(path, stored) == Contents()

  def test_same_settings_continue(self, tmp_path):
    open_run(tmp_path)
    before = programs.contents(tmp_path)
    config = Config(out='elsewhere', resume=True)
    assert open_run(tmp_path, config, resume=True).is_resumed
    assert programs.contents(tmp_path) == before

  def test_contents_are_written_and_added_where_they_are_not(self, tmp_path):
    open_run(tmp_path, contents=CONTENTS)
    path = tmp_path / 'config.json'
    stored = run_folder.read_config(tmp_path)
    assert contents.read(tmp_path, stored) == CONTENTS
    old = {k: v for k, v in stored.items() if k != 'contents'}
    json_files.write_json(path, old)
    with pytest.raises(UserError, match=r'version 0\.1\.0, .* --resume'):
      contents.read(tmp_path, old)
    open_run(tmp_path, contents=CONTENTS, resume=True)
    assert run_folder.read_config(tmp_path) == stored

  def test_settings_that_differ_are_named(self, tmp_path):
    open_run(tmp_path)
    config = Config(alphas=(1.0, 3.0), data=Data('mnist'))
    message = refusal(tmp_path, config, resume=True)
    assert 'alphas: [1.0, 2.0] → [1.0, 3.0]' in message
    assert "data.name: 'digits' → 'mnist'" in message
    assert 'num_validation' not in message
    stored = json.loads((tmp_path / 'config.json').read_text())
    stored['config']['old'] = stored['config'].pop('alphas')
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    message = refusal(tmp_path, resume=True)
    assert "old: [1.0, 2.0] → 'not set'" in message
    assert "alphas: 'not set' → [1.0, 2.0]" in message

  def test_settings_that_there_were_not_yet_have_their_defaults(self, tmp_path):
    open_run(tmp_path)
    path = tmp_path / 'config.json'
    stored = json.loads(path.read_text())
    del stored['config']['data']['num_validation']
    path.write_text(json.dumps(stored))
    assert open_run(tmp_path, resume=True).is_resumed
    config = Config(data=Data(num_validation=3))
    message = refusal(tmp_path, config, resume=True)
    assert 'data.num_validation: None → 3' in message

  def test_settings_that_may_differ_are_recorded_anew(self, tmp_path):
    open_run(tmp_path).mark_complete()
    config = Config(alphas=(3.0,))
    options = {'resume': True, 'may_differ': ('alphas',)}
    changed = Config(alphas=(3.0,), data=Data('mnist'))
    message = refusal(tmp_path, changed, **options)
    assert "settings: data.name: 'digits' → 'mnist'. Use" in message
    folder = open_run(tmp_path, config, contents=CONTENTS, **options)
    assert not folder.is_complete
    stored = run_folder.read_config(tmp_path)
    assert stored['config']['alphas'] == [3.0]
    assert contents.read(tmp_path, stored) == CONTENTS
    (change,) = stored['changes']
    assert change['settings'] == ['alphas: [1.0, 2.0] → [3.0]']
    # The same once more changes nothing.
    folder.mark_complete()
    assert open_run(tmp_path, config, **options).is_complete

  @pytest.mark.parametrize('resume', [False, True])
  def test_folder_of_something_else_is_refused(self, tmp_path, resume):
    for name in 'abcd':
      (tmp_path / f'{name}.txt').write_text('mine')
    message = refusal(tmp_path, resume=resume)
    assert 'it has a.txt, b.txt, c.txt, …' in message


class WritingTest:
  def test_results_are_strict_json(self, tmp_path):
    folder = open_run(tmp_path)
    row = {'alpha': np.float32(1.5), 'key': np.int64(0), 'accuracy': np.nan}
    folder.write_results([row, {'alpha': jnp.float32(2), 'name': None}])
    text = (tmp_path / 'results.json').read_text()
    assert 'NaN' not in text
    assert json.loads(text) == folder.read_json('results.json')
    assert folder.read_json('results.json') == [
      {'alpha': 1.5, 'key': 0, 'accuracy': None},
      {'alpha': 2.0, 'name': None},
    ]

  def test_what_cannot_be_written_leaves_the_old_file(self, tmp_path):
    folder = open_run(tmp_path)
    folder.write_results([{'alpha': 1.0}])
    before = programs.contents(tmp_path)
    with pytest.raises(TypeError, match='is not JSON'):
      folder.write_results([{'alpha': object()}])
    with pytest.raises(ValueError, match="flat records, but 'accuracy'"):
      folder.write_results([{'accuracy': np.ones(3)}])
    assert programs.contents(tmp_path) == before

  def test_complete_is_remembered_and_home_is_expanded(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setenv('HOME', str(tmp_path))
    folder = open_run('~/run')
    assert folder.path == tmp_path / 'run'
    folder.mark_complete()
    assert folder.is_complete
    assert open_run(folder.path, resume=True).is_complete


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


CONTINUES = 'run the same command with --resume to continue.\n'


class RunMainTest:
  @pytest.mark.parametrize(
    ('main', 'status', 'out', 'err'),
    [
      (lambda: print('done'), 0, 'done\n', ''),
      (lambda: raise_(UserError('no data\n  here; try there.')), 2, '',
       'error: no data here; try there.\n'),
      (lambda: raise_(ValueError('of a program')), 2, '',
       'error: of a program\n'),
      (lambda: raise_(KeyboardInterrupt()), 130, '',
       f'interrupted; {CONTINUES}'),
      (lambda: raise_(Preempted(500, 1000)), 75, '',
       f'stopped by a signal, saved at step 500 of 1,000; {CONTINUES}'),
      (lambda: raise_(Preempted(0, 1000)), 75, '',
       'stopped by a signal, before a step was saved, 1,000 in all; '
       + CONTINUES),
    ],
  )  # fmt: skip
  def test_status_and_what_is_said(self, capsys, main, status, out, err):
    assert run_folder.run_main(main) == status
    assert capsys.readouterr() == (out, err)

  def test_value_error_from_elsewhere_keeps_its_traceback(self):
    with pytest.raises(ValueError, match='property name'):
      run_folder.run_main(lambda: json.loads('{'))

  def test_a_reader_that_goes_away_is_no_mistake(self):
    main = 'lambda: [print("a line") for _ in range(10_000)]'
    with processes.started('-c', PROGRAM.format(main)) as process:
      assert process.stdout.readline() == 'a line\n'
      process.stdout.close()
      assert process.stderr.read() == ''

  def test_program_exits_with_the_status(self):
    with processes.started('-c', PROGRAM.format('refuse, 0')) as process:
      out, err = process.communicate()
    assert (process.returncode, out) == (2, '')
    assert err == 'error: out must not be 0.\n'


PROGRAM = """
import sys
from powerprop_jax.train.runs import folder

def refuse(out):
  raise ValueError(f'out must not be {{out}}.')

sys.exit(folder.run_main({}))
"""
