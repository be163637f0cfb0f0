"""Writers get numbers in order, and say in a line where these went."""

import time

import jax.numpy as jnp
import numpy as np
import programs
import pytest

from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import writers
from powerprop_jax.train.runs.folder import RunConfig, RunFolder

TINY = (
  *('--net', 'mlp', '--loop.num-steps', '4', '--loop.batch-size', '8'),
  *('--loop.eval-every', '2', '--loop.steps-per-dispatch', '2'),
)


def test_numbers_have_the_name_of_their_network():
  record = {'loss': jnp.float32(0.5), 'split': 'test', 'bad': np.nan}
  assert writers.numbers(record) == {'loss': 0.5}
  found = writers.numbers({'alpha': 1.5, 'key': 0, **record})
  assert found == {'loss/alpha_1.5_key_0': 0.5}
  found = writers.numbers({'layer': 'mlp/w', 'key': 1, 'density': 0.5})
  assert found == {'density/key_1/mlp/w': 0.5}
  assert writers.numbers({'alpha': None, 'loss': 1}) == {'loss': 1}


class TensorBoardTest:
  def test_numbers_are_written(self, tmp_path):
    pytest.importorskip('tensorboardX', reason='needs the tensorboard extra')
    writer = writers.TensorBoardWriter(tmp_path)
    assert not any(tmp_path.iterdir())
    writer.write(1, {'loss': jnp.float32(0.5)})
    writer.close()
    (events,) = (tmp_path / 'tensorboard').glob('events*')
    assert b'loss' in events.read_bytes()

  @pytest.mark.slow
  @pytest.mark.parametrize(
    ('study', 'args', 'name'),
    [
      ('sparse_training', (*TINY, '--methods=set', '--sparse.period=1'),
       'churn/alpha_1_key_0'),
      ('adaptive_alpha', ('--preset=tiny', '--methods', 'fixed', 'race'),
       'key_0/total'),
      ('continual_permuted', ('--methods=packnet', '--net.hidden=9',
                              '--net.epochs=1', '--stream.num-tasks=2'),
       'accuracy/task_2'),
    ],
  )  # fmt: skip
  def test_a_study_writes_the_numbers_of_each_part(
    self, study, args, name, tmp_path
  ):
    pytest.importorskip('tensorboardX', reason='needs the tensorboard extra')
    args = (*args, '--alphas=1', '--keys=0', '--tensorboard')
    assert programs.run(programs.module(study), *args, '--out', tmp_path) == 0
    parts = [*(tmp_path / 'combinations').iterdir()]
    assert parts
    for part in parts:
      (events,) = (part / 'tensorboard').glob('events*')
      assert name.encode() in events.read_bytes()


class WandbTest:
  @pytest.fixture(autouse=True)
  def nobody_is_logged_in(self, tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='needs the wandb extra')
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_PROJECT'):
      monkeypatch.delenv(name, raising=False)
    # Where a key, and the place of the server, would be found.
    for name in ('HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR'):
      monkeypatch.setenv(name, str(tmp_path / 'home'))
    monkeypatch.setenv('NETRC', str(tmp_path / 'home/.netrc'))

  def test_a_run_without_an_account_is_kept_and_said(self, tmp_path, capsys):
    run = tmp_path / 'run'
    assert programs.powerprop('train', *TINY, '--out', run, '--wandb') == 0
    found = capsys.readouterr()
    (note,) = [x for x in found.err.splitlines() if 'Weights & Biases' in x]
    (kept,) = (run / 'wandb').glob('offline-run-*')
    assert note == (
      'note: Weights & Biases is offline (nobody is logged in); send the run '
      f'later with: wandb sync {kept}'
    )
    assert 'wandb:' not in found.err + found.out
    for name in ('loss', 'accuracy', 'validation_accuracy'):
      assert is_in(f'{name}/alpha_2_key_0', kept.glob('*.wandb'))
    # It is the same run whether its numbers go there or not.
    assert 'wandb' not in run_folder.read_config(run)['config']
    assert programs.powerprop('train', *TINY, '--out', run, '--resume') == 0

  def test_what_was_chosen_is_not_explained(
    self, tmp_path, monkeypatch, capsys
  ):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    folder = RunFolder(tmp_path / 'run', {'alpha': 2.0}, program='mine')
    (writer,) = writers.of_run(folder, RunConfig(wandb=True))
    (again,) = writers.of_run(folder, RunConfig(wandb=True))
    writer.write(7, {'loss': jnp.float32(0.5)})
    writer.close()
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith('note: Weights & Biases is offline; send the run')
    # What is continued is one run.
    again.write(9, {'loss': 0.25})
    again.close()
    files = [*(tmp_path / 'run/wandb').glob('offline-run-*/*.wandb')]
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert is_in('0.25', files)


def is_in(text, files):
  """Whether one of these files has it soon; wandb writes them meanwhile."""
  files = [*files]
  for _ in range(100):
    if any(text.encode() in file.read_bytes() for file in files):
      return True
    time.sleep(0.1)
  return False
