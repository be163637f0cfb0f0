"""Text as a data set, and a language model from training to a bench."""

import numpy as np
import pytest

from powerprop_jax.train.cli import main
from powerprop_jax.train.data import splits, text
from powerprop_jax.train.runs.errors import UserError


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('abcäd\n' * 50)
  return path


def test_windows_begin_anywhere_and_their_labels_follow(file):
  found = splits.load(splits.DataConfig(str(file), context=7))
  assert found.is_text and found.num_classes == 6
  alphabet = np.array(sorted('abcäd\n'))
  tokens, labels = found.train
  assert tokens.shape == labels.shape == (270 - 7, 7)
  whole = 'abcäd\n' * 50
  for start in (0, 1, 262):
    read = lambda codes, start=start: ''.join(alphabet[codes[start]])
    assert read(tokens) == whole[start : start + 7]
    assert read(labels) == whole[start + 1 : start + 8]
  for held_out in (found.validation, found.test):
    read = ''.join(alphabet[held_out.images.reshape(-1)])
    assert read == whole[270:298]
    assert ''.join(alphabet[held_out.labels.reshape(-1)]) == whole[271:299]


def test_the_bundled_text_is_half_a_megabyte():
  train, validation, _, num_classes = text.characters('pydoc', 64)
  assert 3e5 < len(train.labels) < 1e6
  assert 0.8 < len(validation.labels) * 64 / len(train.labels) * 9 < 1.2
  assert num_classes < 256


@pytest.mark.parametrize(
  ('name', 'context', 'match'),
  [
    ('none.txt', 4, 'cannot read none.txt: No such file'),
    ('text.txt', 0, 'context must be at least 1, got 0'),
    ('text.txt', 30, 'has 300 characters, and needs 310 for windows of 30'),
    ('bad.txt', 4, 'bad.txt is no text in UTF-8'),
  ],
)
def test_what_is_no_such_text_is_refused(
  file, monkeypatch, name, context, match
):
  monkeypatch.chdir(file.parent)
  (file.parent / 'bad.txt').write_bytes(b'\xff' * 999)
  with pytest.raises(UserError, match=match):
    splits.load(splits.DataConfig(name, context=context))


@pytest.mark.slow
def test_the_command_line_takes_a_language_model_all_the_way(file, capsys):
  run, out = file.parent / 'run', file.parent / 'net_jax.npz'
  commands = (
    f'train --net gpt_small --data.name {file} --data.context 8 --out {run} '
    '--method rigl --sparsity 0.9 --alpha 1 --optimizer.name adam '
    '--sparse.period 1 --sparse.stop 1 --loop.num-steps 4 --loop.batch-size 2 '
    '--loop.eval-every 2 --loop.steps-per-dispatch 2 '
    '--optimizer.warmup-steps 1 --optimizer.schedule cosine',
    f'prune {run} --kept 0.05 --out {file.parent / "pruned"}',
    f'export {run} --kept 0.1 --format jax --out {out}',
    f'bench {out} --batches 1 --repeats 1',
  )
  for command in commands:
    assert not main.main(command.split()), capsys.readouterr().err
  assert 'masked' in capsys.readouterr().out
  for bad in (
    'train --net gpt_small --data.name pydoc --normalise',
    'train --net gpt_small --data.name pydoc --data.context 100',
    'train --net gpt_small',
    'train --net lenet_5 --data.name pydoc',
    'train --optimizer.warmup-steps 6000',
  ):
    command = [*bad.split(), '--out', str(file.parent / 'none')]
    assert main.main(command) == 2
    assert capsys.readouterr().err.count('\n') == 1
